"""The floor of the classifier: the time for the multiply-adds that its results need."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from benchmarks.classifier.program import EMBEDDING, HIDDEN, Program
from namernn_fast.names import ALPHABET


@dataclass(frozen=True)
class Counts:
    """What there is to compute for names, with and without sharing."""

    names: int
    characters: int
    """The states, where each name has its own."""
    prefixes: int
    """The distinct beginnings of names: the states, where equal beginnings share them."""
    first_characters: int
    """The distinct first characters, whose states have no state before them."""
    batches: int = 1
    """How often all this is computed with the same weights."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count(texts: Sequence[str]) -> Counts:
    """Counts a batch of folded names, none of them empty."""
    letters = np.sort(np.array(texts, dtype="S")).view(np.uint8).reshape(len(texts), -1)
    # In their order, a name shares most with the name before it.
    equal = (letters[1:] == letters[:-1]) & (letters[1:] != 0)
    characters = np.count_nonzero(letters)
    shared = np.logical_and.accumulate(equal, axis=1).sum()
    return Counts(
        len(texts), int(characters), int(characters - shared), len(np.unique(letters[:, 0]))
    )


def count_batches(batches: Iterable[Sequence[str]]) -> Counts:
    """Counts batches that share nothing with each other."""
    first, *others = map(count, batches)
    return sum(others, first)


def floor(
    counts: Counts, languages: int, training: bool, program: type[Program], peak: float
) -> float:
    """Returns the least seconds of a program, by the multiply-adds that its results need.

    Args:
        counts: of the names.
        languages: the number of classes.
        training: whether the gradients of all parameters are wanted.
        program: decides what equal characters and equal beginnings of names share.
        peak: operations a second, two for each multiply-add.
    """
    inputs, states, first = counts.characters, counts.characters, counts.names
    if program.shares:
        inputs = len(ALPHABET) * counts.batches
        states, first = counts.prefixes, counts.first_characters
    forward = inputs * EMBEDDING * HIDDEN + (states - first) * HIDDEN**2
    forward += counts.names * HIDDEN * languages
    # The backward pass multiplies each product's gradient with both of its factors.
    return 2 * (3 * forward if training else forward) / peak
