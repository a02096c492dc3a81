"""The programs that race, in the order of the tables."""

from benchmarks.classifier.application import Application
from benchmarks.classifier.program import Program
from benchmarks.classifier.with_torch import WithTorch

PROGRAMS: tuple[type[Program], ...] = (WithTorch, Application)
