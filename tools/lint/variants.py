"""The variants of the kernels that the lint compiles.

The usual call is compiled with every plan of `make gpu ONLY=report` on NVIDIA's GPUs, and with one
plan of each kind (resident, cooperative, streamed) and precision on GeForce GPUs. Every other
call in CALLS is compiled for an H100 with every kind of plan, rotating through the precisions.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from namernn_fast.gpu.device import Device
from tools.gpu import resources

REPORTED = tuple(device for device in resources.DEVICES if device.backend == "cuda")
DEVICES = (*REPORTED, *resources.GEFORCE)

# Names of calls, and the arguments of `resources.specialise` that describe each call.
USUAL, IDS, UNALIGNED = "usual", "ids", "unaligned"
CALLS: dict[str, dict[str, Any]] = {
    USUAL: resources.USUAL,
    "hx": {},
    "lengths": {"rows": {"lengths"}, **resources.USUAL},
    "packed": {"rows": {"lengths", "starts"}},
    "jagged": {"rows": {"offsets"}, **resources.USUAL},
    "reset": {"rows": {"reset"}},
    IDS: {"rows": {"ids", "lengths"}, **resources.USUAL},
    # Only h_n is computed and has a gradient; the backward pass computes no gradient of weights.
    "ring": {
        "ring": True,
        "absent": {"hx", "grad_output", "grad_hx", "dz_first", "previous_states"},
    },
    UNALIGNED: resources.USUAL,  # pointers that are not divisible by 16
}


class Variant(NamedTuple):
    """One kernel and its compile-time configuration."""

    build: resources.Build
    kernel: str
    """`forward` or `backward`."""
    rows: str = USUAL
    """The name of the call, a key of `CALLS`."""
    directions: int = 1

    @property
    def name(self) -> str:
        """A unique name for the variant."""
        build, plan = self.build, self.build.plan
        tile = f"{plan.block_b}x{plan.block_n}x{plan.block_k}"
        parts = (build.device.arch, build.precision, f"H{build.hidden_size}", plan.kind)
        shape = f"{plan.members}x{plan.tiles}of{tile}w{plan.warps}"
        return " ".join((*parts, shape, self.kernel, self.rows, f"{self.directions}dir"))

    @property
    def specialisation(self) -> resources.Specialisation:
        """The signature and the settings that the kernel is compiled with."""
        kernel, call = resources.KERNELS[self.kernel], CALLS[self.rows]
        return resources.specialise(kernel, self.build, directions=self.directions, **call)


def variants() -> Iterator[Variant]:
    """Yields each variant once."""
    builds = [build for build, _ in resources.builds(REPORTED)]
    for device in resources.GEFORCE:
        for by_precision in _by_kind(device).values():
            builds += [alike[0] for alike in by_precision.values()]
    for build, kernel in itertools.product(builds, resources.KERNELS):
        yield Variant(build, kernel)
    yield from _of_other_rows()


def _of_other_rows() -> Iterator[Variant]:
    """Yields variants of all calls except the usual one, with one and two directions in turn."""
    others = [rows for rows in CALLS if rows != USUAL]
    turn = itertools.count()
    for by_precision in _by_kind(resources.H100).values():
        precisions = list(by_precision.values())
        for kernel, rows in itertools.product(resources.KERNELS, others):
            if (kernel, rows) == ("backward", IDS):
                continue  # the backward kernel reads no ids
            i = next(turn)
            builds = precisions[i % len(precisions)]
            yield Variant(builds[i // len(precisions) % len(builds)], kernel, rows, 1 + i % 2)


def _by_kind(device: Device) -> dict[str, dict[str, list[resources.Build]]]:
    """Returns the plans of `make gpu ONLY=report` on a device, by kind and precision."""
    found: dict[str, dict[str, list[resources.Build]]] = {}
    for build, _ in resources.builds([device]):
        found.setdefault(build.plan.kind, {}).setdefault(build.precision, []).append(build)
    return found
