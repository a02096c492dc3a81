"""Faults to plant in the PTX of a layer's kernels, each in one place."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import Layer

from namernn_fast import FusedRNN
from tools.ptx.driver import FaultError, Machine, Options

# Small layers that have what is changed.
LAYERS = {
    "resident": Layer(80, "resident", "float32", 33, 3, layout="lengths"),
    "cooperative": Layer(80, "cooperative", "float32", 200, 3, layout="lengths"),
    "tensor cores": Layer(80, "cooperative", "float16", 300, 3, layout="lengths"),
    "TF32": Layer(80, "resident", "TF32", 64, 5),
    "streamed": Layer(80, "streamed", "float32", 160, 5, layout="lengths", processors=2),
    "wgmma": Layer(90, "streamed", "bfloat16", 300, 40, T=2, processors=8),
}

_REGISTER = r"%[a-z]+\d+"
_ADD = "red.global.gpu.release.add.u32"


@dataclass(frozen=True)
class Mutant:
    """A fault to plant."""

    name: str
    layer: str
    """Of `LAYERS`."""
    pattern: str
    """What is searched; `^` and `$` are the ends of a line."""
    into: str | Callable[[re.Match], str]
    kernel: str = "forward"
    """Whose PTX is changed."""
    which: int = 0
    """Which of the places that are found."""

    def plant(self, text: str) -> str:
        """Returns the PTX with the fault, or as it is, where it is of another kernel."""
        if f".entry {self.kernel}_kernel(" not in text:
            return text
        places = list(re.finditer(self.pattern, text, re.MULTILINE))
        assert places, f"{self.name}: {self.pattern} is not in the kernel"
        place = places[self.which]
        into = self.into(place) if callable(self.into) else place.expand(self.into)
        return text[: place.start()] + into + text[place.end() :]


def _doubled(place):
    return place[1] + str(int(place[2]) * 2 % 32)


def _one_more(place):
    return place[0].replace(place[1], str(int(place[1]) + 1))


def _swapped(place):
    return place[0].replace(f"{place[1]}, {place[2]}", f"{place[2]}, {place[1]}")


_ARRIVAL = rf"bar\.sync\s+0;((?:(?!bar\.sync)[\s\S])*?{re.escape(_ADD)})"
MUTANTS = [
    # What programs exchange.
    Mutant("a relaxed arrival", "cooperative", r"gpu\.release", "gpu.relaxed"),
    Mutant("a relaxed look at the counter", "cooperative", r"gpu\.acquire", "gpu.relaxed"),
    Mutant("a relaxed arrival", "tensor cores", r"gpu\.release", "gpu.relaxed", "backward"),
    Mutant("a relaxed look", "tensor cores", r"gpu\.acquire", "gpu.relaxed", "backward"),
    Mutant("an arrival of 2", "cooperative", rf"({_ADD} \[.*?\], ){_REGISTER}", r"\g<1>2"),
    Mutant("an arrival of every thread", "cooperative", rf"@{_REGISTER} ({_ADD})", r"\1"),
    Mutant("no arrival", "cooperative", rf"@{_REGISTER} {_ADD}.*;", ""),
    # What the warps of a program exchange.
    Mutant("no barrier", "resident", r"bar\.sync\s+0;", "", which=3),
    Mutant("no barrier", "tensor cores", r"bar\.sync\s+0;", "", which=-2),
    Mutant("no barrier", "streamed", r"bar\.sync\s+0;", "", "backward", which=1),
    Mutant("a wait for fewer copies", "streamed", r"cp\.async\.wait_group\s+(\d+)", _one_more),
    Mutant("copies that are in no group", "streamed", r"cp\.async\.commit_group;", "", which=1),
    Mutant("no wait for products", "wgmma", r"wgmma\.wait_group\.sync\.aligned (\d+)", _one_more),
    Mutant("a barrier of one warp", "resident", r"^\s+bar\.sync", "@%p1 bar.sync", which=2),
    # Where memory is read and written.
    Mutant("a store without its mask", "cooperative", rf"@{_REGISTER} (st\.global)", r"\1"),
    Mutant("a load without its mask", "cooperative", rf"@{_REGISTER} (ld\.global\.b32)", r"\1"),
    Mutant("a store farther on", "tensor cores", r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>16"),
    Mutant("a load farther on", "resident", r"(ld\.global\.cg.*\+ )0", r"\g<1>16", "backward"),
    Mutant("a copy of all bytes", "streamed", r"(cp\.async\.c[ag].*?, 0x\w+), %r\d+", r"\1"),
    Mutant("shared memory beside", "resident", r"(ld\.shared\S*\s+\S+.*\[%r\d+)\]", r"\1+16]"),
    Mutant("shared memory beside", "TF32", r"(st\.shared\S*\s+\[%r\d+)\]", r"\1+16]"),
    Mutant("a matrix not transposed", "tensor cores", r"\.trans\.shared", ".shared", "backward"),
    Mutant("a step too many", "streamed", r"setp\.lt\.s64", "setp.le.s64"),
    Mutant("an address 4 farther", "cooperative", r"(add\.s64\s+%rd\d+, %rd\d+, )\d+;", r"\g<1>4;"),
    # What is computed.
    Mutant("a shuffle with another lane", "cooperative", r"(shfl\.sync\.bfly.*?, )(\d+)", _doubled),
    Mutant(
        *("a sum of one product", "streamed"),
        *(rf"(fma\.rn\.f32\s+(?:{_REGISTER}, ){{3}}){_REGISTER};", r"\g<1>0f00000000;"),
        which=40,
    ),
    Mutant("rows in another order", "TF32", r"mma\.sync\S+ \{.*?\}, \{ *(\S+), (\S+),", _swapped),
    Mutant("a product that adds nothing", "wgmma", r"(wgmma\.mma_async.*?)%p\d+, 1", r"\g<1>0, 1"),
    Mutant("operands not rounded", "TF32", r"(add\.s32\s+%r\d+, %r\d+, )4096", r"\g<1>0"),
    Mutant("tanh of |x|", "resident", r"(and\.b32\s+%r\d+, %r\d+, )-2147483648", r"\g<1>0"),
    Mutant(
        "2 - h * h",
        "resident",
        r"(fma\.rn\.f32.*?)0f3F800000;",
        r"\g<1>0f40000000;",
        "backward",
    ),
    Mutant("a loop left early", "cooperative", r"@(%p\d+) bra", r"@!\1 bra", which=-1),
]


def results(layer: Layer) -> dict[str, torch.Tensor]:
    """Returns the results of a layer."""
    return layer.case.run(FusedRNN, layer.case.dtype)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference as a share of a result's largest value; NaN is infinite."""
    return max(
        (found[name].double() - value.double()).abs().nan_to_num(torch.inf).max().item()
        / value.double().abs().max().clamp_min(1e-30).item()
        for name, value in wanted.items()
    )


_ROUNDING = {"float32": 3e-5, "TF32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}


def caught(machine: Machine, layer: Layer, change: Callable[[str], str], wanted) -> str | None:
    """Plants a fault; returns what tells, or None."""
    machine.change = change
    try:
        for seed in (1, 2):
            machine.options = Options(seed=seed, flush=5 * (seed - 1), patience=2_000_000)
            try:
                found = results(layer)
            except FaultError:
                return "assertion"
            if machine.faults:
                return machine.faults[0].kind
            if distance(found, wanted) > _ROUNDING[layer.dtype]:
                return "result"
        return None
    finally:
        machine.change = lambda text: text
        machine.faults.clear()
