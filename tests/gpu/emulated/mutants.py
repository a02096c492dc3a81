"""Defines mutants, which are single faults to plant in the PTX of a layer's kernels.

`make gpu ONLY=emulate` runs this file as a program, which plants random faults of every kind and
prints the faults that no check detects.
"""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from layers import Layer

from namernn_fast import FusedRNN
from tools.ptx.driver import FaultError, Machine, Options, install

# Small layers. Together, their PTX matches the patterns of all mutants.
LAYERS = {
    "resident": Layer(80, "resident", "float32", 33, 3, layout="lengths"),
    "cooperative": Layer(80, "cooperative", "float32", 200, 3, layout="lengths"),
    "tensor cores": Layer(80, "cooperative", "float16", 300, 3, layout="lengths"),
    "TF32": Layer(80, "resident", "TF32", 64, 5),
    "streamed": Layer(80, "streamed", "float32", 160, 5, layout="lengths", processors=2),
    "wgmma": Layer(90, "streamed", "bfloat16", 300, 40, T=2, processors=8),
}

_REGISTER = r"%[a-z]+\d+"
_ADD = r"red\.global\.gpu\.release\.add\.u32"
_SUM = rf"(fma\.rn\.f32\s+(?:{_REGISTER}, ){{3}}){_REGISTER};"


def _doubled(place):
    return place[1] + str(int(place[2]) * 2 % 32)


def _one_more(place):
    return place[0].replace(place[1], str(int(place[1]) + 1))


def _swapped(place):
    return place[0].replace(f"{place[1]}, {place[2]}", f"{place[2]}, {place[1]}")


