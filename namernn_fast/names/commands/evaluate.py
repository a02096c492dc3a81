"""`evaluate`: evaluates a model on names that it was not trained on."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..baselines import NGRAMS, majority_baseline, ngram_baseline
from ..checkpoint import WEAK_RECALL, Checkpoint, recorded, versions
from ..dataset import embedded_sample
from ..evaluation import Evaluation, LanguageScores, best_hits, evaluate
from ..figures import draw_calibration, draw_confusion_matrix, draw_learning_curves
from ..files import check_no_overwrite, check_replaceable, require
from ..formatting import Entry, aligned, with_mark
from ..prediction import logits
from ..report import leak
from ..significance import (
    Difference,
    Interval,
    LabelledPredictions,
    McNemar,
    mcnemar,
    paired_bootstrap,
)
from ..splitting import LabelledNames, Split, split
from ..text import InputError, escaped
from ..training import read_epochs
from . import arguments as options
from .arguments import path

_FIGURES = ("confusion_matrix.png", "learning_curves.png", "calibration.png")


def add_parser(commands: Any) -> None:
    """Adds the command `evaluate` to the command line."""
    parser = options.add_parser(
        commands, "evaluate", run, "measure how good a model is on names that it has not seen"
    )
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument(
        "--part",
        choices=("test", "validation"),
        default="test",
        help="the part of the model's split; use the test part once, after all choices are made",
    )
    parser.add_argument(
        "--no-ngrams",
        action="store_true",
        help="skip the baseline of character n-grams, which takes seconds to fit",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write all results as JSON")
    parser.add_argument(
        "--figures", type=path, metavar="FOLDER", help=f"write {', '.join(_FIGURES)}"
    )


@dataclass(frozen=True)
class _Comparison:
    """Paired tests that compare the n-gram baseline (first) with the model (second)."""

    mcnemar: McNemar
    accuracy: Difference
    macro_f1: Difference


@dataclass(frozen=True)
class _Results:
    """The results of all classifiers on one part of the split."""

    part: str
    split: dict[str, Any]
    ceiling: float
    """The best accuracy that any function of the string can reach."""
    evaluations: dict[str, Evaluation]
    comparison: _Comparison | None
    ngram_seconds: float | None


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the model, prints the results, and writes the files that the options name."""
    require("sklearn")
    if arguments.figures is not None:
        require("matplotlib")
    # Check the paths first, so that a bad path fails before the evaluation, not after it.
    targets = _targets(arguments)
    check_no_overwrite(
        targets, [("--checkpoint", arguments.checkpoint), *options.data_files(arguments)]
    )
    for _, target in targets:
        check_replaceable(target)
    checkpoint = options.load_predictor(arguments).checkpoint
    parts = _recorded_split(checkpoint, arguments)
    if parts.info["method"] == "random" and arguments.part == "test":
        options.say(
            f"the split is random: {leak(parts)['strings']:.1%} of the test part are names that "
            "the training or the validation part has too"
        )
    results = _results(checkpoint, parts, arguments)
    _print(results)
    if arguments.json is not None:
        _write(arguments.json, checkpoint, results)
    if arguments.figures is not None:
        _draw(arguments.figures, checkpoint, results)


