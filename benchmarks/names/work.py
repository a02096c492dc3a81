"""Computes the classifier's floor: the minimum time for the multiply-adds that it requires."""

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.names.programs import EMBEDDING, HIDDEN, Program
from namernn_fast.names import ASCII


def count(texts: Sequence[str]) -> Counter[str]:
    """Counts the work for a batch of folded names, none of them empty.

    `characters` counts the states if names share none. `prefixes` counts the states if names share
    the states of common prefixes. `firsts` counts prefixes of a single character, which need no
    recurrent product.
    """
    prefixes = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    return Counter(
        batches=1,
        names=len(texts),
        characters=sum(map(len, texts)),
        prefixes=len(prefixes),
        firsts=len({text[0] for text in texts}),
    )


def count_batches(batches: Iterable[Sequence[str]]) -> Counter[str]:
    """Counts the work for batches that share no states with each other."""
    return sum(map(count, batches), Counter())


def floor(
    counts: Counter[str], languages: int, training: bool, program: type[Program], peak: float
) -> float:
    """Returns the minimum seconds of a program, from the multiply-adds that its results require.

    The program determines which states are shared. Training includes the gradients of all
    parameters. `peak` is in operations per second, and a multiply-add counts as two.
    """
    inputs, states, firsts = counts["characters"], counts["characters"], counts["names"]
    if program.shares:
        inputs = len(ASCII.alphabet) * counts["batches"]
        states, firsts = counts["prefixes"], counts["firsts"]
    forward = inputs * EMBEDDING * HIDDEN + (states - firsts) * HIDDEN**2
    forward += counts["names"] * HIDDEN * languages
    # The backward pass multiplies the gradient of each product by both factors.
    return 2 * (3 * forward if training else forward) / peak
