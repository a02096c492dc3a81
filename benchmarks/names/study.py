"""Measures the names application's reference result: `python -m benchmarks.names.study [--record]`.

For each of several splits of the data, with different seeds, this program trains four systems: the
plain recipe, the reference recipe, the small pretrained network and the n-gram baseline. It
evaluates each system once on the test set. With `--record` it replaces the table of docs/names.md,
the recorded figures, the pretrained network of the package and its model card.

Splits run in parallel, each on one thread.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import pages
from benchmarks.harness.paths import DOCS, ROOT, Section
from benchmarks.names import study_report as page
from benchmarks.names.data import names
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
from namernn_fast.names.evaluation import best_hits, evaluate
from namernn_fast.names.prediction import logits
from namernn_fast.names.significance import LabelledPredictions, corrected_t_test, paired_bootstrap

SPLITS = 5
SECTION = Section(DOCS / "names.md", "names", page.report)
CARD = pretrained_checkpoint().with_name("MODEL_CARD.md")
SHIPPED = ROOT / "build" / "names.safetensors"
"""The distilled network of the first split, before it is recorded."""


class Run(NamedTuple):
    """The results of one split."""

    parts: Split
    scores: dict[str, Tensor]
    """The scores of the test names by each system, and how unusual these names are."""
    seconds: dict[str, float]
    """The processor time of each slow system."""

    def predictions(self, name: str) -> LabelledPredictions:
        """Returns a system's predictions for the test names."""
        test = self.parts.test
        return LabelledPredictions(test.labels, self.scores[name].argmax(1), test.texts)


def run_split(seed: int) -> Run:
    """Trains every system on one split and one thread. Saves the network of the first split."""
    torch.set_num_threads(1)
    parts = split(names(), seed=seed)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = call()
        seconds[name] = time.process_time() - started
        print(f"split {seed}: {name}, {seconds[name]:.0f} s", flush=True)
        return result

    def taught() -> Fit:
        correction = RECIPES["reference"].prior_correction
        lesson = distilled(parts, teacher, MADE_UP, prior_correction=correction, seed=seed)
        return fit(lesson, RECIPES["distilled"], seed=seed)

    counted = timed(page.NGRAM, lambda: ngram_baseline(parts)).test
    weighted = timed(page.WEIGHTED, lambda: ngram_baseline(parts, WEIGHTED_NGRAMS)).test
    plain = timed(page.PLAIN, lambda: fit(parts, RECIPES["plain"], seed=seed)).checkpoint
    ensemble = timed(page.REFERENCE, lambda: fit(parts, RECIPES["reference"], seed=seed))
    teacher = ensemble.checkpoint.model
    pupil = timed(page.DISTILLED, taught).checkpoint
    if seed == 0:
        SHIPPED.parent.mkdir(exist_ok=True)
        save_checkpoint(SHIPPED, pupil)
    scores = {
        page.MAJORITY: majority_baseline(parts).test,
        page.NGRAM: counted,
        # Undo the prior correction, which subtracted a multiple of the log priors.
        page.BARE: counted + NGRAMS.prior_correction * parts.log_priors(),
        page.WEIGHTED: weighted,
        page.UNUSUAL: pupil.unusualness.of(parts.test.names, parts.folding),
    }
    networks = {page.PLAIN: plain.model, page.ONE: teacher.members[0], page.REFERENCE: teacher}
    for name, network in (*networks.items(), (page.DISTILLED, pupil.model)):
        scores[name] = logits(network, parts.test.names)
    return Run(parts, scores, seconds)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the study's results as built-in Python types, for JSON."""
    systems = {name: figures(runs, name) for name in page.SYSTEMS}
    infos = [run.parts.info for run in runs]
    return {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "splits": [without_path(info) for info in infos],
        "names": [list(info["names"].values()) for info in infos],
        "unusual": unusual_names(runs),
        "ceiling": [
            best_hits(test.texts, test.labels.tolist()) / len(test)
            for test in (run.parts.test for run in runs)
        ],
        "systems": systems,
        "tests": {
            rival: {
                name: tests(runs, systems, rival, name)
                for name in (page.REFERENCE, page.ONE, page.DISTILLED, page.PLAIN)
            }
            for rival in page.RIVALS
        },
    }


