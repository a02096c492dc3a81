"""The reference result of the names application: `python -m benchmarks.names.study [--record]`.

On several splits of the data, each with its own seed, it trains the plain recipe, the reference
recipe, the small network that ships, and the n-gram baseline, and evaluates each once on the test
part. With `--record` it replaces the table of docs/names.md, the recorded figures, the
pretrained network of the package and its model card.

Splits run in parallel, each on one thread. Finished stages are kept in `build/names`, and a second
run of the same code continues from there.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import pages
from benchmarks.harness.paths import DOCS, ROOT
from benchmarks.names.data import names
from benchmarks.names.page import (
    BARE,
    DISTILLED,
    MAJORITY,
    NGRAM,
    ONE,
    PLAIN,
    REFERENCE,
    RIVALS,
    SYSTEMS,
    UNUSUAL,
    WEIGHTED,
    card,
    report,
)
from benchmarks.names.well_known import WELL_KNOWN
from namernn_fast.bench.machine import cpu_name
from namernn_fast.names import (
    RECIPES,
    Fit,
    Predictor,
    Split,
    fit,
    load,
    load_checkpoint,
    save_checkpoint,
    split,
)
from namernn_fast.names.baselines import (
    NGRAMS,
    WEIGHTED_NGRAMS,
    majority_baseline,
    ngram_baseline,
)
from namernn_fast.names.checkpoint import pretrained_checkpoint
from namernn_fast.names.distillation import MADE_UP, distilled
from namernn_fast.names.evaluation import Evaluation, best_hits, evaluate
from namernn_fast.names.model import NameEnsemble
from namernn_fast.names.prediction import logits
from namernn_fast.names.significance import LabelledPredictions, corrected_t_test, paired_bootstrap
from namernn_fast.names.tensor_files import read_tensors, write_tensors
from namernn_fast.names.text import InputError

PAGE = DOCS / "names.md"
CARD = pretrained_checkpoint().with_name("MODEL_CARD.md")
SCRATCH = ROOT / "build" / "names"
KIND = "namernn_fast.names study 1"


def code_version() -> str:
    """Returns a hash of the code and data that decide the results of a split."""
    digest = hashlib.sha256(names().sha256.encode())
    folder = pretrained_checkpoint().parents[1]
    decisive = (
        "baselines checkpoint distillation encoding folding model ngrams prediction recipes "
        "splitting steps text training unusual"
    )
    files = [folder / f"{name}.py" for name in decisive.split()]
    for path in (*files, Path(__file__), Path(__file__).with_name("page.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass
class Run:
    """One stage on one split: what it may read, and the times that it records."""

    seed: int
    parts: Split
    folder: Path
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """Returns what `call` returns; records and prints the processor time that it took."""
        started = time.process_time()
        result = call()
        self.seconds[name] = time.process_time() - started
        print(f"split {self.seed}: {name}, {self.seconds[name]:.0f} s", flush=True)
        return result

    def model_path(self, stage: str) -> Path:
        """Returns the path of a stage's model."""
        return self.folder / f"{stage}{self.seed}_model.safetensors"


def rivals(run: Run) -> dict[str, Tensor]:
    """Fits what the networks are compared with, and scores the test part."""
    parts = run.parts
    counted = run.timed(NGRAM, lambda: ngram_baseline(parts)).test
    return {
        MAJORITY: majority_baseline(parts).test,
        NGRAM: counted,
        # Undoes the correction, which subtracted a multiple of the logarithm of the priors.
        BARE: counted + NGRAMS.prior_correction * parts.log_priors(),
        WEIGHTED: run.timed(WEIGHTED, lambda: ngram_baseline(parts, WEIGHTED_NGRAMS)).test,
    }


def plain(run: Run) -> dict[str, Tensor]:
    """Trains the plain recipe."""
    fitted = run.timed(PLAIN, lambda: fit(run.parts, RECIPES["plain"], seed=run.seed))
    return {PLAIN: logits(fitted.checkpoint.model, run.parts.test.names)}


