"""Measures the limits of this machine for roofline.py, and the cost of a barrier.

If `ATEN_CPU_CAPABILITY` holds the kernels to a lower instruction set, the limits are that set's.
"""

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.harness.paths import ROOT
from namernn_fast import ops

SOURCE = Path(__file__).with_name("probe.cpp")
TARGETS = {
    "avx512": ["-march=x86-64-v4", "-mtune=skylake-avx512", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3", "-mtune=haswell"],
}
"""Compiler flags for the instruction sets of float kernels, tuned as in `setup.py`."""
SECONDS = 0.2
MOMENT = 0.0002
PRODUCTS = 5
"""The number of times that a product is measured."""


@dataclass(frozen=True)
class Machine:
    """Rates per second, measured on an otherwise idle machine."""

    threads: int
    flops: float
    """Floating-point operations of all threads together; a multiply-add counts as two."""
    l2_rate: float
    """Bytes per second that one core reads from a block half the size of its L2 cache."""
    beyond_l2_rate: float
    """Bytes per second that one core reads from a block four times the size of its L2 cache."""
    l2_bytes: int
    """Size of a core's L2 cache in bytes."""
    hop: float
    """The minimum seconds to pass a word from core to core; a barrier takes two such hops. 0 on one
    thread."""
    hop_median: float
    """The median seconds to pass a word from core to core; 0 on one thread."""


@cache
def _probe() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    is_arm = platform.machine() in ("arm64", "aarch64")
    target = ["-mcpu=native"] if is_arm else TARGETS.get(ops.cpu_kernel(), [])
    library = Path(tempfile.mkdtemp()) / "probe.so"
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast", *target]
    flags += ["-fno-math-errno", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
    probe = ctypes.CDLL(str(library))
    probe.multiply_add_rate.restype = probe.read_rate.restype = ctypes.c_double
    probe.product_rate.restype = ctypes.c_double
    probe.product_rate.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_double]
    probe.multiply_add_rate.argtypes = [ctypes.c_double]
    probe.read_rate.argtypes = [ctypes.c_int64, ctypes.c_double]
    probe.l2_bytes.restype = ctypes.c_int64
    return probe


def hop() -> tuple[float, float]:
    """Returns the minimum and the median seconds to pass a word from core to core."""
    least, median = ctypes.c_double(), ctypes.c_double()
    _probe().hop_seconds(ctypes.byref(least), ctypes.byref(median))
    return least.value, median.value


def multiply_add_rate(threads: int, seconds: float) -> float:
    """Returns the floating-point operations per second of `threads` threads together."""
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter's lock
        return sum(pool.map(_probe().multiply_add_rate, [seconds] * threads))


def read_rate(threads: int, block_bytes: int, seconds: float) -> float:
    """Returns the bytes per second at which threads reread a block, split equally among them."""
    parts = [block_bytes // threads] * threads
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(_probe().read_rate, parts, [seconds] * threads))


@cache  # many workloads have products of the same shape
def product_share(rows: int, features: int, width: int) -> float:
    """Returns the fraction of a core's peak that a product of the kernels reaches, without a layer.

    The matrices have the shapes (rows, features) and (features, width).
    """
    shares = []
    for _ in range(PRODUCTS):
        rate = _probe().product_rate(rows, features, width, SECONDS / PRODUCTS)
        shares.append(rate / momentary_rate())
    return statistics.median(shares)


def momentary_rate() -> float:
    """Measures the calling thread's operations per second, too briefly for the clock to change."""
    return _probe().multiply_add_rate(MOMENT)


def measure(threads: int) -> Machine:
    """Measures this machine in about a second and a half."""
    probe = _probe()
    l2_bytes = probe.l2_bytes()
    return Machine(
        threads,
        multiply_add_rate(threads, 2 * SECONDS),
        probe.read_rate(l2_bytes // 2, SECONDS),
        probe.read_rate(4 * l2_bytes, SECONDS),
        l2_bytes,
        *(hop() if threads > 1 else (0.0, 0.0)),
    )
