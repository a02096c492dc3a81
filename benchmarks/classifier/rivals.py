"""The programs that race, and what they are to start from."""

from benchmarks.classifier.before import Before
from benchmarks.classifier.now import Now
from benchmarks.classifier.program import Program
from benchmarks.classifier.shortcuts import Both, LastState, SharedPrefixes, TokenTable
from benchmarks.classifier.with_torch import WithTorch

PROGRAMS: tuple[type[Program], ...] = (
    WithTorch,
    Before,
    TokenTable,
    LastState,
    Both,
    SharedPrefixes,
    Now,
)
"""All programs, in the order of the tables."""

MAIN: tuple[type[Program], ...] = (WithTorch, Before, Now)
"""The programs that a user can have; the others show the shortcuts by themselves."""
