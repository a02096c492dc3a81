"""Compiles printed kernels for GPUs that need not be there. Run it for the table of docs/gpu.md."""

import re
import sys
from typing import NamedTuple

import triton
from kinds import EVERY
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from namernn_fast.equations import program_of
from namernn_fast.gpu import emit, layers

ARCHITECTURES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""The bytes of shared memory that a program instance may take."""
CELLS = ("rnn", "gru", "lstm", "leaky", "layer_norm_lstm", "layer_norm_gru", "slstm")


class Resources(NamedTuple):
    registers: int
    spilled: int
    """Bytes of registers in memory, a thread."""
    shared: int


def compiled(cell, name, arch, hidden_size):
    """Compiles a kernel for 16 or more float32 sequences with lengths and resets."""
    tiles = layers.tiles_of(hidden_size, 16)
    program = program_of(EVERY[cell].cell, "tanh")
    kernels = emit.printed(program, tiles.block_n >= hidden_size)
    kernel = getattr(kernels.module, name)
    constants = {
        **{"H": hidden_size, "HEAD": hidden_size, "DIRECTIONS": 1, "BLOCK_B": tiles.block_b},
        **{"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "DOT": True},
        **{"PRECISION": "ieee" if arch.startswith("gfx") else "tf32x3"},
        **{"KEEPS_OUTPUT": True, "KEEPS": True, "SLOTS": program.kept},
    }
    absent = {"offsets", "starts", "bias" * (not program.separate), "own" * (not program.own)}
    absent |= {"grad_own" * (not program.own)}
    types = {"lengths": "*i64", "reset": "*u8"}
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in absent or (argument.startswith("reset_to") and argument[-1].isdigit()):
            signature[argument], constants[argument] = "constexpr", None
        elif argument in emit.SIZES or argument.endswith(("_row", "_direction")):
            signature[argument] = "i32"
        else:
            signature[argument] = types.get(argument, "*fp32")
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    backend, target = ("hip", arch) if arch.startswith("gfx") else ("cuda", int(arch[3:]))
    lanes = 64 if backend == "hip" else 32
    options = {"num_warps": 4}
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
