"""Tests which instructions the extension contains, and its kernels for each instruction set."""

import bisect
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import namernn_fast
from namernn_fast import ops
from namernn_fast.machine import availability

PACKAGE = Path(namernn_fast.__file__).parent
EXTENSION = next(PACKAGE.glob("_C*.so"), None)
CAPABILITIES = ("AVX2", "AVX512", "DEFAULT")
X86 = availability.HAS_EXTENSION and torch.backends.cpu.get_cpu_capability() in CAPABILITIES
needs_objdump = pytest.mark.skipif(
    not X86 or shutil.which("objdump") is None, reason="needs an x86-64 build and objdump"
)

# The source files in csrc/isa, each compiled with the flags of one instruction set.
AVX2_FILES = {"avx2.cpp", "int8_avx_vnni.cpp"}
AVX512_FILES = {"avx512.cpp", "avx512_bf16.cpp", "amx.cpp", "amx_float.cpp"}
AVX512_FILES |= {"int8_avx512_vnni.cpp", "int8_amx.cpp"}
ISA_FILES = {"baseline.cpp", *AVX2_FILES, *AVX512_FILES}
# On processors without AVX-512, `make` leaves out the AVX-512 files.
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS_AVX512 = "avx512vl" in CPUINFO or not CPUINFO


def run_tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions_by_source():
    """Returns (start, end, source file, name) for every local function, sorted by address."""
    functions, source = [], None
    for line in run_tool("objdump", "-t", "-C", EXTENSION).splitlines():
        if file := re.match(r"[0-9a-f]+ l +df \*ABS\*\s+[0-9a-f]+ (.*)$", line):
            source = file[1].strip()
        elif function := re.match(r"([0-9a-f]+) l +F \.text\S*\s+([0-9a-f]+) (.*)$", line):
            start, size = int(function[1], 16), int(function[2], 16)
            functions.append((start, start + size, source, function[3].strip()))
    return sorted(functions)


@pytest.mark.slow
@needs_objdump
def test_wide_registers_stay_in_their_isa_files():
    """Only AVX2 and AVX-512 files use ymm registers, and only AVX-512 files use zmm registers.

    All functions that use these registers must be local. The linker merges inline functions with
    the same name, so a copy compiled for AVX-512 could end up serving the baseline, and crash on an
    older processor.
    """
    functions = functions_by_source()
    starts = [start for start, *_ in functions]
    allowed = {"y": AVX2_FILES | AVX512_FILES, "z": AVX512_FILES}
    seen = {"y": set(), "z": set()}
    for line in run_tool("objdump", "-d", "--no-show-raw-insn", EXTENSION).splitlines():
        instruction = re.match(r"\s+([0-9a-f]+):", line)
        registers = set(re.findall(r"%([yz])mm\d", line))
        if not instruction or not registers:
            continue
        address = int(instruction[1], 16)
        _, end, source, _ = functions[bisect.bisect_right(starts, address) - 1]
        for register in registers:
            assert address < end, f"{line} is outside every local function"
            assert source in allowed[register], f"{source}: {line}"
            seen[register].add(source)
    assert seen == allowed if HAS_AVX512 else seen["y"] >= AVX2_FILES


@needs_objdump
def test_isa_files_have_no_static_constructors():
    """A static constructor in an ISA file could crash the import on an older processor."""
    functions = functions_by_source()
    expected = ISA_FILES if HAS_AVX512 else ISA_FILES - AVX512_FILES
    assert {source for *_, source, _ in functions} >= expected
    constructors = {source for *_, source, name in functions if name.startswith("_GLOBAL_")}
    assert not constructors & ISA_FILES


@needs_objdump
def test_extension_has_no_debug_information():
    """The build must override Python's `-g`, or most of the library would be debug information."""
    assert ".debug_info" not in run_tool("objdump", "-h", EXTENSION)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)

