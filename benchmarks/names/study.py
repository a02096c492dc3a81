"""The reference result of the names application: `python -m benchmarks.names.study [--record]`.

On several splits of the data, each with a seed of its own, it trains the plain recipe, the
reference recipe, the small network that ships, and the n-gram baseline, and asks each for the test
part once. With `--record` it replaces the table of docs/names.md, the recorded figures, the
pretrained network of the package and its model card.

Splits run side by side, each on one thread. What a split has finished lies in `build/names`, and a
second run goes on from there; `--anew` starts again.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import pages
from benchmarks.harness.machine import cpu_name
from benchmarks.harness.paths import DOCS, ROOT
from benchmarks.harness.surnames import names
from benchmarks.harness.tables import markdown
from namernn_fast.names import RECIPES, Checkpoint, Split, fit, load_checkpoint, split
from namernn_fast.names import save_checkpoint as save
from namernn_fast.names.baselines import NGRAMS, majority_baseline, ngram_baseline
from namernn_fast.names.checkpoint import pretrained_checkpoint
from namernn_fast.names.distillation import distilled
from namernn_fast.names.evaluation import Evaluation, best_hits, evaluate
from namernn_fast.names.model import NameEnsemble
from namernn_fast.names.prediction import logits
from namernn_fast.names.significance import Answers, corrected_t_test, paired_bootstrap
from namernn_fast.names.tensor_files import read_tensors, write_tensors
from namernn_fast.names.text import InputError

PAGE = DOCS / "names.md"
CARD = pretrained_checkpoint().with_name("MODEL_CARD.md")
SCRATCH = ROOT / "build" / "names"
KIND = "namernn_fast.names study 1"

MADE_UP = 80_000
"""Made-up names that the small network learns from."""

MAJORITY, NGRAM, SAME = "majority", "n-grams", "n-grams, same"
PLAIN, REFERENCE, ONE, SMALL = "plain", "reference", "one network of it", "small"
SYSTEMS = {
    MAJORITY: "the most frequent language, always",
    NGRAM: "logistic regression on the counts of character n-grams, at its best on validation parts",
    SAME: "the n-grams with the prior correction of the networks",
    PLAIN: "the seed's network: one direction, last state, recipe `plain`",
    SMALL: "the same network, taught by the reference: the one that ships",
    ONE: "the first network of the reference",
    REFERENCE: "recipe `reference`: several networks of n-gram embeddings, two directions",
}


def scores_of(model: nn.Module, parts: Split) -> Tensor:
    """Returns the logits of the test part."""
    return logits(model, parts.test.names)


def code_version() -> str:
    """Returns a hash of the code and data that decide the results of a split."""
    digest = hashlib.sha256(names().sha256.encode())
    folder = pretrained_checkpoint().parents[1]
    decisive = (
        "baselines checkpoint distillation model ngrams prediction recipes splitting steps text "
        "training"
    )
    for name in decisive.split():
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()


def run_split(seed: int, folder: Path, version: str) -> None:
    """Trains and asks every system on one split, and writes the test scores to `folder`."""
    torch.set_num_threads(1)
    target = folder / f"split{seed}.safetensors"
    try:
        if read_tensors(target, KIND)[1]["version"] == version:
            return
    except InputError:
        pass
    parts = split(names(), seed=seed)
    seconds, scores = {}, {MAJORITY: majority_baseline(parts).test}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - started
        print(f"split {seed}: {name}, {seconds[name]:.0f} s", flush=True)
        return result

    ngrams = timed(NGRAM, lambda: ngram_baseline(parts))
    scores[NGRAM] = ngrams.test
    # The correction is a multiple of the logarithm of the priors, which is subtracted.
    less = NGRAMS.prior_correction - RECIPES["reference"].prior_correction
    scores[SAME] = ngrams.test + less * parts.priors().log()
    plain = timed(PLAIN, lambda: fit(parts, RECIPES["plain"], seed=seed)).checkpoint
    scores[PLAIN] = scores_of(plain.model, parts)
    reference = timed(REFERENCE, lambda: fit(parts, RECIPES["reference"], seed=seed)).checkpoint
    scores[REFERENCE] = scores_of(reference.model, parts)
    assert isinstance(reference.model, NameEnsemble)
    scores[ONE] = scores_of(reference.model.members[0], parts)
    small = timed(SMALL, lambda: small_network(parts, reference, seed))
    scores[SMALL] = scores_of(small.model, parts)
    save(folder / f"reference{seed}.safetensors", reference, torch.float16)
    save(folder / f"small{seed}.safetensors", small, torch.float16)
    write_tensors(target, KIND, scores, {"version": version, "seconds": seconds})


def small_network(parts: Split, reference: Checkpoint, seed: int) -> Checkpoint:
    """Returns the seed's network, taught by the reference."""
    lesson = distilled(parts, reference.model, MADE_UP, seed=seed)
    return fit(lesson, RECIPES["distilled"], seed=seed).checkpoint


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

    def answers(self, name: str) -> list[Answers]:
        """Returns what a system answers, one for each split."""
        return [
            Answers(parts.test.labels, scores[name].argmax(1), parts.test.texts)
            for parts, scores in zip(self.parts, self.scores, strict=True)
        ]


