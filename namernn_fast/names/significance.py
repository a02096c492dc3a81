"""Confidence intervals of metrics, and paired tests of the difference between two classifiers.

Array arguments may be tensors, NumPy arrays or lists. SciPy computes the exact distributions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import require

CONFIDENCE = 0.95
"""The confidence level of all intervals."""

RESAMPLES = 10_000
"""The default number of resamples of a bootstrap."""

_CHUNK = 100  # resamples drawn at once, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Proportion(Interval):
    """A proportion with its Wilson confidence interval."""

    hits: int
    count: int


@dataclass(frozen=True)
class Difference(Interval):
    """A difference between two classifiers, the second minus the first."""

    p_value: float
    """The two-sided p-value of the hypothesis that there is no difference."""


@dataclass(frozen=True)
class McNemar:
    """The result of an exact McNemar test of whether two classifiers have the same error rate."""

    only_first: int
    """The number of names that only the first classifier gets right."""
    only_second: int
    p_value: float


@dataclass(frozen=True)
class LabelledPredictions:
    """A classifier's predictions for some names, and the labels of these names."""

    labels: Any
    """int64 (number of names), the index of each name's language"""
    predictions: Any
    """int64 (number of names), the index of the predicted language"""
    units: Sequence[Hashable] | None = None
    """The unit that each name belongs to: names of one unit are drawn together. If None, each name
    is a separate unit. Use the names' strings as units if a string has several languages, or if the
    test sets of several splits share strings."""


def proportion(hits: int, count: int) -> Proportion | None:
    """Returns the fraction `hits / count` with its Wilson interval, or None if `count` is 0."""
    if count == 0:
        return None
    test = require("scipy.stats").binomtest(int(hits), int(count))
    ends = test.proportion_ci(CONFIDENCE, method="wilson")
    return Proportion(hits / count, float(ends.low), float(ends.high), int(hits), int(count))


def mcnemar(labels: Any, first: Any, second: Any) -> McNemar:
    """Runs the exact McNemar test of two classifiers on the same names.

    Args:
        labels: int64 (number of names), the index of each name's language.
        first, second: int64 (number of names), the predictions of each classifier.
    """
    labels = torch.as_tensor(labels)
    first_hits, second_hits = torch.as_tensor(first) == labels, torch.as_tensor(second) == labels
    only_first = int((first_hits & ~second_hits).sum())
    only_second = int((second_hits & ~first_hits).sum())
    p_value = 1.0
    if count := only_first + only_second:
        p_value = float(require("scipy.stats").binomtest(only_first, count, 0.5).pvalue)
    return McNemar(only_first, only_second, p_value)


def bootstrap(
    predictions: LabelledPredictions, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, Interval]:
    """Returns the accuracy and the macro-F1 of a classifier with their percentile intervals."""
    values, drawn = _resampled([predictions], resamples, seed)
    accuracy, macro_f1 = (
        Interval(value, *_percentiles(column))
        for value, column in zip(values[0].tolist(), drawn[0].unbind(1), strict=True)
    )
    return accuracy, macro_f1


def paired_bootstrap(
    first: Sequence[LabelledPredictions],
    second: Sequence[LabelledPredictions],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Difference, Difference]:
    """Tests two classifiers on the same names, in one or more splits.

    Each resample draws units (see `LabelledPredictions`) with replacement, and averages the
    difference between the classifiers over the splits. A unit that is in several test sets is drawn
    into all of them, so names that the splits share are not counted as independent.
    Unlike `corrected_t_test`, this test does not include the variance from training.

    Args:
        first, second: the predictions of each classifier for each split, in the same order and for
            the same names.
        resamples: the number of resamples.
        seed: the seed of the draws.

    Returns:
        The differences in accuracy and in macro-F1, second classifier minus first, with percentile
        intervals.

    Raises:
        ValueError: the classifiers have predictions for different names.
    """
    for left, right in zip(first, second, strict=True):
        if not torch.equal(torch.as_tensor(left.labels), torch.as_tensor(right.labels)):
            raise ValueError("the two classifiers have predictions for different names")
    values, drawn = _resampled([*first, *second], resamples, seed)
    count = len(first)
    value = (values[count:] - values[:count]).mean(0)
    differences = (drawn[count:] - drawn[:count]).mean(0)
    accuracy, macro_f1 = (
        Difference(value, *_percentiles(column), _two_sided(column))
        for value, column in zip(value.tolist(), differences.unbind(1), strict=True)
    )
    return accuracy, macro_f1


