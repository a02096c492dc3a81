"""A Triton driver that executes the PTX of kernels on the CPU.

After `install()`, operators on CPU tensors run the GPU kernels for the rest of the process.
README.md says what the machine models.
"""

import ctypes
import hashlib
import itertools
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.gpu.dry_run import on_cuda, serve_cpu_tensors
from benchmarks.harness.paths import ROOT
from tools.gpu import resources
from tools.ptx.decode import Decoder, Signature

KNOWN_TRITON = "3.9"
"""The minor version of Triton for which all instructions are supported."""
HERE = Path(__file__).parent
DEVICES = {
    arch: device
    for device, arch in itertools.product((*resources.DEVICES, *resources.GEFORCE), (80, 90, 120))
    if device.arch == f"sm_{arch}"
}
"""The supported GPUs by compute capability: A100, H100, RTX 5090."""


class FaultError(RuntimeError):
    """An assertion in a kernel failed."""


class Fault(NamedTuple):
    """A fault that the machine found."""

    kernel: str
    kind: str
    place: str
    """The Python file and line, and the PTX line."""
    text: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.place}: {self.text}"


@dataclass
class Options:
    """How adversarial the machine is. Probabilities are in percent."""

    seed: int = 1
    cooperative: int = 0
    """1 if all programs run at once, with weak memory. Each launch sets this option."""
    window: int = 3
    """Programs that run at once if the launch is not cooperative."""
    quantum: int = 40
    """Maximum number of instructions before another warp runs."""
    patience: int = 20_000_000
    """Instructions without a visible change after which the kernel counts as deadlocked."""
    limit: int = 1_000_000_000
    """Instructions after which the kernel counts as endless."""
    flush: int = 5
    """Chance that a store becomes visible at once."""
    forget: int = 10
    """Chance that a load finds its L1 line evicted."""


def _library() -> ctypes.CDLL:
    """Builds and loads the machine. Builds are cached, keyed by sources and flags."""
    sources = sorted(HERE.glob("*.cpp"))
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fwrapv"]
    flags += ["-fno-strict-aliasing", "-shared", "-fPIC"]
    state = hashlib.sha256(" ".join([compiler, *flags, platform.machine()]).encode())
    for path in (*sources, *sorted(HERE.glob("*.h"))):
        state.update(path.read_bytes())
    built = ROOT / "build" / "ptx" / f"{state.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        partial_file = built.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, *sources, "-o", partial_file], check=True)
        partial_file.replace(built)
    library = ctypes.CDLL(str(built))
    number, text, kernel = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    numbers = np.ctypeslib.ndpointer(np.int64)
    library.ptx_signature.argtypes, library.ptx_signature.restype = [text, numbers], number
    library.ptx_new.argtypes = [text, numbers, number, text, number, number, numbers, number]
    library.ptx_new.restype = kernel
    library.ptx_delete.argtypes = [kernel]
    library.ptx_run.argtypes = [kernel, text, number, numbers, number, number, numbers, number]
    library.ptx_run.argtypes += [numbers]
    library.ptx_run.restype = text
    return library


class Kernel:
    """A kernel, decoded and loaded into the machine."""

    def __init__(self, library: ctypes.CDLL, text: str):
        self._library = library
        self.decoded = decoded = Decoder(text, self._signature)
        places, constants, size = _lay_out(decoded)
        names, code = bytearray(), []

        def add(operands):
            for operand in operands:
                code.extend((places[operand.number] if operand.size else 0, operand.size))

        for instruction in decoded.instructions:
            names += instruction.name.encode() + b"\0"
            guard = places[instruction.guard.number] if instruction.guard else -1
            code += [instruction.line, guard, instruction.is_guard_negated]
            code += map(len, (instruction.results, instruction.sources, instruction.numbers))
            add(instruction.results)
            add(instruction.sources)
            code += instruction.numbers
        specials = [
            n for special in decoded.specials for n in (places[special.number], special.size)
        ]
        self._kernel = library.ptx_new(
            bytes(names),
            np.array(code, np.int64),
            len(decoded.instructions),
            constants,
            len(constants),
            size,
            np.array(specials, np.int64),
            len(decoded.specials),
        )

    def __del__(self) -> None:
        if getattr(self, "_kernel", None):
            self._library.ptx_delete(self._kernel)

    def _signature(self, name: str) -> Signature | None:
        out = np.zeros(64, np.int64)
        count = self._library.ptx_signature(name.encode(), out)
        if count < 0:
            return None
        sizes = out[:count].tolist()
        border = sizes.index(-1)
        return Signature(sizes[:border], sizes[border + 1 :])

    def run(self, parameters, grid, warps, shared, storages, options: Options) -> list[list[str]]:
        """Runs the kernel; returns the fields of each fault."""
        found = self._library.ptx_run(
            self._kernel,
            bytes(parameters),
            len(parameters),
            np.array(grid, np.int64),
            warps,
            shared,
            np.array(sorted(storages.items()), np.int64),
            len(storages),
            np.array(astuple(options), np.int64),
        )
        return [line.split("\t") for line in found.decode().splitlines()]