def collect(seeds: range, folder: Path) -> Results:
    """Reads what `run_split` has written."""
    read = [read_tensors(folder / f"split{seed}.safetensors", KIND) for seed in seeds]
    return Results(
        [split(names(), seed=seed) for seed in seeds],
        [scores for scores, _ in read],
        [values["seconds"] for _, values in read],
    )


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
        "splits": [item.info for item in results.parts],
        "names": [
            [len(item.train), len(item.validation), len(item.test)] for item in results.parts
        ],
        "ceiling": [
            best_hits(item.test.texts, item.test.labels.tolist()) / len(item.test)
            for item in results.parts
        ],
        "systems": systems,
        "tests": {name: tests(results, name) for name in (REFERENCE, ONE, SMALL, PLAIN)},
    }


def tests(results: Results, name: str) -> dict[str, Any]:
    """Returns the paired tests of a system against the n-grams."""
    first, second = results.answers(NGRAM), results.answers(name)
    share = len(results.parts[0].test) / len(results.parts[0].train)
    found = {}
    pairs = (results.evaluations(NGRAM), results.evaluations(name))
    for figure, difference in zip(
        ("accuracy", "macro_f1"), paired_bootstrap(first, second), strict=True
    ):
        values = [[getattr(item, figure).value for item in items] for items in pairs]
        differences = [theirs - ours for ours, theirs in zip(*values, strict=True)]
        found[figure] = {
            "bootstrap": dataclasses.asdict(difference),
            "wins": sum(value > 0 for value in differences),
        }
        if len(differences) > 1:
            tested = corrected_t_test(differences, share)
            found[figure]["corrected_t_test"] = dataclasses.asdict(tested)
    return found


def spread(values: list[float], factor: float = 1, digits: int = 3) -> str:
    """Returns the mean and the standard deviation over the splits."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.mean(values):.{digits}f} ± {factor * deviation:.{digits}f}"


def report(found: dict[str, Any]) -> str:
    """Returns the section of docs/names.md: who wins, by how much, and on which languages."""
    train, validation, test = found["names"][0]
    rows = [
        ["", "accuracy %", "macro-F1", "top-3 %", "log loss", "calibration error", "seconds"],
        ["ceiling", spread(found["ceiling"], 100, 1), "", "", "", "", ""],
    ]
    for name, figures in found["systems"].items():
        seconds = [value for value in figures["seconds"] if value is not None]
        rows.append(
            [
                name,
                spread(figures["accuracy"], 100, 1),
                spread(figures["macro_f1"]),
                spread(figures["top3"], 100, 1),
                spread(figures["log_loss"], 1, 2),
                spread(figures["calibration_error"]),
                f"{statistics.median(seconds):.0f}" if seconds else "",
            ]
        )
    legend = "\n".join(f"- **{name}**: {text}." for name, text in SYSTEMS.items())
    languages = [["language", *(name for name in SYSTEMS if name != MAJORITY)]]
    for language in found["systems"][NGRAM]["recall"]:
        recalls = (found["systems"][name]["recall"][language] for name in languages[0][1:])
        languages.append(
            [language, *(f"{100 * statistics.mean(values):.0f}" for values in recalls)]
        )
    verdicts = "\n".join(verdict(name, tests) for name, tests in found["tests"].items())
    return "\n\n".join(
        [
            f"Test parts of {len(found['splits'])} splits, each with a seed of its own: mean ± "
            f"standard deviation. The first split has {train:,} names to train, {validation:,} to "
            f"validate and {test:,} to test, SHA-256 `{found['splits'][0]['sha256'][:16]}`. Seconds "
            f"are of one thread on {found['cpu']}, two splits side by side; torch {found['torch']}.",
            markdown(rows),
            legend,
            "Each network against the n-grams on the same test names. The interval is the paired "
            "bootstrap's over the strings of all splits, with the trained models fixed; the "
            "corrected t test (Nadeau and Bengio, 2003) takes the spread from one split and seed "
            "to the next into account.",
            verdicts,
            "Recall of each language in %, mean over the splits:",
            markdown(languages),
        ]
    )


def verdict(name: str, tests: dict[str, Any]) -> str:
    """Returns a line that says how a system compares with the n-grams."""
    said = []
    for figure, label, factor, unit in (
        ("accuracy", "accuracy", 100, " points"),
        ("macro_f1", "macro-F1", 1, ""),
    ):
        found = tests[figure]["bootstrap"]
        digits = 2 if factor == 100 else 3
        low, value, high = (factor * found[end] for end in ("low", "value", "high"))
        word = "ahead" if low > 0 else "behind" if high < 0 else "a tie"
        text = (
            f"{label} {value:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f}): {word}"
        )
        if corrected := tests[figure].get("corrected_t_test"):
            text += f", corrected t test p = {corrected['p_value']:.2g}"
        said.append(f"{text}, {tests[figure]['wins']} splits won")
    return f"- **{name}**: {'; '.join(said)}."


def card(found: dict[str, Any], bytes_: int) -> str:
    """Returns the model card of the network that ships."""
    figures = found["systems"]
    lines = [
        f"| {label} | {100 * figures[name]['accuracy'][0]:.1f} | {figures[name]['macro_f1'][0]:.3f} |"
        f" {100 * figures[name]['top3'][0]:.1f} |"
        for name, label in (
            (SMALL, "this network"),
            (REFERENCE, "the reference that taught it"),
            (NGRAM, "n-gram logistic regression"),
        )
    ]
    split0 = found["splits"][0]
    recalls = figures[SMALL]["recall"]
    worst = sorted(recalls, key=lambda language: recalls[language][0])[:4]
    return f"""# Model card: the pretrained network of `namernn_fast.names`

