"""Evaluates classifiers on names whose languages are known.

Array arguments may be tensors, NumPy arrays or lists. scikit-learn counts the confusion matrix.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import require
from .significance import (
    RESAMPLES,
    Interval,
    LabelledPredictions,
    Proportion,
    bootstrap,
    proportion,
)

BINS = 15
"""The number of bins of the expected calibration error (Guo et al., arXiv:1706.04599)."""


@dataclass(frozen=True)
class LanguageScores:
    """The metrics of one language."""

    language: str
    names: int
    """The number of names with this language."""
    predicted: int
    """The number of names predicted as this language."""
    precision: Proportion | None
    """The fraction of `predicted` that is correct; None if `predicted` is 0."""
    recall: Proportion | None
    """The fraction of `names` that is predicted correctly; None if `names` is 0."""
    f1: float


@dataclass(frozen=True)
class Bin:
    """A calibration bin: the names whose highest probability is above `low` and at most `high`."""

    low: float
    high: float
    names: int
    confidence: float | None
    """The mean probability of the most probable language; None if the bin has no names."""
    accuracy: Proportion | None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a classifier. All intervals are 95 % confidence intervals."""

    names: int
    accuracy: Proportion
    macro_f1: Interval
    """The mean F1 of the languages with at least one name, with a bootstrap interval."""
    top3: Proportion
    """The fraction of names whose language is among the three most probable."""
    log_loss: float
    """The mean negative natural logarithm of the correct language's probability."""
    brier: float
    """The mean over names of the summed squared errors of the probabilities, from 0 to 2."""
    calibration_error: float
    """The expected calibration error of the most probable language, in `BINS` equal bins."""
    calibration: tuple[Bin, ...]
    languages: tuple[LanguageScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """The confusion matrix: counts of names by true language (row) and prediction (column)."""


def evaluate(
    labels: Any,
    scores: Any,
    languages: Sequence[str],
    *,
    units: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Returns the metrics of a classifier.

    Args:
        labels: int64 (number of names), the index of each name's language.
        scores: float (number of names, number of languages), log-probabilities or logits.
        languages: the names of the languages.
        units: as in `LabelledPredictions`, for the bootstrap.
        resamples: the number of resamples of the bootstrap.

    Raises:
        ValueError: the shapes do not agree, there is no name, or a score is not finite.
    """
    labels = torch.as_tensor(labels)
    log_probabilities = torch.as_tensor(scores).double().log_softmax(-1)
    if log_probabilities.shape != (len(labels), len(languages)) or len(labels) == 0:
        raise ValueError(
            f"{len(labels)} labels of {len(languages)} languages do not match scores of "
            f"shape {tuple(log_probabilities.shape)}"
        )
    if not log_probabilities.isfinite().all():
        raise ValueError("the scores must be finite")
    predictions = log_probabilities.argmax(1)
    probabilities = log_probabilities.exp()
    bins = _calibration(labels, probabilities)
    labelled = LabelledPredictions(labels, predictions, units)
    confusion = require("sklearn.metrics").confusion_matrix(
        labels.numpy(), predictions.numpy(), labels=range(len(languages))
    )
    top3 = log_probabilities.topk(min(3, len(languages))).indices == labels.unsqueeze(1)
    return Evaluation(
        names=len(labels),
        accuracy=_share(predictions == labels),
        macro_f1=bootstrap(labelled, resamples=resamples)[1],
        top3=_share(top3.any(1)),
        log_loss=F.nll_loss(log_probabilities, labels).item(),
        brier=(probabilities - F.one_hot(labels, len(languages))).square().sum(1).mean().item(),
        calibration_error=sum(
            bin.names / len(labels) * abs(bin.accuracy.value - bin.confidence)
            for bin in bins
            if bin.accuracy is not None and bin.confidence is not None
        ),
        calibration=bins,
        languages=_of_languages(confusion, languages),
        confusion=tuple(map(tuple, confusion.tolist())),
    )


def best_hits(texts: Sequence[Hashable], labels: Iterable[int]) -> int:
    """Returns the maximum number of names that a classifier can predict correctly from the string.

    A classifier predicts one language per string, so at best it is correct for the names of the
    string's most frequent language.
    """
    languages: defaultdict[Hashable, Counter[int]] = defaultdict(Counter)
    for text, label in zip(texts, labels, strict=True):
        languages[text][label] += 1
    return sum(max(counts.values()) for counts in languages.values())


def _share(hits: Tensor) -> Proportion:
    share = proportion(int(hits.sum()), len(hits))
    assert share is not None  # `evaluate` has checked that there is a name
    return share


def _of_languages(confusion: Any, languages: Sequence[str]) -> tuple[LanguageScores, ...]:
    numbers = (confusion.sum(1), confusion.sum(0), confusion.diagonal())
    counts = zip(languages, *(each.tolist() for each in numbers), strict=True)
    return tuple(
        LanguageScores(
            language=language,
            names=names,
            predicted=predicted,
            precision=proportion(right, predicted),
            recall=proportion(right, names),
            f1=2 * right / max(names + predicted, 1),
        )
        for language, names, predicted, right in counts
    )


def _calibration(labels: Tensor, probabilities: Tensor) -> tuple[Bin, ...]:
    confidences, predictions = probabilities.max(1)
    # Each bin includes its upper end, so that a probability of 1 is in the last bin.
    places = (confidences * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    for place in range(BINS):
        inside = places == place
        hits = predictions[inside] == labels[inside]
        confidence = confidences[inside].mean().item() if len(hits) else None
        bins.append(
            Bin(
                low=place / BINS,
                high=(place + 1) / BINS,
                names=len(hits),
                confidence=confidence,
                accuracy=proportion(int(hits.sum()), len(hits)),
            )
        )
    return tuple(bins)
