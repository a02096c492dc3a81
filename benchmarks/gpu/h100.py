"""What the model of an H100 takes as given: rates and latencies, and where each comes from."""

from dataclasses import dataclass

from benchmarks.gpu.lint.events import ATOMICS
from benchmarks.gpu.lint.sass import Instruction
from benchmarks.gpu.resources import H100

WHITEPAPER = (
    "NVIDIA's H100 whitepaper 1.04, table 3, as openxla/xla quotes it (cuda_core_info_table.cc)"
)
GUIDE = "CUDA C++ programming guide 12.6, arithmetic instructions, 9.0; read second-hand"
DATASHEET = "NVIDIA's datasheet, as glennklockwood.com/garden/processors/h100 gives it"
MT4G = "measured on an H100 80GB HBM3 by caps-tum/mt4g, in its results"
HOPPER = "arXiv 2501.12084, section 6.2; read second-hand"
ASSUMED = "assumed"


@dataclass(frozen=True)
class Constant:
    """A figure of an H100 SXM5, its unit and where it comes from."""

    value: float
    unit: str
    meaning: str
    source: str


RATES = {
    "processors": Constant(H100.processors, "", "streaming multiprocessors (SM)", WHITEPAPER),
    "clock": Constant(1.83e9, "1/s", "boost clock where tensor cores work", WHITEPAPER),
    "issue": Constant(4, "instructions/cycle", "schedulers of an SM", WHITEPAPER),
    "float32": Constant(128, "results/cycle", "float32 on the CUDA cores of an SM", GUIDE),
    "special": Constant(16, "results/cycle", "exponentials and reciprocals of an SM", GUIDE),
    "shuffle": Constant(32, "results/cycle", "shuffles of an SM", GUIDE),
    "shared": Constant(
        1,
        "row of banks/cycle",
        "shared memory of an SM: 32 banks of 4 bytes",
        "CUDA C++ programming guide, shared memory",
    ),
    "bfloat16": Constant(
        2048, "multiply-adds/cycle", "tensor cores of an SM, bfloat16, dense", DATASHEET
    ),
    "tf32": Constant(1024, "multiply-adds/cycle", "tensor cores of an SM, TF32, dense", DATASHEET),
    "hmma": Constant(
        0.629, "", "part of the peak that warp-level instructions (HMMA) reach", HOPPER
    ),
    "l2_port": Constant(64, "B/cycle", "L2, one SM", ASSUMED),
    "l2": Constant(4528.92 * 2**30, "B/s", "L2, all SMs together, reading", MT4G),
    "hbm": Constant(3.35e12, "B/s", "device memory", DATASHEET),
    "node": Constant(1e-6, "s", "from one kernel of a CUDA graph to the next", ASSUMED),
}
LATENCIES = {
    "arithmetic": Constant(4, "cycles", "arithmetic", f"{ASSUMED}, as on Volta"),
    "special": Constant(23, "cycles", "exponential, reciprocal, rounding, conversion", ASSUMED),
    "shuffle": Constant(23, "cycles", "shuffle", ASSUMED),
    "tensor": Constant(33, "cycles", "tensor cores", ASSUMED),
    "shared": Constant(29.9, "cycles", "load from shared memory", MT4G),
    "local": Constant(38, "cycles", "load of a spilled register from L1", MT4G),
    "global": Constant(219.3, "cycles", "load from L2", MT4G),
    "barrier": Constant(30, "cycles", "barrier of a program", ASSUMED),
    "fence": Constant(219.3, "cycles", "fence: the way to L2 and back", ASSUMED),
    "atomic": Constant(219.3, "cycles", "arrival at a counter in L2", ASSUMED),
}


def rate(name: str) -> float:
    """Returns one of `RATES`."""
    return RATES[name].value


def cycles(seconds: float) -> float:
    """Returns a time in cycles."""
    return seconds * rate("clock")


_UNITS = {
    **dict.fromkeys(("MUFU", "FRND", "F2F", "I2F", "F2I", "POPC", "FLO"), "special"),
    **dict.fromkeys(("SHFL", "VOTE", "MATCH", "REDUX"), "shuffle"),
    **dict.fromkeys(("HMMA", "HGMMA"), "tensor"),
    **dict.fromkeys(("LDS", "LDSM"), "shared"),
    **dict.fromkeys(("LDG", "LD", "LDGSTS"), "global"),
    **dict.fromkeys(ATOMICS, "atomic"),
    "LDL": "local",
    "BAR": "barrier",
}


def unit_of(at: Instruction) -> str:
    """Returns the unit that executes an instruction: one of `LATENCIES`."""
    if at.opcode == "MEMBAR" and {"GPU", "SYS"} & set(at.modifiers):
        return "fence"
    return _UNITS.get(at.opcode, "arithmetic")


def tensor_cycles(at: Instruction) -> float:
    """Returns for how many cycles an instruction occupies the tensor cores that execute it.

    HMMA runs on the tensor core of a warp, a quarter of an SM; HGMMA, of four warps, on all four.
    """
    kind = "tf32" if "TF32" in at.modifiers else "bfloat16"
    if at.opcode == "HGMMA":
        return at.multiply_adds / rate(kind)
    return at.multiply_adds / (rate(kind) / 4 * rate("hmma"))