`names.safetensors` ({bytes_ / 1024:.0f} KiB, weights in 16 bits) tells which of {len(recalls)} languages a surname
comes from. It is the plain network: an embedding of 64 numbers a character, a vanilla RNN of 256 units in one
direction, and a linear layer on the last state.

**A surname is not an ethnicity, a nationality or a mother tongue.** The network reads spelling alone. Do not decide
anything about a person by it.

## Training

It was taught by the reference ensemble of this project: on the names of the training part of the names data set and on
{MADE_UP:,} names made up from that part it learned the ensemble's probabilities. `make names` repeats it.

Data: the names data set of the PyTorch tutorials, from `spro/practical-pytorch`, {split0["data"]["rows"]:,} rows,
copyright Sean Robertson, MIT licence. Split: method "{split0["method"]}", seed {split0["seed"]}, SHA-256
`{split0["sha256"]}`. The weights are under the MIT licence of this project.

## Figures

On the {found["names"][0][2]:,} names of the test part, none of whose strings the network has seen in training:

| | accuracy % | macro-F1 | top-3 % |
| --- | ---: | ---: | ---: |
{chr(10).join(lines)}

No function of the string can be right for more than {100 * found["ceiling"][0]:.1f} %.

## Limits

- Nearly half of the data is Russian, and some languages have under a hundred names. Recall is lowest for
  {", ".join(f"{language} ({100 * recalls[language][0]:.0f} %)" for language in worst)}.
- It knows no other languages, and gives every string to one of these.
- Names in other scripts than Latin hold no character that it reads, and are refused; Arabic, Chinese, Greek, Russian
  and others stand in the data in one romanisation each.
- A probability is that of a name drawn as the data draws them, with rare languages favoured by the recipe; it is
  neither the share of people of that name nor a certainty.
"""


def record(found: dict[str, Any]) -> None:
    """Replaces the pretrained network and its card by those of the first split."""
    target = pretrained_checkpoint()
    small = load_checkpoint(SCRATCH / "small0.safetensors")
    # The path of the data on the machine that trained the network tells nobody anything.
    small.info["split"]["data"]["source"] = "the names data set"
    target.parent.mkdir(exist_ok=True)
    save(target, small, torch.float16)
    CARD.write_text(card(found, target.stat().st_size), encoding="utf-8")


def main() -> None:
    parser = pages.parser(__doc__)
    parser.add_argument("--splits", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="splits side by side")
    parser.add_argument("--anew", action="store_true", help="forget what earlier runs finished")
    options: argparse.Namespace = parser.parse_args()
    if names().is_sample:
        parser.error("the study needs the names data set: set NAMERNN_FAST_DATA")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    if options.anew:
        for path in SCRATCH.glob("*.safetensors"):
            path.unlink()
    seeds = range(options.splits)
    version = code_version()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(run_split, seeds, [SCRATCH] * len(seeds), [version] * len(seeds)))
    found = summary(collect(seeds, SCRATCH))
    found["ngrams"] = dataclasses.asdict(NGRAMS)
    pages.publish("names", json.loads(json.dumps(found)), report(found), options.record, PAGE)
    if options.record:
        record(found)


if __name__ == "__main__":
    main()
