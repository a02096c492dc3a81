"""The kernels that the lint compiles: plans of every architecture, with every kind of rows.

The plans are those of `make gpu-report`, and of further architectures. Both kernels are compiled
for every plan with dense rows. Every other kind of rows is compiled for both kernels with every
kind of plan (resident, cooperative, streamed) of every architecture; the precision and the number
of directions change from one to the next. The plans of the benchmark's grid on an H100 come on top.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu import resources
from benchmarks.gpu.grid import CELLS, PRECISIONS
from namernn_fast.gpu.device import Device
from namernn_fast.gpu.plan import choose

# The shared memory that one program can have is that of table "Technical Specifications per Compute
# Capability" in the CUDA programming guide; the number of processors that of the whitepapers of the
# GeForce RTX 3090, 4090 and 5090.
DEVICES = (
    *(device for device in resources.DEVICES if device.backend == "cuda"),
    Device("cuda", "sm_86", 99 * 1024, 82),
    Device("cuda", "sm_89", 99 * 1024, 128),
    Device("cuda", "sm_120", 99 * 1024, 170),
)

_NO_STATES = frozenset({"hx", "grad_h_n", "grad_hx", "dz_last"})
# What is given in a call, as `resources.specialise` takes it, by kind of rows.
DENSE, IDS, UNALIGNED = "dense", "ids", "unaligned"
CALLS: dict[str, dict[str, Any]] = {
    DENSE: {"absent": _NO_STATES},
    "hx": {},
    "lengths": {"rows": {"lengths"}, "absent": _NO_STATES},
    "packed": {"rows": {"lengths", "starts"}},
    "jagged": {"rows": {"offsets"}, "absent": _NO_STATES},
    "reset": {"rows": {"reset"}},
    IDS: {"rows": {"ids", "lengths"}, "absent": _NO_STATES},
    # h_n alone; backward: no gradient of weights
    "ring": {"ring": True, "absent": {*_NO_STATES, "previous"}},
    UNALIGNED: {"absent": _NO_STATES},
}


class Case(NamedTuple):
    """One kernel as it is compiled."""

    build: resources.Build
    kernel: str
    """`forward` or `backward`."""
    rows: str
    """One of `CALLS`."""
    directions: int

    @property
    def name(self) -> str:
        """A name that differs for every case."""
        build, plan = self.build, self.build.plan
        tile = f"{plan.block_b}x{plan.block_n}x{plan.block_k}"
        parts = (build.device.arch, build.precision, f"H{build.hidden_size}", plan.kind)
        shape = f"{plan.members}x{plan.tiles}of{tile}w{plan.warps}"
        return " ".join((*parts, shape, self.kernel, self.rows, f"{self.directions}dir"))

    @property
    def specialisation(self) -> resources.Specialisation:
        """What the kernel is compiled for."""
        call = CALLS[self.rows]
        kernel = resources.KERNELS[self.kernel]
        return resources.specialise(kernel, self.build, directions=self.directions, **call)


def cases() -> Iterator[Case]:
    """Yields all cases, each once."""
    yield from dict.fromkeys((*_of_the_report(), *_of_the_grid()))


def _of_the_grid() -> Iterator[Case]:
    """Yields the kernels that the benchmark's grid runs on an H100, with dense rows."""
    h100 = resources.H100
    for cell, precision in itertools.product(CELLS, PRECISIONS):
        hidden_size, dtype = cell.hidden_size, precision.dtype
        plan = choose(hidden_size, cell.batch, dtype, h100, tf32=precision.tf32)
        for kernel in resources.KERNELS:
            yield Case(resources.Build(h100, hidden_size, dtype, plan), kernel, DENSE, 1)


def _of_the_report() -> Iterator[Case]:
    """Yields the cases whose plans are those of the report of resources."""
    by_kind: dict[tuple[str, str], dict[str, list[resources.Build]]] = {}
    seen = set()
    for build, _ in resources.builds(DEVICES):
        device, plan = build.device, build.plan
        # Of sizes whose loop over hidden units alone runs longer, the first.
        is_first = _code_of(build) not in seen
        seen.add(_code_of(build))
        if is_first:
            of_kind = by_kind.setdefault((device.arch, plan.kind), {})
            of_kind.setdefault(build.precision, []).append(build)
            for kernel in resources.KERNELS:
                yield Case(build, kernel, DENSE, 1)
    # Two directions of dense rows; each other kind of rows with one or two directions in turn.
    calls = [(DENSE, 2), *((rows, 1 + i % 2) for i, rows in enumerate(CALLS) if rows != DENSE)]
    turn = itertools.count()
    for of_kind in by_kind.values():
        precisions = list(of_kind.values())
        for kernel, (rows, directions) in itertools.product(resources.KERNELS, calls):
            if (kernel, rows) == ("backward", IDS):
                continue  # it reads no ids
            i = next(turn)
            builds = precisions[i % len(precisions)]
            yield Case(builds[i // len(precisions) % len(builds)], kernel, rows, directions)


def _code_of(build: resources.Build) -> tuple:
    plan = build.plan
    shape = (plan.block_b, plan.block_n, plan.block_k, plan.warps, plan.stages, plan.parts)
    members = (plan.members > 1, plan.tiles > 1)
    return (build.device.arch, build.precision, plan.kind, shape, members)