def _lay_out(decoded: Decoder) -> tuple[list[int | None], bytes, int]:
    """Lays out the registers of a warp: constants first, repeated for each lane.

    Returns:
        The byte offset of each operand, the constants, and the size of a warp in bytes.
    """
    places: list[int | None] = [None] * len(decoded.sizes)
    constants = bytearray()
    for (value, size), operand in decoded.constants.items():
        places[operand.number] = len(constants)
        if size == 1:
            constants += value.to_bytes(4, "little")
        else:
            constants += value.to_bytes(size, "little") * 32
        constants += bytes(-len(constants) % 64)
    end = len(constants)
    for number, size in enumerate(decoded.sizes):
        if places[number] is None:
            places[number] = end
            end += 64 * -(-(4 if size == 1 else 32 * size) // 64)
    return places, bytes(constants), end


class Machine:
    """Runs launches and collects faults."""

    def __init__(self, arch: int):
        self.device = DEVICES[arch]
        self.options = Options()
        self.faults: list[Fault] = []
        self.change: Callable[[str], str] = lambda text: text
        """A function that edits the PTX before it is decoded, to plant faults."""
        self.library: torch.library.Library | None = None
        """The library that keeps the operators registered."""
        self.kernels: dict[str, Kernel] = {}
        """The decoded kernels, by their PTX."""
        self._library = _library()

    def kernel_of(self, text: str) -> Kernel:
        """Returns the kernel for a PTX text. Decodes each text only once."""
        text = self.change(text)
        if text not in self.kernels:
            self.kernels[text] = Kernel(self._library, text)
        return self.kernels[text]

    def launch(self, text: str, metadata, grid, values: list[Any]) -> None:
        """Runs a kernel, given as PTX with Triton's metadata.

        Raises:
            FaultError: If an assertion of the kernel failed.
        """
        kernel = self.kernel_of(text)
        parameters, storages = self._arguments(kernel, values)
        self.options.cooperative = int(metadata.launch_cooperative_grid)
        programs = grid[0] * grid[1] * grid[2]
        if self.options.cooperative and programs > self.device.meeting:
            self._add(kernel, "launch", 0, f"{programs} programs cannot run at once")
        warps, shared = metadata.num_warps, metadata.shared
        found = kernel.run(parameters, grid, warps, shared, storages, self.options)
        self.options.seed += 1
        for kind, line, count, text in found:
            if kind == "assertion":
                raise FaultError(f"assertion: {'; '.join(kernel.decoded.messages)}")
            self._add(kernel, kind, int(line), f"{text} (times {count})")

    def _add(self, kernel: Kernel, kind: str, line: int, text: str) -> None:
        place = f"{kernel.decoded.sources.get(line, '')} (PTX line {line})"
        self.faults.append(Fault(kernel.decoded.name, kind, place, text))

    @staticmethod
    def _arguments(kernel: Kernel, values: list[Any]) -> tuple[bytearray, dict[int, int]]:
        """Returns the parameter bytes, and the size of each tensor's storage by address."""
        places = kernel.decoded.parameters
        parameters = bytearray(sum(places[-1]) if places else 0)
        storages = {}
        # The parameters that Triton appends stay zero.
        for value, (begin, size) in zip(values, places, strict=False):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                value = value.data_ptr()
            parameters[begin : begin + size] = (int(value) % 2 ** (8 * size)).to_bytes(
                size, "little"
            )
        storages.pop(0, None)  # address 0 belongs to empty tensors
        return parameters, storages


def _without_constants(types, values) -> Iterator[Any]:
    """Yields the run-time arguments, flattening tuples."""
    for type, value in zip(types, values, strict=True):
        if isinstance(type, tuple):
            yield from _without_constants(type, value)
        elif type != "constexpr":
            yield value


class _Launcher:
    """Launches one compiled kernel; Triton calls it."""

    def __init__(self, machine: Machine, source, metadata):
        self.machine, self.metadata = machine, metadata
        self.types = list(source.signature.values())

    def __call__(self, x, y, z, stream, text, packed, launch, enter, leave, *arguments):
        values = list(_without_constants(self.types, arguments))
        self.machine.launch(text, self.metadata, (x, y, z), values)


class _Driver(DriverBase):
    """The machine as a Triton driver."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.utils = self  # provides the next three methods
        self.launcher_cls = partial(_Launcher, machine)

    def load_binary(self, name, binary, shared, device):
        return None, binary.decode(), 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        device = self.machine.device
        return {"max_shared_mem": device.shared, "multiprocessor_count": device.processors}

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):  # unique per GPU, because Triton caches kernels by device
        return int(self.machine.device.arch.removeprefix("sm_"))

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError


def _change_stages(backend=None, stages=None, *_):
    """Changes Triton's compilation so that the PTX is the binary.

    Called without stages, it returns a cache key.
    """
    if stages is None:
        return "executed PTX", "executed PTX"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


def install(arch: int = 80) -> Machine:
    """Makes the machine Triton's device and routes operators on CPU tensors to the GPU kernels.

    Args:
        arch: A key of `DEVICES`. To switch later, set the machine's `device`.
    """
    machine = Machine(arch)
    triton.knobs.runtime.add_stages_inspection_hook = _change_stages
    triton.runtime.driver.set_active(_Driver(machine))
    machine.library = serve_cpu_tensors(lambda: machine.device, on_cuda)
    # Disable oneDNN, because in its bfloat16 products a NaN can spread from one row to others.
    torch.backends.mkldnn.set_flags(False)
    return machine
