"""Lets Triton run kernels on this machine: it compiles them for a GPU, and their PTX is executed.

`install()` makes the project's operators on CPU tensors those of a GPU. Both last as long as the
process. README.md says what is modelled.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.harness.paths import ROOT
from namernn_fast import availability, gpu, ops
from namernn_fast.gpu import device as gpu_device
from namernn_fast.gpu.device import Device
from tools.ptx.decode import Decoder, Signature

KNOWN_TRITON = "3.9"
"""The versions of Triton whose instructions are known: those that begin like this."""
HERE = Path(__file__).parent
# The shared memory of a program and the processors of an A100, an H100 and an RTX 5090.
DEVICES = {
    80: Device("cuda", "sm_80", 163 * 1024, 108),
    90: Device("cuda", "sm_90", 227 * 1024, 132),
    120: Device("cuda", "sm_120", 99 * 1024, 170),
}


class FaultError(RuntimeError):
    """A kernel did what it must not."""


class Fault(NamedTuple):
    """What the machine found."""

    kernel: str
    kind: str
    place: str
    """In Python, and in the PTX."""
    text: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.place}: {self.text}"


@dataclass
class Options:
    """How adverse the machine is; all chances in percent."""

    seed: int = 1
    cooperative: int = 0
    """Set by a launch: all programs run at once, and see each other's stores late."""
    window: int = 3
    """Programs that run at once, in other launches."""
    quantum: int = 40
    """Instructions of a warp, at most, before another one has its turn."""
    patience: int = 20_000_000
    """Instructions after which a kernel that changes nothing is taken to be stuck."""
    flush: int = 5
    """The chance that a store is visible at once."""
    forget: int = 10
    """The chance that a line of the first-level cache is not there any more."""


def _library() -> ctypes.CDLL:
    """Builds the machine for this processor, once for each state of its sources."""
    sources = sorted(HERE.glob("*.cpp"))
    compiler = os.environ.get("CXX", "c++")
    flags = [
        "-std=c++17",
        "-O2",
        "-march=native",
        "-ffp-contract=off",
        "-fwrapv",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
    ]
    state = hashlib.sha256(" ".join([compiler, *flags, platform.processor()]).encode())
    for path in (*sources, *sorted(HERE.glob("*.h")), Path("/proc/cpuinfo")):
        if path.exists():
            state.update(b"".join(_stable(path)))
    built = ROOT / "build" / "ptx" / f"{state.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        partial_file = built.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, *sources, "-o", partial_file], check=True)
        partial_file.replace(built)
    library = ctypes.CDLL(str(built))
    library.ptx_signature.restype = ctypes.c_int64
    library.ptx_new.restype = ctypes.c_void_p
    library.ptx_delete.argtypes = [ctypes.c_void_p]
    library.ptx_run.restype = ctypes.c_char_p
    return library