def figures(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """Returns a system's figures by name, each as a list with one value per split."""
    languages = runs[0].parts.languages
    evaluations = [
        evaluate(run.parts.test.labels, run.scores[name], languages, resamples=100) for run in runs
    ]
    return {
        "accuracy": [item.accuracy.value for item in evaluations],
        "macro_f1": [item.macro_f1.value for item in evaluations],
        "top3": [item.top3.value for item in evaluations],
        "log_loss": [item.log_loss for item in evaluations],
        "calibration_error": [item.calibration_error for item in evaluations],
        "recall": {
            language: [item.languages[place].recall.value for item in evaluations]
            for place, language in enumerate(languages)
        },
        "seconds": [run.seconds.get(name) for run in runs],
    }


def unusual_names(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns for each split the fraction of test names that are unusual, and the distilled
    network's accuracy on unusual and on all other names."""
    found: dict[str, list[float]] = {"share": [], "accuracy": [], "accuracy_of_others": []}
    for parts, scores, _ in runs:
        right = (scores[page.DISTILLED].argmax(1) == parts.test.labels).double()
        unusual = scores[page.UNUSUAL] > 1
        found["share"].append(unusual.double().mean().item())
        found["accuracy"].append(right[unusual].mean().item())
        found["accuracy_of_others"].append(right[~unusual].mean().item())
    return found


def well_known_names(network: Predictor) -> list[dict[str, Any]]:
    """Returns a network's predictions for well-known names."""
    asked = [(language, name) for language, names in WELL_KNOWN.items() for name in names]
    answers = network.predict([name for _, name in asked], top=1)
    return [
        {"name": name, "language": language, "answer": answer, "probability": probability}
        for (language, name), [(answer, probability)] in zip(asked, answers, strict=True)
    ]


def without_path(info: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a split without the local path of the data."""
    return {**info, "data": {**info["data"], "source": "the names data set"}}


def tests(
    runs: Sequence[Run], systems: dict[str, Any], rival_name: str, name: str
) -> dict[str, Any]:
    """Returns paired significance tests of a network against a rival; `systems` has both."""
    first, second = ([run.predictions(each) for run in runs] for each in (rival_name, name))
    share = len(runs[0].parts.test) / len(runs[0].parts.train)
    found = {}
    for figure, difference in zip(
        ("accuracy", "macro_f1"), paired_bootstrap(first, second), strict=True
    ):
        values = zip(systems[rival_name][figure], systems[name][figure], strict=True)
        differences = [network - rival for rival, network in values]
        found[figure] = {
            "bootstrap": dataclasses.asdict(difference),
            "corrected_t_test": dataclasses.asdict(corrected_t_test(differences, share)),
            "wins": sum(value > 0 for value in differences),
        }
    return found


def record(found: dict[str, Any]) -> None:
    """Replaces the pretrained network with the network of the first split, and updates its card."""
    network = load_checkpoint(SHIPPED)
    network.info["split"] = without_path(network.info["split"])
    save_checkpoint(pretrained_checkpoint(), network, torch.float16)
    write_card(found)


def write_card(found: dict[str, Any]) -> None:
    """Writes the model card of the pretrained network."""
    size = pretrained_checkpoint().stat().st_size
    letters = load_checkpoint(pretrained_checkpoint()).folding.letters
    CARD.write_text(page.card(found, size, letters), encoding="utf-8")


def main() -> None:
    parser = pages.parser(__doc__)
    options = pages.parse(parser)
    if names().is_sample:
        parser.error("the study needs the names data set: set NAMERNN_FAST_DATA")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = [*pool.map(run_split, range(SPLITS))]
    found = {**summary(runs), "well_known": well_known_names(load(SHIPPED))}
    pages.publish("names", json.loads(json.dumps(found)), [SECTION], options.record)
    if options.record:
        record(found)


if __name__ == "__main__":
    main()
