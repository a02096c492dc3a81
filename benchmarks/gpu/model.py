"""What the layer takes on an H100, predicted from the machine code of the kernels.

Nothing is measured on a GPU: the counts are read off the code that the compiler emits for the plan
that `choose` makes, the rates and latencies are those of `h100.py`. `model_page.py` writes the
page. Legend: T steps, B sequences, H hidden units, D input features.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import resources
from benchmarks.gpu.grid import PRECISIONS
from benchmarks.gpu.h100 import H100, cycles, rate, tensor_cycles
from benchmarks.gpu.lint import cases
from benchmarks.gpu.lint.building import build
from benchmarks.gpu.lint.cases import Case
from benchmarks.gpu.lint.counts import count, executions, turns_of_loops
from benchmarks.gpu.lint.events import Kernel
from benchmarks.gpu.lint.sass import LANES
from benchmarks.gpu.memory import SECTOR, Memory
from benchmarks.harness.grid import TRAINING, Cell
from namernn_fast.gpu.plan import Plan
from namernn_fast.names import encode_names
from namernn_fast.names.dataset import embedded_sample

BYTES = {precision.name: precision.dtype.itemsize for precision in PRECISIONS}
BY_NAME = {precision.name: precision for precision in PRECISIONS}
# Arguments of the kernels with a row for each step and sequence, which come from device memory or
# go there.
_ROWS = {"projected", "output", "grad_output", "dz", "previous"}


class Facts(NamedTuple):
    """What a step of a kernel takes, read off its machine code."""

    instructions: int
    """Issue slots of a warp."""
    arithmetic: int
    """Instructions of a warp that compute in float32."""
    special: int
    """Exponentials and reciprocals of a warp."""
    shuffles: int
    """Shuffles of a warp."""
    global_bytes: int
    """Bytes of global memory in the sectors that a program reads and writes."""
    bank_rows: int
    """Rows of banks of shared memory that a program reads and writes."""
    least_bank_rows: int
    """Rows of banks that it would read and write without bank conflicts."""
    tensor_cycles: float
    """Cycles for which the products of a program occupy all tensor cores of an SM."""
    latency: int
    """Cycles of one warp, simulated."""
    rows: int
    """Rows of each sequence that are read or written in device memory, each once."""
    resident: int
    """Programs that fit an SM at the same time."""


def plan_of(cell: Cell, precision: str) -> Plan:
    """Returns the plan that the layer makes for a cell on an H100."""
    return case_of(cell, precision, "forward").build.plan


def case_of(cell: Cell, precision: str, kernel: str) -> Case:
    """Returns the kernel of a cell as it is compiled, with dense rows.

    Args:
        cell: The cell.
        precision: The name of the precision.
        kernel: `forward` or `backward`.
    """
    return cases.case_of(cell, BY_NAME[precision], kernel)


def facts_of(case: Case) -> Facts:
    """Compiles a kernel and reads off what a step takes."""
    built, plan = build(case), case.build.plan
    kernel = Kernel(case, built)
    memory, counts = Memory(kernel), count(kernel)
    if kernel.time_loop is None:
        raise ValueError(f"{case.name} has no loop over time")
    rows, least, sectors, tensor = 0, 0, 0, 0.0
    for place, times in executions(kernel, turns_of_loops(kernel)):
        at = kernel[place]
        access = memory.shared(place)
        rows, least = rows + times * access.rows, least + times * access.least
        sectors += times * memory.sectors(place)
        if at.opcode in ("HMMA", "HGMMA"):
            tensor += times * tensor_cycles(at)
    occupied = resources.occupancy(H100, plan, built.taken)
    return Facts(
        *(counts.instructions, counts.arithmetic, counts.special, counts.shuffles),
        global_bytes=sectors * SECTOR * plan.warps,
        bank_rows=rows * plan.warps,
        least_bank_rows=least * plan.warps,
        tensor_cycles=tensor * plan.warps / 4,
        latency=counts.latency,
        rows=len(_ROWS & kernel.pointers),
        resident=max(1, round(occupied * 64 / plan.warps)),
    )


class Step(NamedTuple):
    """One step of the recurrence of all sequences of a cell."""

    seconds: float
    bound: str
    """What takes the most time."""


def units_of(facts: Facts, plan: Plan, resident: int) -> dict[str, float]:
    """Returns the cycles in a step for which the programs of an SM occupy each of its units.

    Args:
        facts: Of the kernel.
        plan: Its plan.
        resident: The programs of the SM.
    """
    warps = plan.warps * resident
    return {
        "instructions": facts.instructions * warps / rate("issue"),
        "float32": facts.arithmetic * warps * LANES / rate("float32"),
        "exponentials": facts.special * warps * LANES / rate("special"),
        "shuffles": facts.shuffles * warps * LANES / rate("shuffle"),
        "shared memory": facts.bank_rows * resident / rate("shared"),
        "tensor cores": facts.tensor_cycles * resident,
        "L2 port": facts.global_bytes * resident / rate("l2_port"),
    }


def _wave(facts: Facts, plan: Plan, programs: int, of_device: float) -> tuple[float, str]:
    """Returns the cycles of a step of programs that run at the same time, and what binds them."""
    busiest = math.ceil(programs / H100.processors)
    terms = {"latency": facts.latency} | units_of(facts, plan, busiest)
    terms["L2"] = cycles(facts.global_bytes * programs / rate("l2"))
    terms["device memory"] = cycles(of_device * programs / rate("hbm"))
    bound = max(terms, key=terms.__getitem__)
    return terms[bound], bound


def step(facts: Facts, plan: Plan, batch: int, hidden_size: int, width: int) -> Step:
    """Returns a step of all sequences, whose programs take turns where they do not fit at once.

    Args:
        facts: Of the kernel.
        plan: Its plan.
        batch: The sequences.
        hidden_size: The hidden units.
        width: The bytes of a value.
    """
    blocks = math.ceil(batch / plan.block_b)
    programs = plan.members * blocks
    if plan.kind != "streamed":  # it reads and writes rows of sequences alone
        present = batch / (blocks * plan.block_b)
        facts = facts._replace(global_bytes=round(facts.global_bytes * present))
    at_once = H100.processors * facts.resident
    # Of one program, in device memory.
    of_device = facts.rows * batch * hidden_size * width / programs
    turns, rest = divmod(programs, at_once)
    found = [_wave(facts, plan, at_once, of_device)] * turns
    if rest:
        found.append(_wave(facts, plan, rest, of_device))
    return Step(sum(of for of, _ in found) / rate("clock"), found[0][1])


@cache
def lengths() -> tuple[int, ...]:
    """Returns the lengths of the names of the embedded sample, which every checkout has."""
    return tuple(encode_names([name for name, _ in embedded_sample().rows]).lengths.tolist())


def alive(cell: Cell) -> list[int]:
    """Returns how many sequences there are at each step."""
    if cell.seq_len is not None:
        return [cell.batch] * cell.seq_len
    known = lengths()
    shares = (sum(n > t for n in known) / len(known) for t in range(max(known)))
    return [math.ceil(cell.batch * share) for share in shares]


def product(rows: int, inner: int, columns: int, precision: str) -> float:
    """Returns the seconds of a matrix product at best: at the peak, from and to device memory."""
    values = rows * inner + inner * columns + rows * columns
    of_rate = rate(precision) * H100.processors * rate("clock")
    return max(rows * inner * columns / of_rate, BYTES[precision] * values / rate("hbm"))


def products(cell: Cell, precision: str) -> float:
    """Returns the seconds of what is parallel in time: the projection, and in training
    grad_weight_ih, grad_weight_hh and the sum for the biases."""
    rows, size, hidden = sum(alive(cell)), cell.input_size, cell.hidden_size
    seconds = product(rows, size, hidden, precision)
    if cell.mode == TRAINING:
        seconds += product(hidden, rows, size, precision) + product(hidden, rows, hidden, precision)
        seconds += BYTES[precision] * rows * hidden / rate("hbm")
    return seconds


@dataclass(frozen=True)
class Record:
    """All that predictions are made from, besides constants: what `make gpu-model` records."""

    triton: str
    facts: dict[str, Facts]
    """By the name of the case."""
    launches: dict[str, list[str]]
    """What a call launches, by precision and cell."""

    def document(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        facts = {name: one._asdict() for name, one in self.facts.items()}
        return {"triton": self.triton, "kernels": facts, "launches": self.launches}

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Record":
        """Returns the record that `document` returned."""
        facts = {name: Facts(**one) for name, one in document["kernels"].items()}
        return cls(document["triton"], facts, document["launches"])

    def step(
        self,
        cell: Cell,
        precision: str,
        kernel: str,
        batch: int | None = None,
        conflicts: bool = True,
    ) -> Step:
        """Returns a step of a cell.

        Args:
            cell: The cell.
            precision: The name of the precision.
            kernel: `forward` or `backward`.
            batch: The sequences that are there; all by default.
            conflicts: Whether bank conflicts take time.
        """
        case = case_of(cell, precision, kernel)
        sequences = cell.batch if batch is None else batch
        facts, plan = self.facts[case.name], case.build.plan
        if not conflicts:
            facts = facts._replace(bank_rows=facts.least_bank_rows)
        return step(facts, plan, sequences, cell.hidden_size, BYTES[precision])

    def kernels(self, cell: Cell, precision: str) -> list[str]:
        """Returns what a call of a cell launches."""
        return self.launches[key_of(cell, precision)]

    def graph_seconds(self, cell: Cell, precision: str) -> float:
        """Returns the predicted seconds of one replay of a CUDA graph."""
        passes = ["forward", "backward"] if cell.mode == TRAINING else ["forward"]
        steps = {
            (kernel, batch): self.step(cell, precision, kernel, batch).seconds
            for kernel in passes
            for batch in set(alive(cell))
        }
        through_time = sum(steps[kernel, batch] for kernel in passes for batch in alive(cell))
        gaps = len(self.kernels(cell, precision)) * rate("node")
        return through_time + products(cell, precision) + gaps


def key_of(cell: Cell, precision: str) -> str:
    """Returns the name of a cell in a precision."""
    return f"{precision} {cell}"


def batch_sizes_of(cell: Cell) -> torch.Tensor | None:
    """Returns the batch sizes of a packed cell."""
    return torch.tensor(alive(cell)) if cell.seq_len is None else None
