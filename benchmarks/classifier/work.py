"""How many multiply-adds the results of the classifier need, by which the floor is told."""

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


def multiply_adds(
    counts: Counts, languages: int, training: bool, token_table: bool, shared_prefixes: bool
) -> int:
    """Returns the multiply-adds that the results need, in training the gradients too.

    Args:
        counts: of the names.
        languages: the number of classes.
        training: whether the gradients of all parameters are wanted.
        token_table: whether the input product is made once for each character of the alphabet.
        shared_prefixes: whether names that begin alike share their states.
    """
    states, first = counts.characters, counts.names
    if shared_prefixes:
        states, first = counts.prefixes, counts.first_characters
    inputs = len(ALPHABET) * counts.batches if token_table else counts.characters
    forward = inputs * EMBEDDING * HIDDEN + (states - first) * HIDDEN**2
    forward += counts.names * HIDDEN * languages
    # The backward pass multiplies each product's gradient with both of its factors.
    return 3 * forward if training else forward


def floor(
    counts: Counts, languages: int, training: bool, program: type[Program], peak: float
) -> float:
    """Returns the least seconds at `peak` operations a second, two for each multiply-add."""
    shortcuts = (program.token_table, program.shared_prefixes)
    return 2 * multiply_adds(counts, languages, training, *shortcuts) / peak
