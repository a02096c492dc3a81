"""Compiles printed kernels for GPUs that need not be there. Run it for the table of docs/gpu.md."""

import re
import sys
from typing import NamedTuple

import operators
import pytest
import torch
import triton
from kinds import EVERY
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from namernn_fast import gpu, ops

ARCHITECTURES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""The bytes of shared memory that a program instance may take."""
CELLS = ("rnn", "gru", "lstm", "leaky", "layer_norm_lstm", "layer_norm_gru", "slstm")


class Resources(NamedTuple):
    registers: int
    spilled: int
    """Bytes of registers in memory, a thread."""
    shared: int


def launches_of(cell, hidden_size):
    """Returns the kernels and arguments with which a layer of two steps is launched, by pass.

    There are 16 float32 sequences with lengths and resets.
    """
    layer, described = EVERY[cell].layer(4, hidden_size), EVERY[cell].cell
    x, lengths = torch.zeros(2, 16, 4), torch.full((16,), 2)
    states = [torch.zeros(1, 16, hidden_size) for _ in described.states]
    reset, weights = torch.zeros(2, 16, dtype=torch.bool), [p.detach() for p in layer.parameters()]
    call = described, x, states, weights, lengths, reset, ops.BIAS | ops.WANT_SAVED, 0
    found = {}

    def record(kernel, grid):
        return lambda **arguments: found.update({kernel.__name__: (kernel, arguments)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", record)
        output, last, saved = gpu.forward(ops.ForwardArguments(*operators.arguments(*call)))
        results = output, saved, output, last, [True] * (1 + len(states)), [0]
        gpu.backward(ops.BackwardArguments(*operators.backward_arguments(*call, *results)))
    return found


TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.uint8: "*u8"}


def compiled(cell, name, arch, hidden_size):
    """Compiles a kernel of a layer for a GPU."""
    kernel, arguments = launches_of(cell, hidden_size)[name]
    options = {option: arguments.pop(option) for option in ("num_warps", "enable_fp_fusion")}
    assert arguments.keys() == {*kernel.arg_names}
    backend, target = ("hip", arch) if arch.startswith("gfx") else ("cuda", int(arch[3:]))
    if backend == "hip":
        arguments["PRECISION"] = "ieee"
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = TYPES[value.dtype]
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    lanes = 64 if backend == "hip" else 32
    return triton.compile(source, target=GPUTarget(backend, target, lanes), options=options)


def resources_of(cell, name, arch, hidden_size):
    """Returns what a compiled kernel takes."""
    made = compiled(cell, name, arch, hidden_size)
    shared = made.metadata.shared
    if arch.startswith("gfx"):
        text = made.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{field}:\s+(\d+)", text)[1])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
        return Resources(registers, spilled, shared)
    return Resources(*registers_of(made.asm["cubin"]), shared)


def registers_of(cubin):
    """Returns registers and spilled bytes of the kernel in a cubin, as cuobjdump prints them."""
    import subprocess
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{field}:(\d+)", text)[1]) for field in ("REG", "STACK"))


def table(hidden_size=64):
    """Returns the table of docs/gpu.md."""
    lines = ["| cell | pass | " + " | ".join(ARCHITECTURES) + " |", "|---" * 5 + "|"]
    for cell in CELLS:
        for name in ("forward", "backward"):
            found = [resources_of(cell, name, arch, hidden_size) for arch in ARCHITECTURES]
            cells = (f"{r.registers} / {r.spilled} / {-(-r.shared // 1024)}" for r in found)
            lines.append(f"| {cell} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*map(int, sys.argv[1:])))
