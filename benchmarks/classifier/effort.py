"""How much a run measures: a run to record, a usual run, or a trial run that takes seconds."""

import argparse
from dataclasses import dataclass, replace

from benchmarks.classifier.with_torch import SETTINGS, Settings
from namernn_fast.bench.race import QUICK, TimeBudget


@dataclass(frozen=True)
class Effort:
    """The sizes of a run."""

    corpus: int | None
    """The number of names from the data; None for all."""
    batches: tuple[int, ...]
    """Names per training batch."""
    stretch: int
    """Names per stretch of an epoch; at least two batches."""
    gate: dict[int, int]
    """The number of steps with checked losses, by batch size."""
    gate_labels: int
    """The number of names with checked labels."""
    many: int
    """The number of made-up names for prediction with all threads."""
    fewer: int
    """The number of made-up names for prediction with one thread, and for measuring memory."""
    settings: tuple[Settings, ...]
    """The settings that the user's program tries."""
    budget: TimeBudget
    """The time of each race."""
    fresh: bool
    """Whether memory is measured in fresh processes, which take seconds to import torch."""
    is_whole: bool
    """Whether times on one thread and memory are measured too."""

    def within(self, names: int) -> "Effort":
        """Returns the effort adapted to data with `names` names.

        A stretch is limited to all names, and batches to half of them: the embedded sample is too
        small for the large batches.
        """
        batches = tuple(batch for batch in self.batches if 2 * batch <= names)
        return replace(self, stretch=min(self.stretch, names), batches=batches)


TRIAL = Effort(
    corpus=600,
    batches=(16, 64),
    stretch=64,
    gate={16: 20},
    gate_labels=600,
    many=100_000,
    fewer=5_000,
    settings=tuple(settings for settings in SETTINGS if settings.workers == 0),
    budget=QUICK,
    fresh=False,
    is_whole=True,
)


def effort_of(options: argparse.Namespace) -> Effort:
    """Returns the effort for the options `--seconds`, `--quick` and `--record`."""
    if options.quick:
        return TRIAL
    recorded = Effort(
        corpus=None,
        batches=(16, 64, 256, 1024),
        stretch=1024,
        gate={16: 100, 128: 100},
        gate_labels=5_000,
        many=300_000,
        fewer=100_000,
        settings=SETTINGS,
        # A round is one stretch or one pass over the names, never several.
        budget=TimeBudget(options.seconds, warmup_seconds=0, round_seconds=0, max_rounds=40),
        fresh=True,
        is_whole=True,
    )
    if options.record:
        return recorded
    return replace(recorded, batches=(64,), many=50_000, fewer=20_000, is_whole=False)
