"""Baselines that a network must beat: language frequencies, and character n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files import require
from .splitting import Split

# Log-probability of a language without training names; finite, so that log losses stay finite.
_ABSENT = -50.0


@dataclass(frozen=True)
class NgramSettings:
    """The settings of the n-gram baseline."""

    longest: int = 4
    """The maximum length of an n-gram; a mark at an end of a name counts as a character."""
    weighted: bool = False
    """Whether to weight n-grams by TF-IDF: rare n-grams count more, and all names count equally."""
    inverse_penalty: float = 1.0
    """The parameter C of `sklearn.linear_model.LogisticRegression`."""
    prior_correction: float = 0.3
    """As in `Recipe.prior_correction`."""
    max_iterations: int = 500
    """The maximum number of iterations of the optimizer, L-BFGS."""
    tolerance: float = 1e-3
    """The tolerance of the optimizer."""


NGRAMS = NgramSettings()
"""The settings of the baseline that models are compared with, chosen on validation sets."""

WEIGHTED_NGRAMS = NgramSettings(longest=5, weighted=True, inverse_penalty=15.0)
"""Settings that are about as good as `NGRAMS`, with slightly better accuracy."""


class Scores(NamedTuple):
    """The log-probabilities of the languages for each name."""

    validation: Tensor
    """float64 (names of the validation set, languages)"""
    test: Tensor
    """float64 (names of the test set, languages)"""


def majority_baseline(split: Split) -> Scores:
    """Scores every name with the log frequencies of the languages in the training set."""
    priors = split.priors().log().clamp(min=_ABSENT)
    return Scores(
        priors.expand(len(split.validation), -1).clone(), priors.expand(len(split.test), -1).clone()
    )


def ngram_baseline(split: Split, settings: NgramSettings = NGRAMS) -> Scores:
    """Scores names with a logistic regression on character n-grams of the training set."""
    numpy, text = require("numpy"), require("sklearn.feature_extraction.text")
    linear = require("sklearn.linear_model")
    labels = split.train.labels
    if len(labels.unique()) < 2:
        return majority_baseline(split)
    vectorizer = text.TfidfVectorizer if settings.weighted else text.CountVectorizer
    counts = vectorizer(
        analyzer="char",
        ngram_range=(1, settings.longest),
        lowercase=False,
        # With float32 counts, the fit is a quarter faster. TF-IDF weights are float64.
        dtype=numpy.float64 if settings.weighted else numpy.float32,
    )
    regression = linear.LogisticRegression(
        C=settings.inverse_penalty, max_iter=settings.max_iterations, tol=settings.tolerance
    )
    regression.fit(counts.fit_transform(_marked(split.train.texts)), labels.numpy())
    correction = settings.prior_correction * split.log_priors()

    def scores(texts: Sequence[str]) -> Tensor:
        found: Any = regression.predict_log_proba(counts.transform(_marked(texts)))
        result = torch.full((len(texts), len(split.languages)), _ABSENT, dtype=torch.float64)
        present = torch.as_tensor(regression.classes_)
        result[:, present] = torch.as_tensor(found).double() - correction[present]
        return result.log_softmax(1)

    return Scores(scores(split.validation.texts), scores(split.test.texts))


def _marked(texts: Sequence[str]) -> list[str]:
    """Returns the texts with a mark at each end; folded names never contain these marks."""
    return [f"^{text}$" for text in texts]
