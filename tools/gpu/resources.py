"""The resources of the GPU kernels on each architecture, compiled without a GPU.

`make gpu ONLY=report` runs this module. It compiles every plan for the sizes below for every
architecture. `--record` writes registers, spills, shared memory and the instruction counts of a
step to `resources.json`, and some of these numbers to `docs/gpu_report.md`. `make gpu ONLY=lint`
compares the kernels with the record.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import pages
from benchmarks.harness.paths import GPU_REPORT, RESULTS, Section
from namernn_fast.bench.tables import markdown
from namernn_fast.gpu.device import Device
from namernn_fast.gpu.kernels import VARYING, LayoutTensors, backward_kernel, forward_kernel
from namernn_fast.gpu.layer import form_of, launch_settings_of, takes_transpose
from namernn_fast.gpu.plan import Plan, Size, choose
from tools.gpu.machine_code import Counts, code_of, run_tool

RAW = RESULTS / "resources.json"

# The shared memory available to one program and the number of multiprocessors, from the
# manufacturers' manuals (A100, H100 SXM, B200, MI300X).
H100 = Device("cuda", "sm_90", 227 * 1024, 132)
MI300X = Device("hip", "gfx942", 64 * 1024, 304)
DEVICES = (
    Device("cuda", "sm_80", 163 * 1024, 108),
    H100,
    Device("cuda", "sm_100", 227 * 1024, 148),
    MI300X,
)
# The shared memory is from the CUDA programming guide ("Technical Specifications per Compute
# Capability"). The multiprocessor counts are from the GeForce RTX 3090, 4090 and 5090 whitepapers.
GEFORCE = (
    Device("cuda", "sm_86", 99 * 1024, 82),
    Device("cuda", "sm_89", 99 * 1024, 128),
    Device("cuda", "sm_120", 99 * 1024, 170),
)
HIDDEN_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 64, 1024)
# Sizes that do not fill blocks of hidden units, including odd sizes, whose rows are unaligned.
UNEVEN_SIZES = (33, 100, 127, 200, 300)
SIZES = (*itertools.product(HIDDEN_SIZES, BATCHES), *((size, 64) for size in UNEVEN_SIZES))
# Each entry is (dtype, whether float32 may be rounded to TF32).
PRECISIONS = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False))
KERNELS = {"forward": forward_kernel, "backward": backward_kernel}
# The usual call has no initial state, and its loss depends only on the output.
USUAL = {"absent": frozenset({"hx", "grad_h_n", "grad_hx", "dz_first"})}


class Build(NamedTuple):
    """One plan on one device, for one hidden size."""

    device: Device
    hidden_size: int
    dtype: torch.dtype
    plan: Plan

    @property
    def precision(self) -> str:
        """The name of the precision."""
        if self.dtype != torch.float32:
            return str(self.dtype).removeprefix("torch.")
        return "TF32" if self.plan.precision == "tf32" else "float32"


class Resources(NamedTuple):
    """The resources of one kernel."""

    registers: int
    """Registers per thread."""
    spilled: int
    """Bytes spilled per thread."""
    shared: int
    """Bytes of shared memory per program."""


def builds(devices: Iterable[Device] = DEVICES) -> Iterator[tuple[Build, list[int]]]:
    """Yields every plan for the sizes in SIZES, with the batch sizes that use it."""
    found: dict[Build, list[int]] = {}
    for device, (dtype, tf32), size in itertools.product(devices, PRECISIONS, sorted(SIZES)):
        hidden_size, batch = size
        if tf32 and device.backend != "cuda":
            continue
        plan = choose(Size(hidden_size, batch, dtype, device, tf32=tf32))
        found.setdefault(Build(device, hidden_size, dtype, plan), []).append(batch)
    yield from found.items()


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_INDICES = {"ids": "*i64", "lengths": "*i64", "offsets": "*i64", "starts": "*i64", "reset": "*u8"}
_OF_TWO_DIRECTIONS = {"weight_hh_reverse", "bias_reverse"}


class Specialisation(NamedTuple):
    """The arguments and options that a kernel is compiled for."""

    signature: dict[str, Any]
    """Triton's type name of each argument, `constexpr` if it is a constant; a tuple of them for a
    tuple argument."""
    constants: dict[str, Any]
    """The values of constant arguments, except None."""
    settings: dict[str, Any]
    """Triton's compile options."""


def specialise(
    kernel,
    build: Build,
    *,
    directions: int = 1,
    tanh: bool = True,
    ring: bool = False,
    rows: Collection[str] = (),
    absent: Collection[str] = (),
) -> Specialisation:
    """Returns the arguments and options with which a call compiles a kernel.

    Args:
        kernel: One of `KERNELS`.
        build: The plan, the device and the hidden size.
        directions, tanh, ring: As in `form_of`.
        rows: Which of ids, lengths, offsets, starts and reset the call passes.
        absent: The other optional arguments that the call omits.
    """
    plan, device = build.plan, build.device
    is_forward = kernel is forward_kernel
    omitted = {*absent, *(_INDICES.keys() - rows)}
    omitted |= _OF_TWO_DIRECTIONS if directions == 1 else set()
    omitted |= {"arrivals"} if plan.members == 1 else set()
    types = {**dict.fromkeys(VARYING, "i32"), **_INDICES, "arrivals": "*i32", "FORM": "constexpr"}

    def type_of(name):
        return "constexpr" if name in omitted else types.get(name, POINTERS[build.dtype])

    signature = {name: type_of(name) for name in kernel.arg_names}
    signature["layout"] = LayoutTensors(*map(type_of, LayoutTensors._fields))
    padded = "lengths" in rows and "starts" not in rows
    form = form_of(
        plan,
        build.hidden_size,
        directions,
        tanh=tanh,
        padded=padded and not (ring and is_forward),
        ring=ring and is_forward,
        transposed=is_forward and takes_transpose(plan, build.dtype),
    )
    settings = launch_settings_of(plan, device, "ids" in rows and is_forward)
    return Specialisation(signature, {"FORM": form}, settings)


