"""The floor of the classifier: the time for the multiply-adds that its results require."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from benchmarks.classifier.program import EMBEDDING, HIDDEN, Program
from namernn_fast.names import ASCII


@dataclass(frozen=True)
class Counts:
    """The amount of work for names, with and without sharing."""

    names: int
    characters: int
    """The number of states if each name has its own."""
    prefixes: int
    """The number of distinct prefixes of names, and of states if common prefixes share them."""
    first_characters: int
    """The number of distinct first characters, which need no recurrent product."""
    batches: int = 1
    """The number of batches, each with its own weights."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count(texts: Sequence[str]) -> Counts:
    """Counts a batch of folded names, none of them empty."""
    letters = np.sort(np.array(texts, dtype="S")).view(np.uint8).reshape(len(texts), -1)
    # In sorted order, a name shares its longest prefix with the previous name.
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
    """Returns the minimum seconds of a program, from the multiply-adds that its results require.

    Args:
        counts: The counts of the names.
        languages: The number of classes.
        training: Whether to include the gradients of all parameters.
        program: The program, which determines what is shared.
        peak: Operations per second; a multiply-add counts as two.
    """
    inputs, states, first = counts.characters, counts.characters, counts.names
    if program.shares:
        inputs = len(ASCII.alphabet) * counts.batches
        states, first = counts.prefixes, counts.first_characters
    forward = inputs * EMBEDDING * HIDDEN + (states - first) * HIDDEN**2
    forward += counts.names * HIDDEN * languages
    # The backward pass multiplies the gradient of each product by both factors.
    return 2 * (3 * forward if training else forward) / peak