Into = str | Callable[[re.Match], str]
KINDS: dict[str, tuple[str, Into]] = {
    # Faults in the synchronization between programs.
    "a relaxed arrival": (r"gpu\.release", "gpu.relaxed"),
    "a relaxed load of the counter": (r"gpu\.acquire", "gpu.relaxed"),
    "an arrival that counts twice": (rf"({_ADD} \[.*?\], ){_REGISTER}", r"\g<1>2"),
    "an arrival by every thread": (rf"@{_REGISTER} ({_ADD})", r"\1"),
    "no arrival": (rf"@{_REGISTER} {_ADD}.*;", ""),
    # Faults in the synchronization between the warps of a program.
    "no barrier": (r"bar\.sync\s+0;", ""),
    "a barrier for only one warp": (
        r"bar\.sync\s+0;",
        "{ .reg .pred first; setp.lt.u32 first, %tid.x, 32; @first bar.sync 0; }",
    ),
    "a wait for fewer copies": (r"cp\.async\.wait_group\s+(\d+)", _one_more),
    "copies without a group": (r"cp\.async\.commit_group;", ""),
    "no wait for products": (r"wgmma\.wait_group\.sync\.aligned (\d+)", _one_more),
    # Faults in addresses and masks.
    "a store without its mask": (rf"@{_REGISTER} (st\.global)", r"\1"),
    "a load without its mask": (rf"@{_REGISTER} (ld\.global\.(?!gpu))", r"\1"),
    "a store 16 bytes too far": (r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>16"),
    "a load 16 bytes too far": (r"(ld\.global\.(?!gpu).*\+ )0", r"\g<1>16"),
    "a copy of all bytes": (r"(cp\.async\.c[ag].*?, 0x\w+), %r\d+", r"\1"),
    "a shared load 16 bytes too far": (r"(ld\.shared\S*\s+\S+.*\[%r\d+)\]", r"\1+16]"),
    "a shared store 16 bytes too far": (r"(st\.shared\S*\s+\[%r\d+)\]", r"\1+16]"),
    "a matrix not transposed": (r"\.trans\.shared", ".shared"),
    "one step too many": (r"setp\.lt\.s64", "setp.le.s64"),
    "one sequence too many": (r"setp\.lt\.s32", "setp.le.s32"),
    "an address offset of 4": (r"(add\.s64\s+%rd\d+, %rd\d+, )\d+;", r"\g<1>4;"),
    "the wrong branch": (rf"@({_REGISTER}) bra ", r"@!\1 bra "),
    # Faults in arithmetic.
    "a shuffle with the wrong lane": (r"(shfl\.sync\.bfly.*?, )(\d+)", _doubled),
    "a sum of only one product": (_SUM, r"\g<1>0f00000000;"),
    "rows in the wrong order": (r"mma\.sync\S+ \{.*?\}, \{ *(\S+), (\S+),", _swapped),
    "a product that does not accumulate": (r"(wgmma\.mma_async.*?)%p\d+, 1", r"\g<1>0, 1"),
    "operands not rounded": (r"(add\.s32\s+%r\d+, %r\d+, )4096", r"\g<1>0"),
    "no sign": (r"(and\.b32\s+%r\d+, %r\d+, )-2147483648", r"\g<1>0"),
    "2 instead of 1": (r"(fma\.rn\.f32.*?)0f3F800000;", r"\g<1>0f40000000;"),
}
"""A multi-line regular expression and its replacement, by the name of the fault."""


@dataclass(frozen=True)
class Mutant:
    """A fault, and the place in the PTX where it is planted."""

    kind: str
    """A key of `KINDS`."""
    layer: str
    """A key of `LAYERS`."""
    kernel: str = "forward"
    which: int = 0
    """The 0-based index of the match to change."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.layer}, {self.kernel}"

    def places(self, text: str) -> list[re.Match]:
        """Returns all matches of the fault's pattern, or none if `text` is not PTX of `kernel`."""
        if f".entry {self.kernel}_kernel(" not in text:
            return []
        return list(re.finditer(KINDS[self.kind][0], text, re.MULTILINE))

    def plant(self, text: str) -> str:
        """Returns the PTX with the fault, or the unchanged PTX if the pattern does not match."""
        places = self.places(text)
        if not places:
            return text
        place, into = places[self.which], KINDS[self.kind][1]
        changed = into(place) if callable(into) else place.expand(into)
        return text[: place.start()] + changed + text[place.end() :]


MUTANTS = [
    Mutant("a relaxed arrival", "cooperative"),
    Mutant("a relaxed arrival", "tensor cores", "backward"),
    Mutant("a relaxed load of the counter", "cooperative"),
    Mutant("a relaxed load of the counter", "tensor cores", "backward"),
    Mutant("an arrival that counts twice", "cooperative"),
    Mutant("an arrival by every thread", "cooperative"),
    Mutant("no arrival", "cooperative"),
    Mutant("no barrier", "resident", which=3),
    Mutant("no barrier", "tensor cores", which=-2),
    Mutant("no barrier", "streamed", "backward", which=1),
    Mutant("a barrier for only one warp", "resident", which=2),
    Mutant("a wait for fewer copies", "streamed"),
    Mutant("copies without a group", "streamed", which=1),
    Mutant("no wait for products", "wgmma"),
    Mutant("a store without its mask", "cooperative"),
    Mutant("a load without its mask", "tensor cores", "backward", which=-1),
    Mutant("a store 16 bytes too far", "tensor cores"),
    Mutant("a load 16 bytes too far", "resident", "backward", which=-1),
    Mutant("a copy of all bytes", "streamed"),
    Mutant("a shared load 16 bytes too far", "resident"),
    Mutant("a shared store 16 bytes too far", "TF32"),
    Mutant("a matrix not transposed", "tensor cores", "backward"),
    Mutant("one step too many", "streamed"),
    Mutant("one sequence too many", "tensor cores"),
    Mutant("an address offset of 4", "cooperative"),
    Mutant("the wrong branch", "cooperative", which=-1),
    Mutant("a shuffle with the wrong lane", "cooperative"),
    Mutant("a sum of only one product", "streamed", which=40),
    Mutant("rows in the wrong order", "TF32"),
    Mutant("a product that does not accumulate", "wgmma"),
    Mutant("operands not rounded", "TF32"),
    Mutant("no sign", "resident"),
    Mutant("2 instead of 1", "resident", "backward"),
]


def results(layer: Layer) -> dict[str, torch.Tensor]:
    """Runs a layer forward and backward, and returns its results and gradients by name."""
    return layer.case.run(FusedRNN, layer.case.dtype)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Returns the largest error relative to its tensor's largest magnitude, or infinity for NaN."""
    return max(
        (found[name].double() - value.double()).abs().nan_to_num(torch.inf).max().item()
        / value.double().abs().max().clamp_min(1e-30).item()
        for name, value in wanted.items()
    )


_ROUNDING = {"float32": 3e-5, "TF32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}


def caught(machine: Machine, layer: Layer, change: Callable[[str], str], wanted) -> str | None:
    """Runs the layer with a fault. Returns the kind of check that detected it, or None."""
    machine.change = change
    try:
        for seed in (1, 2):
            machine.options = Options(
                seed=seed, flush=5 * (seed - 1), patience=1_000_000, limit=10_000_000
            )
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


def main() -> None:
    """Plants random faults, prints undetected ones, and counts the detected ones of each kind."""
    machine, chance = install(), random.Random(0)
    planted: dict[str, list[bool]] = {}
    for name, layer in LAYERS.items():
        machine.device = layer.device
        precision = "tf32" if layer.dtype == "TF32" else "ieee"
        torch.backends.cudnn.rnn.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = precision
        machine.kernels.clear()
        wanted = results(layer)
        texts = list(machine.kernels)
        for kernel, kind in itertools.product(("forward", "backward"), KINDS):
            places = [
                n for text in texts for n, _ in enumerate(Mutant(kind, name, kernel).places(text))
            ]
            for which in chance.sample(places, min(2, len(places))):
                mutant = Mutant(kind, name, kernel, which)
                how = caught(machine, layer, mutant.plant, wanted)
                planted.setdefault(kind, []).append(how is not None)
                if how is None:
                    print(f"survived: {mutant}, {_where(mutant, texts)}", flush=True)
    for kind, found in planted.items():
        print(f"{kind}: {sum(found)} of {len(found)} found")
    outcomes = [is_found for found in planted.values() for is_found in found]
    print(f"{sum(outcomes)} of {len(outcomes)} found")


def _where(mutant: Mutant, texts: list[str]) -> str:
    """Returns the PTX instruction that a mutant changes, and the Python line it comes from."""
    text, place = next(
        (text, found[mutant.which]) for text in texts if (found := mutant.places(text))
    )
    locations = re.findall(r"\.loc.*?// (\S+)", text[: place.start()])
    return f"{locations[-1] if locations else ''}: {place[0].strip()}"


if __name__ == "__main__":
    main()
