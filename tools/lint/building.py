"""Compiles a case and disassembles it; keeps what came of it in build/gpu-lint."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from benchmarks.gpu import resources
from benchmarks.harness.paths import ROOT
from tools.lint.cases import UNALIGNED, Case

KEPT = ROOT / "build" / "gpu-lint"
_BYTES = {"i32": 4}
_LAYOUT = 2  # of a file: another number for another layout


class Built(NamedTuple):
    """A kernel as machine code."""

    sass: str
    """What nvdisasm prints."""
    ttir: str
    """The intermediate code that Triton makes first."""
    signature: list[tuple[str, int]]
    """The name and the bytes of each argument."""
    taken: resources.Resources
    """The resources that the kernel takes."""


def build(case: Case, kernel=None, keep: bool = True, **settings: Any) -> Built:
    """Returns a case as machine code.

    Args:
        case: The case.
        kernel: A kernel in place of the case's own.
        keep: Whether to read it from `KEPT` where an earlier run has left it there, and to leave it
            there. A name is a hash of all that the compiler takes, the kernel's source among it.
        settings: How Triton is to compile it, in place of the case's own settings.
    """
    kernel = kernel or resources.KERNELS[case.kernel]
    to = case.specialisation
    settings = {**to.settings, **settings}
    source = resources.source_of(kernel, to, aligned=case.rows != UNALIGNED)
    key = (
        _LAYOUT,
        triton.__version__,
        case.build.device.arch,
        source.hash(),
        sorted(settings.items()),
    )
    path = KEPT / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json.gz"
    if keep and path.exists():
        sass, ttir, taken = json.loads(gzip.decompress(path.read_bytes()))
    else:
        compiled = resources.compiled(case.build.device, source, settings)
        options = ("--print-code", "--no-dataflow")
        sass = resources.run_tool("nvdisasm", *options, cubin=compiled.asm["cubin"])
        ttir = re.sub(r" ?loc\(.*", "", compiled.asm["ttir"])
        taken = resources.resources_of(case.build.device, compiled)
        if keep:
            _write(path, gzip.compress(json.dumps([sass, ttir, taken]).encode()))
    return Built(sass, ttir, list(_given(to.signature)), resources.Resources(*taken))


def _given(signature: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields the name and the bytes of each argument that is no constant."""
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            yield from _given(kind._asdict())
        elif kind != "constexpr":
            yield name, _BYTES.get(kind, 8)


def _write(path: Path, data: bytes) -> None:
    """Writes a file at once, so that no other process reads a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{hashlib.sha256(data).hexdigest()[:8]}")
    part.write_bytes(data)
    part.replace(path)