def _targets(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    targets = [] if arguments.json is None else [("--json", arguments.json)]
    if (folder := arguments.figures) is not None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a folder")
        targets += [("--figures", folder / name) for name in _FIGURES]
    return targets


def _recorded_split(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Split:
    """Returns the split that the model was trained on, recreated from the data.

    Raises:
        InputError: the model was trained on other data or another split, so names of the test set
            may have been training names.
    """
    kinds = {"method": str, "seed": int, "validation": float, "test": float, "sha256": str}
    kinds |= {"data source": str, "data sha256": str, "data rows": int}
    record: Any = checkpoint.info.get("split")
    if any(recorded(record, kind, *keys.split()) is None for keys, kind in kinds.items()):
        raise InputError("the checkpoint does not record the data and split of its training")
    is_embedded = arguments.data is None and checkpoint.is_sample()
    data = embedded_sample() if is_embedded else options.load_data(arguments)
    wanted = record["data"]
    if data.sha256 != wanted["sha256"]:
        raise InputError(
            f"{data.source}: not the data that the model was trained on, so any of these names may "
            f"be training names; the SHA-256 is {data.sha256[:16]}…, not {wanted['sha256'][:16]}… "
            f"({wanted['rows']} rows from {wanted['source']:.200}): pass that data with --data, or "
            "a model trained on this data with --checkpoint (default: the pretrained model)"
        )
    drawn = {name: record[name] for name in ("method", "seed", "validation", "test")}
    parts = split(data, folding=checkpoint.folding, **drawn)
    if parts.languages != checkpoint.languages:
        raise InputError("the languages of the model differ from the languages of its data")
    if parts.info["sha256"] != record["sha256"]:
        raise InputError(
            "this version splits the data differently from the one that trained the model: train "
            "the model again"
        )
    return parts


def _results(checkpoint: Checkpoint, parts: Split, arguments: argparse.Namespace) -> _Results:
    part: LabelledNames = getattr(parts, arguments.part)
    scores: dict[str, Tensor] = {"majority": getattr(majority_baseline(parts), arguments.part)}
    seconds = None
    if not arguments.no_ngrams:
        options.say("fitting the baseline of character n-grams; --no-ngrams skips it")
        started = time.perf_counter()
        scores["n-grams"] = getattr(ngram_baseline(parts), arguments.part)
        seconds = time.perf_counter() - started
    scores["model"] = logits(checkpoint.model, part.names)
    if not scores["model"].isfinite().all():
        raise InputError("the model is damaged: its scores are not finite")
    evaluations = {
        name: evaluate(part.labels, values, parts.languages, units=part.texts)
        for name, values in scores.items()
    }
    comparison = None
    if "n-grams" in scores:
        ngrams, model = (
            LabelledPredictions(part.labels, scores[name].argmax(1), part.texts)
            for name in ("n-grams", "model")
        )
        accuracy, macro_f1 = paired_bootstrap([ngrams], [model])
        test = mcnemar(part.labels, ngrams.predictions, model.predictions)
        comparison = _Comparison(test, accuracy, macro_f1)
    return _Results(
        part=arguments.part,
        split=parts.info,
        ceiling=best_hits(part.texts, part.labels.tolist()) / len(part),
        evaluations=evaluations,
        comparison=comparison,
        ngram_seconds=seconds,
    )


def _print(results: _Results) -> None:
    model, info = results.evaluations["model"], results.split
    print(
        f"{model.names:,} names of the {results.part} part; split {info['method']}, seed "
        f"{info['seed']}, SHA-256 {info['sha256'][:16]}…; intervals of 95 %\n"
    )
    header = ("", "accuracy %", "macro-F1", "top-3 %", "log loss", "Brier", "calibr. error")
    rows: list[list[Entry]] = [
        ["ceiling", f"{100 * results.ceiling:.1f}", *([None] * (len(header) - 2))],
        *(_row(name, evaluation) for name, evaluation in results.evaluations.items()),
    ]
    print(aligned(header, rows))
    if (tests := results.comparison) is not None:
        print(
            "\nThe model minus the n-grams, on the same names:\n"
            f"  accuracy {_difference(tests.accuracy, 100)} points, bootstrap "
            f"p = {tests.accuracy.p_value:.2g}\n"
            f"  macro-F1 {_difference(tests.macro_f1, 1)}, bootstrap "
            f"p = {tests.macro_f1.p_value:.2g}\n"
            f"  only the model gets {tests.mcnemar.only_second:,} names right, only the n-grams "
            f"{tests.mcnemar.only_first:,}: exact McNemar p = {tests.mcnemar.p_value:.2g}"
        )
    print(f"\nThe model by language; weak: a recall below {WEAK_RECALL:.0%}\n")
    columns = ("language", "names", "predicted", "precision %", "recall %", "F1")
    languages: list[list[Entry]] = [
        [
            with_mark(scores.language, weak=_is_weak(scores)),
            scores.names,
            scores.predicted,
            _percent(scores.precision),
            _percent(scores.recall),
            scores.f1,
        ]
        for scores in model.languages
    ]
    print(aligned(columns, languages), flush=True)


def _row(name: str, evaluation: Evaluation) -> list[Entry]:
    macro_f1 = evaluation.macro_f1
    return [
        name,
        _percent(evaluation.accuracy),
        f"{macro_f1.value:.3f} ({macro_f1.low:.3f} to {macro_f1.high:.3f})",
        _percent(evaluation.top3),
        evaluation.log_loss,
        evaluation.brier,
        evaluation.calibration_error,
    ]


def _is_weak(scores: LanguageScores) -> bool:
    return scores.recall is not None and scores.recall.value < WEAK_RECALL


def _percent(share: Interval | None) -> str | None:
    if share is None:
        return None
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _difference(difference: Difference, factor: float) -> str:
    digits = 1 if factor == 100 else 3
    value, low, high = (
        f"{factor * number:+.{digits}f}"
        for number in (difference.value, difference.low, difference.high)
    )
    return f"{value} ({low} to {high})"


def _write(target: Path, checkpoint: Checkpoint, results: _Results) -> None:
    """Writes all results as JSON, with the split, the model's options and the package versions."""
    content = {
        "part": results.part,
        "split": results.split,
        "model": {
            "options": checkpoint.model.config,
            **{name: value for name, value in checkpoint.info.items() if name != "split"},
        },
        "ngrams": None
        if results.ngram_seconds is None
        else {**asdict(NGRAMS), "seconds": results.ngram_seconds},
        "versions": {**versions(), "scikit-learn": require("sklearn").__version__},
        "ceiling": results.ceiling,
        "evaluations": {
            name: asdict(evaluation) for name, evaluation in results.evaluations.items()
        },
        "model_minus_ngrams": results.comparison and asdict(results.comparison),
    }
    # A checkpoint may record NaN and infinity, which JSON lacks; both become null.
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    options.write_text(target, json.dumps(content, indent=1))


def _draw(folder: Path, checkpoint: Checkpoint, results: _Results) -> None:
    """Draws the figures for which there is data."""
    matrix, curves, calibration = (folder / name for name in _FIGURES)
    shown = {name: found for name, found in results.evaluations.items() if name != "majority"}
    title = f"{results.evaluations['model'].names:,} names of the {results.part} part"
    draw_confusion_matrix(matrix, results.evaluations["model"], f"The model on {title}")
    drawn = [matrix, calibration]
    try:
        epochs = read_epochs(checkpoint.info.get("history"))
    except (TypeError, ValueError):
        options.say("the checkpoint records no epochs, so there are no learning curves")
    else:
        draw_learning_curves(curves, epochs, "Training of the model")
        drawn.append(curves)
    draw_calibration(calibration, shown, f"Calibration on {title}")
    for figure in drawn:
        print(f"wrote {escaped(str(figure))}")