def compile_kernel(kernel, build: Build, **call: Any) -> Any:
    """Compiles a kernel for a call; `call` holds the arguments of `specialise`."""
    to = specialise(kernel, build, **call)
    return compiled(build.device, source_of(kernel, to), to.settings)


def source_of(kernel, to: Specialisation, aligned: bool = True) -> ASTSource:
    """Returns the source object that Triton compiles.

    If `aligned`, pointers are divisible by 16, which Triton checks at launch.
    """
    paths = {}  # Triton's paths to arguments and members of tuples
    for i, name in enumerate(kernel.arg_names):
        type = to.signature.get(name, "constexpr")
        members = enumerate(type) if isinstance(type, tuple) else ()
        paths |= {(i, k): member for k, member in members} or {(i,): type}
    values = {(i,): to.constants.get(name) for i, name in enumerate(kernel.arg_names)}
    types = {name: to.signature.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {path: values.get(path) for path, type in paths.items() if type == "constexpr"}
    attributes = {
        path: [["tt.divisibility", 16]]
        for path, type in paths.items()
        if type.startswith("*") and aligned
    }
    return ASTSource(kernel, types, constexprs, attributes)


def compiled(device: Device, source: ASTSource, settings: dict[str, Any]) -> Any:
    """Compiles a kernel for a device, and returns Triton's compiled kernel."""
    arch = int(device.arch.removeprefix("sm_")) if device.backend == "cuda" else device.arch
    target = GPUTarget(device.backend, arch, device.lanes)
    return triton.compile(source, target=target, options=settings)


def resources_of(device: Device, compiled: Any) -> Resources:
    """Returns the resources of a kernel, from the result of `compiled`."""
    shared = compiled.metadata.shared
    if device.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            _number(".vgpr_count:", text),
            _number(".private_segment_fixed_size:", text),
        )
        return Resources(registers, spilled, shared)
    text = run_tool("cuobjdump", "--dump-resource-usage", cubin=compiled.asm["cubin"])
    registers, stack, local = (_number(f"{name}:", text) for name in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, shared)


def _number(label: str, text: str) -> int:
    """Returns the number that follows `label` in `text`."""
    return int(re.search(rf"{re.escape(label)}\s*(\d+)", text)[1])  # type: ignore[index]


def occupancy(device: Device, plan: Plan, taken: Resources) -> float:
    """Returns the occupancy: the fraction of warp slots that can be active at once.

    Registers, shared memory and the number of warps limit the occupancy.
    """
    warps, registers = (64, 65536 // 32) if device.backend == "cuda" else (32, 4 * 512)
    programs = min(
        warps // plan.warps,
        registers // (-(-taken.registers // 8) * 8 * plan.warps),
        (device.shared + 1024) // (taken.shared + 1024),
    )
    return programs * plan.warps / warps


def measure(job: tuple[Build, list[int]]) -> dict[str, Any]:
    """Compiles the kernels of one plan for the usual call, and returns a table row."""
    build, batches = job
    row: dict[str, Any] = {
        "arch": build.device.arch,
        "dtype": build.precision,
        "hidden_size": build.hidden_size,
        "batches": batches,
        "plan": build.plan._asdict(),
    }
    for name, kernel in KERNELS.items():
        binary = compile_kernel(kernel, build, **USUAL)
        taken = resources_of(build.device, binary)
        row[name] = {
            **taken._asdict(),
            "occupancy": occupancy(build.device, build.plan, taken),
        }
        if build.device.backend == "cuda":
            row[name] |= code_of(binary.asm["cubin"]).count()._asdict()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table with a line for each plan."""
    lines = []
    for row in rows:
        plan = Plan(**row["plan"])
        columns = {
            "": row["arch"],
            "dtype": row["dtype"],
            "H": str(row["hidden_size"]),
            "B": ", ".join(map(str, row["batches"])),
            "plan": plan.kind,
            "members x tiles": f"{plan.members} x {plan.tiles}",
            "B x N x K": f"{plan.block_b} x {plan.block_n} x {plan.block_k}",
            "warps": str(plan.warps),
        }
        taken = [
            row[name]
            | {"KiB shared": f"{row[name]['shared'] / 1024:.1f}"}
            | {"occupancy": f"{row[name]['occupancy']:.0%}"}
            for name in KERNELS
        ]
        for name in ("registers", "spilled", "KiB shared", "occupancy", *Counts._fields):
            columns[name.replace("_", " ")] = ", ".join(str(of.get(name, "-")) for of in taken)
        lines.append(columns)
    return markdown([[*lines[0]], *([*columns.values()] for columns in lines)])


def text(document: dict[str, Any]) -> str:
    """Returns the page's section, with the plans of one architecture per manufacturer."""
    shown = (H100.arch, MI300X.arch)
    rows = [row for row in document["rows"] if row["arch"] in shown]
    return f"Compiled by Triton {document['triton']}. H is the hidden size.\n\n{table(rows)}"


def main() -> None:
    options = pages.parse(pages.parser(__doc__))
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(measure, builds()))
    document = {"triton": triton.__version__, "rows": rows}
    pages.publish("resources", document, [Section(GPU_REPORT, "resources", text)], options.record)


if __name__ == "__main__":
    main()