LEVELS = ("default", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # each dtype may choose another kernel


# Names of files in tests/kernel to run at each level, of the last with their slow tests.
FILES = ("fuzz",), ("kernel", "int8"), ("parity", "prepared")


@pytest.mark.long
@pytest.mark.skipif(not X86, reason="needs an x86-64 build")
@pytest.mark.parametrize("files", [FILES[0], *(slow(each) for each in FILES[1:])], ids="-".join)
@pytest.mark.parametrize(  # "default" runs on processors from before 2013
    "level", [slow("default"), *LEVELS[1:]]
)
def test_kernels_pass_at_every_cpu_capability(level, files, run_kernel_tests):
    """The kernel tests pass with ATEN_CPU_CAPABILITY set to each level."""
    skip_above(level)
    kernel = kernel_at(level, torch.float32)
    assert kernel == {"default": "baseline"}.get(level, level)
    if kernel != ops.cpu_kernel():  # otherwise the current run covers this kernel
        # In 16 bits `nn.RNN` takes minutes at the lower levels, so only test_kernel and the drawn
        # calls cover 16 bits.
        run_kernel_tests(level, files, "test_kernel or not (bfloat16 or torch.float16)")


@pytest.mark.skipif(not X86, reason="needs an x86-64 build")
@pytest.mark.parametrize(
    ("level", "kernels"),  # for each of DTYPES
    [
        ("avx2", "avx2 avx2 avx2"),
        ("avx_vnni", "avx2 avx2 avx_vnni"),
        slow("avx512vl", "avx512 avx512 avx2"),
        slow("avx512_vnni", "avx512 avx512 avx512_vnni"),
        slow("avx512_bf16", "avx512 avx512_bf16 avx2"),
    ],
)
def test_each_level_selects_its_kernels(level, kernels):
    """Each level is a flag of /proc/cpuinfo. The next test skips levels without a kernel."""
    if f" {level} " not in CPUINFO:
        pytest.skip(f"this processor does not support {level}")
    assert " ".join(chosen_at(level.removesuffix("vl"))[1:]) == kernels


@pytest.mark.long
@pytest.mark.skipif(not X86, reason="needs an x86-64 build")
@pytest.mark.slow
@pytest.mark.parametrize("files", FILES[1:], ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "level"),
    [
        *((torch.bfloat16, level) for level in ("avx512", "avx512_bf16", "amx")),
        *((torch.int8, level) for level in ("avx_vnni", "avx512_vnni")),
    ],
    ids=str,
)
def test_kernels_for_a_single_dtype_pass(dtype, level, files, run_kernel_tests):
    """Some instruction sets have a kernel for one dtype only, so only tests of this dtype run.

    ATen does not know these levels and warns; the test ignores the warnings.
    """
    if kernel_at(level, dtype) != level:
        pytest.skip(f"this processor does not support {level}")
    if level != ops.cpu_kernel(dtype):  # otherwise the current run covers this kernel
        run_kernel_tests(level, files, str(dtype).removeprefix("torch."))


# Tests that compare results, gradients and dtypes with torch's layers. WITHOUT deselects tests in
# which `nn.RNN` takes most of the time.
COMPARISONS = [f"tests/api/test_{name}.py" for name in ("contract", "drop_in", "gradients")]
COMPARISONS += ["tests/api/test_tokens.py::test_autocast_casts_the_embedding_and_weights"]
COMPARISONS += ["tests/kernel/test_parity.py"]
WITHOUT = ("-k", "not (gate_sums or many_steps or (test_parity and float16))")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "onednn"), [("default", "SSE41"), ("avx2", "AVX2"), (None, None)], ids=str
)
def test_comparisons_with_torch_pass_on_other_processors(level, onednn, run_tests):
    """Checks that the comparisons do not depend on the processor or on oneDNN.

    Limits the instructions that torch and oneDNN use, or turns oneDNN off. ONNX Runtime would
    ignore these limits, but none of these tests uses it.
    """
    if level is None:
        environment, options = at_level(None), ["--without-onednn"]
    else:
        skip_above(level)
        environment, options = at_level(level) | {"ONEDNN_MAX_CPU_ISA": onednn}, []
    run_tests(*COMPARISONS, *WITHOUT, *options, environment=environment, strength=2)


def skip_above(level):
    """Skips the test if this processor does not support `level`."""
    if not X86 or LEVELS.index(level) > LEVELS.index(chosen_at(None)[0]):
        pytest.skip(f"this processor does not support {level}")


def at_level(level):
    """Returns environment variables that select `level`, or the highest level if it is None."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    return environment if level is None else {**environment, "ATEN_CPU_CAPABILITY": level}


@functools.cache
def chosen_at(level):
    """Returns ATen's capability at `level`, and the instruction set of each dtype's kernel."""
    program = f"""
import torch
from namernn_fast import ops
print(torch.backends.cpu.get_cpu_capability().lower(), *map(ops.cpu_kernel, {DTYPES}))
"""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=at_level(level), capture_output=True, text=True, check=True)
    return ran.stdout.split()


def kernel_at(level, dtype):
    """Returns the instruction set of the kernel for `dtype` at `level`."""
    return chosen_at(level)[1 + DTYPES.index(dtype)]


@pytest.fixture
def run_kernel_tests(run_tests):
    """Returns a function that runs the tests selected by `selection` in `files` at one level.

    All kernels share most of their code, so covering arrays of strength 1 are enough.
    """

    def run(level, files, selection):
        paths = [f"tests/kernel/test_{name}.py" for name in files]
        options = {"slow": level == "default" or files == FILES[-1], "strength": 1}
        run_tests(*paths, "-k", selection, environment=at_level(level), **options)

    return run
