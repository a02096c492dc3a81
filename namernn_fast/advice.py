"""What would make this installation faster on this machine: facts first, then advice from them.

Only facts that change what someone does are here; docs/performance.md has what they cost.
"""

import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from . import availability

WIDTH = 88


@dataclass(frozen=True)
class Facts:
    """What the advice follows from."""

    has_extension: bool
    threads: int
    """Threads of torch."""
    usable: int
    """Processors that this process may use."""
    processors: int
    """Processors of the machine."""
    load: float | None
    """Processes that have been running or ready to run in the last minute; None if unknown."""
    is_passive: bool
    """Whether OMP_WAIT_POLICY lets threads sleep at once where they wait."""
    has_openmp: bool
    """Whether torch's threads are those of OpenMP."""
    gpu_trouble: str | None
    """Why the GPU kernels cannot run on a GPU that torch sees; None if they can, or without one."""


def gather() -> Facts:
    """Looks the facts up."""
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
    """Returns advice with its reasons, a paragraph each; none where nothing is known to help."""
    found = []
    if not facts.has_extension:
        found.append(
            f"To have the fused kernel, {availability.REINSTALL}. Without the C++ extension every "
            "input on a CPU takes ATen operators step by step, which is hardly faster than nn.RNN."
        )
    if facts.threads > facts.usable:
        found.append(
            f"Set OMP_NUM_THREADS={facts.usable}, or call torch.set_num_threads({facts.usable}): "
            f"torch has {facts.threads} threads, and this process may use {facts.usable} "
            "processor(s). Threads that wait for each other at every step then wait for a "
            "processor as well."
        )
    found += _on_waiting(facts)
    if facts.gpu_trouble is not None:
        found.append(f"Input on the GPU is an error so far. {facts.gpu_trouble}.")
    return found


def _on_waiting(facts: Facts) -> list[str]:
    """Returns advice on how threads wait, which depends on what else the machine does."""
    if not facts.has_openmp or facts.threads < 2 or facts.load is None:
        return []
    busy = f"the load is {facts.load:.1f} on {facts.processors} processor(s)"
    if not facts.is_passive and is_busy(facts):
        return [
            "Set OMP_WAIT_POLICY=passive, or take fewer threads, while other programs run: "
            f"{busy}, and a thread that waits spins, which keeps a processor from the thread that "
            "it waits for."
        ]
    if facts.is_passive and facts.load < facts.processors / 2:
        return [
            f"Unset OMP_WAIT_POLICY=passive where a process has the machine to itself: {busy}, and "
            "waking threads that sleep takes longer than a small call."
        ]
    return []


def is_busy(facts: Facts) -> bool:
    """Returns whether more processes want to run than there are processors."""
    # A program that has just had the machine to itself leaves a load of its processors behind.
    return facts.load is not None and facts.load > 1.1 * facts.processors


def wrapped(text: str) -> str:
    """Returns a paragraph of advice as lines for a terminal."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", initial_indent="- ", break_on_hyphens=False
    )


def usable_processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many processors this process may use, with the limit of its container.

    Args:
        cgroup: where Linux shows that limit, in the files of version 2 or 1 of control groups.
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
    """Returns the load of the last minute, where the system tells."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _gpu_trouble() -> str | None:
    """Returns why the GPU kernels cannot run on the current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    try:
        availability.require_triton(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        text = str(error).removeprefix("namernn_fast: ")
        return text[:1].upper() + text[1:]
    return None