def reference(run: Run) -> dict[str, Tensor]:
    """Trains the reference recipe, and saves the model, which is the teacher of `distilled`."""
    fitted = run.timed(REFERENCE, lambda: fit(run.parts, RECIPES["reference"], seed=run.seed))
    model = fitted.checkpoint.model
    assert isinstance(model, NameEnsemble)
    save_checkpoint(run.model_path("reference"), fitted.checkpoint)
    return {
        REFERENCE: logits(model, run.parts.test.names),
        ONE: logits(model.members[0], run.parts.test.names),
    }


def distilled_network(run: Run) -> dict[str, Tensor]:
    """Trains the plain network with the reference as teacher, and saves it, because it may ship."""
    teacher = load_checkpoint(run.model_path("reference")).model
    correction = RECIPES["reference"].prior_correction

    def taught() -> Fit:
        lesson = distilled(run.parts, teacher, MADE_UP, prior_correction=correction, seed=run.seed)
        return fit(lesson, RECIPES["distilled"], seed=run.seed)

    fitted = run.timed(DISTILLED, taught)
    save_checkpoint(run.model_path("distilled"), fitted.checkpoint)
    unusualness = fitted.checkpoint.unusualness
    assert unusualness is not None
    return {
        DISTILLED: logits(fitted.checkpoint.model, run.parts.test.names),
        UNUSUAL: unusualness.of(run.parts.test.names, run.parts.folding),
    }


STAGES = {"rivals": rivals, "plain": plain, "reference": reference, "distilled": distilled_network}
"""What runs on each split, by the name of its file; a stage may read what earlier stages wrote."""


def run_stage(stage: str, seed: int, folder: Path, version: str) -> None:
    """Runs a stage on one split and one thread, and writes the test scores and the times."""
    target = folder / f"{stage}{seed}.safetensors"
    if is_finished(target, version):
        return
    torch.set_num_threads(1)
    run = Run(seed, split(names(), seed=seed), folder)
    scores = STAGES[stage](run)
    write_tensors(target, KIND, scores, {"version": version, "seconds": run.seconds})


def is_finished(path: Path, version: str) -> bool:
    """Returns whether the same code has already written `path`."""
    try:
        return bool(read_tensors(path, KIND)[1]["version"] == version)
    except InputError:
        return False


@dataclasses.dataclass(frozen=True)
class Results:
    """The test scores of all systems on all splits, and the seconds that each system took."""

    parts: list[Split]
    scores: list[dict[str, Tensor]]
    seconds: list[dict[str, float]]

    def evaluations(self, name: str) -> list[Evaluation]:
        """Returns the figures of a system, one for each split."""
        return [
            evaluate(parts.test.labels, scores[name], parts.languages, resamples=100)
            for parts, scores in zip(self.parts, self.scores, strict=True)
        ]

    def predictions(self, name: str) -> list[LabelledPredictions]:
        """Returns what a system predicts, one for each split."""
        return [
            LabelledPredictions(parts.test.labels, scores[name].argmax(1), parts.test.texts)
            for parts, scores in zip(self.parts, self.scores, strict=True)
        ]


def collect(seeds: range, folder: Path) -> Results:
    """Reads what the stages have written."""
    scores: list[dict[str, Tensor]] = []
    seconds: list[dict[str, float]] = []
    for seed in seeds:
        scores.append({})
        seconds.append({})
        for stage in STAGES:
            found, values = read_tensors(folder / f"{stage}{seed}.safetensors", KIND)
            scores[-1] |= found
            seconds[-1] |= values["seconds"]
    return Results([split(names(), seed=seed) for seed in seeds], scores, seconds)


def summary(results: Results) -> dict[str, Any]:
    """Returns the figures of the study as plain values."""
    parts = results.parts[0]
    systems = {}
    for name in SYSTEMS:
        evaluations = results.evaluations(name)
        systems[name] = {
            "accuracy": [item.accuracy.value for item in evaluations],
            "macro_f1": [item.macro_f1.value for item in evaluations],
            "top3": [item.top3.value for item in evaluations],
            "log_loss": [item.log_loss for item in evaluations],
            "calibration_error": [item.calibration_error for item in evaluations],
            "recall": {
                language: [item.languages[place].recall.value for item in evaluations]
                for place, language in enumerate(parts.languages)
            },
            "seconds": [seconds.get(name) for seconds in results.seconds],
        }
    return {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "splits": [without_path(item.info) for item in results.parts],
        "names": [list(item.info["names"].values()) for item in results.parts],
        "unusual": unusual_names(results),
        "ceiling": [
            best_hits(item.test.texts, item.test.labels.tolist()) / len(item.test)
            for item in results.parts
        ],
        "systems": systems,
        "tests": {
            rival: {
                name: tests(results, systems, rival, name)
                for name in (REFERENCE, ONE, DISTILLED, PLAIN)
            }
            for rival in RIVALS
        },
    }


