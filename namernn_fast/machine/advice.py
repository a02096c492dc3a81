"""Collects facts about this installation and machine, and derives advice on making calls faster.

Collects only facts that users can act on. docs/performance.md says how much each affects speed.
"""

import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from . import availability

WIDTH = 88
CROWDED = 2
"""The load per processor above which one thread was faster than two in all measured calls."""


@dataclass(frozen=True)
class Facts:
    """The facts that the advice is based on."""

    has_extension: bool
    threads: int
    """The number of torch threads."""
    usable: int
    """The number of processors that this process may use."""
    processors: int
    """The number of processors of the machine."""
    load: float | None
    """The average number of runnable processes over the last minute; None if unknown."""
    is_passive: bool
    """Whether OMP_WAIT_POLICY makes waiting threads sleep at once."""
    has_openmp: bool
    """Whether torch uses OpenMP threads."""
    gpu_trouble: str | None
    """Why the GPU kernels cannot run on the GPU that torch sees; None if they can or there is no
    GPU."""


def gather() -> Facts:
    """Collects the facts about this installation and machine."""
    return Facts(
        has_extension=availability.HAS_EXTENSION,
        threads=torch.get_num_threads(),
        usable=usable_processors(),
        processors=os.cpu_count() or 1,
        load=_load(),
        is_passive=os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive",
        has_openmp=torch.backends.openmp.is_available(),
        gpu_trouble=_gpu_trouble(),
    )


def advise(facts: Facts) -> list[str]:
    """Returns paragraphs of advice with reasons, or an empty list if nothing is known to help."""
    advice = []
    if not facts.has_extension:
        advice.append(
            f"To get the fused kernel, {availability.REINSTALL}. Without the C++ extension every "
            "input on a CPU runs step by step in PyTorch operators, hardly faster than nn.RNN."
        )
    if facts.threads > facts.usable:
        advice.append(
            f"Set OMP_NUM_THREADS={facts.usable}, or call torch.set_num_threads({facts.usable}): "
            f"torch has {facts.threads} threads, but this process may use only {facts.usable} "
            "processor(s). The threads wait for each other at every step, and then for a processor "
            "as well."
        )
    advice += _on_waiting(facts)
    if facts.gpu_trouble is not None:
        advice.append(f"Calls on the GPU run without a kernel. {facts.gpu_trouble}.")
    return advice


def _on_waiting(facts: Facts) -> list[str]:
    """Returns advice on the number of threads and on OMP_WAIT_POLICY, based on the load."""
    if facts.threads < 2 or facts.load is None:
        return []
    busy = f"the load is {facts.load:.1f} on {facts.processors} processor(s)"
    if facts.load > CROWDED * facts.processors:
        return [
            f"Use fewer threads while other programs run, for example OMP_NUM_THREADS=1: {busy}, "
            "and threads that wait for each other all need a processor at the same time."
        ]
    if facts.has_openmp and facts.is_passive and facts.load < facts.processors / 2:
        return [
            f"Unset OMP_WAIT_POLICY=passive if this process has the machine to itself: {busy}, and "
            "waking sleeping threads takes longer than a small call."
        ]
    return []


def is_busy(facts: Facts) -> bool:
    """Returns whether more processes are runnable than there are processors."""
    # One program that has just used all processors may cause a load equal to `processors`.
    return facts.load is not None and facts.load > 1.1 * facts.processors


def wrapped(text: str) -> str:
    """Wraps a paragraph of advice for a terminal."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", initial_indent="- ", break_on_hyphens=False
    )


def usable_processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many processors this process may use, including the limit of its container.

    Args:
        cgroup: the folder of Linux control groups, version 2 or 1, whose files hold that limit.
    """
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return allowed
    if not (quota.isdecimal() and period.isdecimal()):  # "max", or -1: no limit
        return allowed
    return max(1, min(allowed, math.ceil(int(quota) / int(period))))


def _load() -> float | None:
    """Returns the load average over the last minute, or None if the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _gpu_trouble() -> str | None:
    """Returns why the current GPU cannot run the GPU kernels; None if it can or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    why_not = availability.why_not_triton(torch.device("cuda", torch.cuda.current_device()))
    return why_not and why_not[:1].upper() + why_not[1:]