def _stable(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file; of /proc/cpuinfo those that tell processors apart."""
    for line in path.read_bytes().splitlines():
        if path.name != "cpuinfo" or line.startswith((b"flags", b"Features", b"model name")):
            yield line


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Kernel:
    """A decoded kernel in the machine."""

    def __init__(self, library: ctypes.CDLL, text: str):
        self._library = library
        self.decoded = decoded = Decoder(text, self._signature)
        places, constants = self._lay_out(decoded)
        names, code = bytearray(), []

        def add(operands):
            for one in operands:
                code.extend((places[one.number] if one.size else 0, one.size))

        for one in decoded.instructions:
            names += one.name.encode() + b"\0"
            guard = places[one.guard.number] if one.guard else -1
            code += [one.line, guard, one.is_guard_negated]
            code += [len(one.results), len(one.sources), len(one.numbers)]
            add(one.results)
            add(one.sources)
            code += one.numbers
        specials = [n for one in decoded.specials for n in (places[one.number], one.size)]
        count = [ctypes.c_int64(n) for n in (len(decoded.instructions), len(constants))]
        self._kernel = ctypes.c_void_p(
            library.ptx_new(
                *(bytes(names), _pointer(np.array(code, np.int64)), count[0]),
                *(bytes(constants), count[1], ctypes.c_int64(self._bytes)),
                *(_pointer(np.array(specials, np.int64)), ctypes.c_int64(len(decoded.specials))),
            )
        )

    def __del__(self) -> None:
        if getattr(self, "_kernel", None):
            self._library.ptx_delete(self._kernel)

    def _signature(self, name: str) -> Signature | None:
        out = np.zeros(64, np.int64)
        count = self._library.ptx_signature(name.encode(), _pointer(out))
        if count < 0:
            return None
        sizes = out[:count].tolist()
        border = sizes.index(-1)
        return Signature(sizes[:border], sizes[border + 1 :])

    def _lay_out(self, decoded: Decoder) -> tuple[list[int], bytes]:
        """Returns the place of every operand among a warp's registers, constants first, and the
        bytes of the constants."""
        places = [0] * len(decoded.sizes)
        constants = bytearray()
        values = dict(decoded.constants)
        is_constant = {operand.number: operand for operand in values}
        for operand, value in values.items():
            places[operand.number] = len(constants)
            width = 4 if operand.size == 1 else operand.size
            copies = 1 if operand.size == 1 else 32
            constants += value.to_bytes(width, "little") * copies
            constants += bytes(-len(constants) % 64)
        end = len(constants)
        for number, size in enumerate(decoded.sizes):
            if number not in is_constant:
                places[number] = end
                end += 64 * -(-(4 if size == 1 else 32 * size) // 64)
        self._bytes = end
        return places, bytes(constants)

    def run(self, parameters, grid, warps, shared, storages, options: Options) -> tuple[list, int]:
        """Runs the kernel; returns what `ptx_run` found, a list for each fault, and how many
        instructions that took."""
        counts = np.zeros(1, np.int64)
        chosen = np.array([getattr(options, one.name) for one in fields(options)], np.int64)
        tensors = np.array(sorted(storages.items()), np.int64).reshape(-1, 2)
        found = self._library.ptx_run(
            *(self._kernel, bytes(parameters), ctypes.c_int64(len(parameters))),
            *(_pointer(np.array(grid, np.int64)), ctypes.c_int64(warps), ctypes.c_int64(shared)),
            *(_pointer(tensors), ctypes.c_int64(len(tensors)), _pointer(chosen), _pointer(counts)),
        )
        return [line.split("\t") for line in found.decode().splitlines()], int(counts[0])


class Machine:
    """What runs launches, and what it found."""

    def __init__(self, arch: int):
        self.device = DEVICES[arch]
        self.options = Options()
        self.faults: list[Fault] = []
        self.launches = self.instructions = 0
        self.change: Callable[[str], str] = lambda text: text
        """Changes the PTX before it is decoded: to plant faults."""
        self.library: torch.library.Library | None = None
        """Keeps the operators in their places."""
        self.kernels: dict[str, Kernel] = {}
        """By their PTX."""
        self._library = _library()

    def kernel_of(self, text: str) -> Kernel:
        """Returns a kernel, which is decoded once."""
        text = self.change(text)
        if text not in self.kernels:
            self.kernels[text] = Kernel(self._library, text)
        return self.kernels[text]

    def launch(self, text: str, metadata, grid, values: list[Any]) -> None:
        """Runs a kernel.

        Args:
            text: Its PTX.
            metadata: What Triton tells of it.
            grid: The number of programs in each dimension.
            values: The arguments, tensors or integers.

        Raises:
            FaultError: If an assertion of the kernel failed.
        """
        kernel = self.kernel_of(text)
        parameters, storages = self._arguments(kernel, values)
        self.options.cooperative = int(metadata.launch_cooperative_grid)
        programs = grid[0] * grid[1] * grid[2]
        if self.options.cooperative and programs > self.device.meeting:
            self._add(kernel, "launch", 0, f"{programs} programs cannot run at once")
        found, instructions = kernel.run(
            *(parameters, grid, metadata.num_warps, metadata.shared, storages, self.options)
        )
        self.options.seed += 1
        self.launches += 1
        self.instructions += instructions
        for kind, line, count, text in found:
            if kind == "assertion":
                raise FaultError(f"assertion: {'; '.join(kernel.decoded.messages)}")
            self._add(kernel, kind, int(line), f"{text} (times {count})")

    def _add(self, kernel: Kernel, kind: str, line: int, text: str) -> None:
        place = f"{kernel.decoded.sources.get(line, '')} (PTX line {line})"
        self.faults.append(Fault(kernel.decoded.name, kind, place, text))

    @staticmethod
    def _arguments(kernel: Kernel, values: list[Any]) -> tuple[bytearray, dict[int, int]]:
        """Returns the bytes of the parameters, and the address and the size of each storage."""
        places = kernel.decoded.parameters
        parameters = bytearray(sum(places[-1]) if places else 0)
        storages = {}
        for value, (begin, size) in zip(values, places, strict=False):  # the last ones are Triton's
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                value = value.data_ptr()
            parameters[begin : begin + size] = (int(value) % 2 ** (8 * size)).to_bytes(
                size, "little"
            )
        storages.pop(0, None)  # of empty tensors
        return parameters, storages


def _without_constants(types, values) -> Iterator[Any]:
    """Yields the arguments that are no constants; tuples of them one by one."""
    for type, value in zip(types, values, strict=True):
        if isinstance(type, tuple):
            yield from _without_constants(type, value)
        elif type != "constexpr":
            yield value


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, machine: Machine, source, metadata):
        self.machine, self.metadata = machine, metadata
        self.types = list(source.signature.values())

    def __call__(self, x, y, z, stream, text, packed, launch, enter, leave, *arguments):
        values = list(_without_constants(self.types, arguments))
        self.machine.launch(text, self.metadata, (x, y, z), values)


class _Driver(DriverBase):
    """Triton's driver of the machine."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.utils = self  # of which Triton asks for the next three functions
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

    def get_current_device(self):  # another one for each architecture: Triton keeps kernels by it
        return int(self.machine.device.arch.removeprefix("sm_"))

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError


def _change_stages(backend=None, stages=None, *_):
    """Triton's hook into its stages: PTX is the binary. Without arguments, what tells caches so."""
    if stages is None:
        return "executed PTX", "executed PTX"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


def install(arch: int = 80) -> Machine:
    """Makes the machine Triton's device, and the operators of CPU tensors those of a GPU.

    Args:
        arch: One of `DEVICES`; the machine's `device` may be another one later.
    """
    machine = Machine(arch)
    triton.knobs.runtime.add_stages_inspection_hook = _change_stages
    triton.runtime.driver.set_active(_Driver(machine))
    gpu_device.find_device = lambda index: machine.device
    availability.why_not_cpu_kernel = lambda input: None
    machine.library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name in ("rnn_forward", "rnn_backward"):
        machine.library.impl(name, getattr(gpu, name), "CPU", allow_override=True)
    # oneDNN lets a NaN in one row of a matrix of bfloat16 get into others.
    torch.backends.mkldnn.set_flags(False)
    return machine