def unusual_names(results: Results) -> dict[str, Any]:
    """Returns, for each split, the share of unusual test names, and the accuracy of the distilled
    network on them and on the others."""
    found: dict[str, list[float]] = {"share": [], "accuracy": [], "accuracy_of_others": []}
    for parts, scores in zip(results.parts, results.scores, strict=True):
        right = (scores[DISTILLED].argmax(1) == parts.test.labels).double()
        unusual = scores[UNUSUAL] > 1
        found["share"].append(unusual.double().mean().item())
        found["accuracy"].append(right[unusual].mean().item())
        found["accuracy_of_others"].append(right[~unusual].mean().item())
    return found


def well_known_names(network: Predictor) -> list[dict[str, Any]]:
    """Returns a network's answers to well-known names."""
    asked = [(language, name) for language, names in WELL_KNOWN.items() for name in names]
    answers = network.predict([name for _, name in asked], top=1)
    return [
        {"name": name, "language": language, "answer": answer, "probability": probability}
        for (language, name), [(answer, probability)] in zip(asked, answers, strict=True)
    ]


def without_path(info: dict[str, Any]) -> dict[str, Any]:
    """Returns what a split records, without the path of the data on the machine of the study."""
    return {**info, "data": {**info["data"], "source": "the names data set"}}


def tests(results: Results, systems: dict[str, Any], rival_name: str, name: str) -> dict[str, Any]:
    """Returns the paired tests of a network against a rival; `systems` has the figures of both."""
    first, second = results.predictions(rival_name), results.predictions(name)
    share = len(results.parts[0].test) / len(results.parts[0].train)
    found = {}
    for figure, difference in zip(
        ("accuracy", "macro_f1"), paired_bootstrap(first, second), strict=True
    ):
        values = zip(systems[rival_name][figure], systems[name][figure], strict=True)
        differences = [network - rival for rival, network in values]
        found[figure] = {
            "bootstrap": dataclasses.asdict(difference),
            "wins": sum(value > 0 for value in differences),
        }
        if len(differences) > 1:
            tested = corrected_t_test(differences, share)
            found[figure]["corrected_t_test"] = dataclasses.asdict(tested)
    return found


def record(found: dict[str, Any]) -> None:
    """Replaces the pretrained network and its card: the network of the first split ships."""
    target = pretrained_checkpoint()
    network = load_checkpoint(SCRATCH / "distilled0_model.safetensors")
    network.info["split"] = without_path(network.info["split"])
    target.parent.mkdir(exist_ok=True)
    save_checkpoint(target, network, torch.float16)
    write_card(found)


def write_card(found: dict[str, Any]) -> None:
    """Writes the model card of the pretrained network."""
    size = pretrained_checkpoint().stat().st_size
    letters = load_checkpoint(pretrained_checkpoint()).folding.letters
    CARD.write_text(card(found, size, letters), encoding="utf-8")


def main() -> None:
    parser = pages.parser(__doc__)
    parser.add_argument("--splits", type=int, default=5, help="how many (default: 5)")
    options = pages.parse(parser)
    if names().is_sample:
        parser.error("the study needs the names data set: set NAMERNN_FAST_DATA")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    seeds = range(options.splits)
    version = code_version()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for stage in STAGES:
            list(pool.map(partial(run_stage, stage, folder=SCRATCH, version=version), seeds))
    network = load(SCRATCH / "distilled0_model.safetensors")
    found = {**summary(collect(seeds, SCRATCH)), "well_known": well_known_names(network)}
    pages.publish("names", json.loads(json.dumps(found)), report(found), options.record, PAGE)
    if options.record:
        record(found)


if __name__ == "__main__":
    main()