def corrected_t_test(differences: Sequence[float], test_to_train: float) -> Difference:
    """Runs a t-test on the mean difference over several random splits of the same data.

    The variance is corrected for the names that the splits share (Nadeau and Bengio,
    "Inference for the generalization error", Machine Learning 52, 2003).

    Args:
        differences: the difference in each split, for at least two splits.
        test_to_train: the size of the test set divided by the size of the training set.

    Raises:
        ValueError: there are fewer than two differences.
    """
    if len(differences) < 2:
        raise ValueError("a t test needs the differences of at least two splits")
    values = torch.tensor(differences, dtype=torch.float64)
    mean, count = values.mean().item(), len(values)
    error = math.sqrt(values.var().item() * (1 / count + test_to_train))
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    distribution = require("scipy.stats").t(count - 1)
    half = error * float(distribution.ppf((1 + CONFIDENCE) / 2))
    p_value = 2 * float(distribution.sf(abs(mean) / error))
    return Difference(mean, mean - half, mean + half, p_value)


def _resampled(
    results: Sequence[LabelledPredictions], resamples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Bootstraps all results; each resample draws the same units for every result.

    Returns:
        The accuracy and macro-F1 of each result, float64 (results, 2), and of its resamples,
        float64 (results, resamples, 2).
    """
    numbers: dict[Hashable, int] = {}
    tables = []
    classes = 1 + max(
        int(torch.as_tensor(values).max())
        for result in results
        for values in (result.labels, result.predictions)
    )
    for result in results:
        counts = _counts(result, classes)
        units = range(len(counts)) if result.units is None else result.units
        if len(units) != len(counts):
            raise ValueError(f"got {len(units)} units for {len(counts)} names")
        tables.append((torch.tensor([numbers.setdefault(u, len(numbers)) for u in units]), counts))
    totals = [
        torch.zeros(len(numbers), counts.shape[1]).index_add_(0, places, counts)
        for places, counts in tables
    ]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for begin in range(0, resamples, _CHUNK):
        shape = (min(_CHUNK, resamples - begin), len(numbers))
        indices = torch.randint(len(numbers), shape, generator=generator)
        weights = torch.zeros(shape).scatter_add_(1, indices, torch.ones(shape))
        # The products are sums of whole numbers, so float32 is exact up to 2**24 names.
        drawn.append(torch.stack([_statistics(weights @ total) for total in totals]))
    return torch.stack([_statistics(total.sum(0)) for total in totals]), torch.cat(drawn, 1)


def _counts(result: LabelledPredictions, classes: int) -> Tensor:
    """Returns one row per name: the one-hot label, the one-hot prediction, and their product."""
    labelled = F.one_hot(torch.as_tensor(result.labels), classes)
    predicted = F.one_hot(torch.as_tensor(result.predictions), classes)
    return torch.cat([labelled, predicted, labelled * predicted], 1).float()


def _statistics(counts: Tensor) -> Tensor:
    """Returns accuracy and macro-F1 (…, 2) from sums of the rows of `_counts` (…, 3 * classes).

    The macro-F1 is the mean over the languages with at least one name.
    """
    labelled, predicted, right = counts.double().chunk(3, -1)
    accuracy = right.sum(-1) / labelled.sum(-1).clamp(min=1)
    f1 = 2 * right / (labelled + predicted).clamp(min=1)
    present = labelled > 0
    macro_f1 = (f1 * present).sum(-1) / present.sum(-1).clamp(min=1)
    return torch.stack([accuracy, macro_f1], -1)


def _percentiles(values: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def _two_sided(differences: Tensor) -> float:
    """Returns the two-sided p-value for a difference of 0, computed from resampled differences."""
    tails = (differences <= 0).sum(), (differences >= 0).sum()
    # Counts the observed sample as one draw, so a p-value is never 0.
    return min(2 * (int(min(tails)) + 1) / (len(differences) + 1), 1.0)
