"""The calls that `bits` compares: options, layouts, dtypes, sizes and values.

Most options and layouts are combined exhaustively. Everything else is random, from a generator that
is seeded with the name of the probe.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

DTYPES = ("float32", "float64", "bfloat16", "float16")
NONLINEARITIES = ("tanh", "relu")
LEAKY_NONLINEARITIES = (*NONLINEARITIES, "sigmoid", "softplus")
LAYOUTS = ("dense", "unbatched", "packed", "packed unsorted", "lengths", "jagged")
EITHER = (False, True)
LAYERS = {"rnn": "FusedRNN", "gru": "FusedGRU", "lstm": "FusedLSTM", "leaky": "FusedLeakyRNN"}
"""The fused layer of each cell."""

ALL = "all"
WANTED = (ALL, "weights", "input", "hx", "nothing")
SECOND_ORDER = "second order"
GIVEN = ("both", "output", "h_n", "sums")


class Sizes(NamedTuple):
    """The sizes of a call."""

    input_size: int
    hidden_size: int
    seq_len: int
    batch: int


TINY, ALIGNED = Sizes(5, 7, 6, 4), Sizes(16, 32, 9, 5)
ODD, BROAD = Sizes(33, 70, 12, 17), Sizes(64, 100, 5, 40)
SMALL = (
    *(TINY, ALIGNED, ODD, BROAD, Sizes(64, 64, 8, 3), Sizes(1, 1, 3, 2), Sizes(8, 257, 4, 9)),
    *(Sizes(128, 128, 20, 2), Sizes(3, 48, 1, 64), Sizes(96, 16, 7, 33)),
)
# Pairs of seq_len and batch around two limits in the backward pass. A block has at least 256 rows.
# If a group of sequences has more than 8,192 rows, gradients are summed over 4,096 rows at a time.
# With two threads, a group may have half as many rows.
ROWS = (
    *((1, 255), (1, 257), (51, 5), (16, 16), (257, 1), (511, 1), (64, 8), (19, 27)),
    *((4095, 1), (64, 64), (17, 241), (4097, 1), (32, 256), (33, 249), (100, 83), (8193, 1)),
    *((128, 128), (130, 130)),
)
# Layers so wide that a block has 256 rows, whatever the cache size.
WIDE = (Sizes(384, 384, 3, 85), Sizes(384, 384, 3, 86), Sizes(350, 384, 19, 27))
# A single sequence of at most 16 steps uses unpacked weights if the sizes fill whole vectors.
SHORT = tuple(
    Sizes(*features, steps, 1)
    for features in ((8, 12), (16, 16), (32, 48), (64, 64), (64, 256))
    for steps in (1, 2, 8, 16, 17)
)
# Stacks of layers. On two threads about half of them run as waves.
STACKS = (
    *(Sizes(32, 32, 64, 1), Sizes(32, 32, 300, 1), Sizes(20, 36, 250, 2), Sizes(64, 80, 250, 3)),
    *(Sizes(128, 96, 200, 1), Sizes(64, 128, 64, 3), Sizes(64, 256, 64, 1), Sizes(48, 60, 100, 5)),
)


@dataclass(frozen=True)
class Probe:
    """One call and its gradients, to compare between two revisions."""

    sizes: Sizes
    dtype: str = "float32"
    layout: str = "dense"
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    num_layers: int = 1
    dropout: float = 0.0
    hx: bool = True
    reset: bool = False
    strided: bool = False
    """Whether input, hx and the given gradients consist of every other feature of wider tensors."""
    batch_invariant: bool = False
    wanted: str = ALL
    """The tensors that need a gradient; `SECOND_ORDER` differentiates the gradients again."""
    given: str = "both"
    """The results that get a gradient; with "sums", each gets an expanded 1, as from `sum()`."""
    values: str = "normal"
    call: str = "module"
    """The callable: "module" is `FusedRNN`, "function" is `rnn`, "cell" is `FusedRNNCell`, or
    their counterparts for another `cell`."""
    autocast: str = ""
    """The dtype of autocast, or an empty string for none."""
    cell: str = "rnn"
    """The recurrent cell, a key of `LAYERS`."""
    noise: bool = False
    """Whether noise is added to the states of a leaky cell."""

    def wants(self, leaf: str) -> bool:
        """Whether the gradient of "weights", "input" or "hx" is wanted."""
        return self.wanted in (ALL, SECOND_ORDER, leaf)

    @property
    def name(self) -> str:
        """The fields that differ from their defaults, in words; seeds the probe's generators."""
        sizes = (f"{letter}{size}" for letter, size in zip("DHTB", self.sizes, strict=True))
        words = [self.call, self.layout, self.dtype, *sizes]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("call", "layout", "dtype", "sizes") or value == field.default:
                continue
            words.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(words)


def option_probes() -> Iterator[Probe]:
    """Yields all combinations of most options, layouts and dtypes; other fields are random."""
    for dtype, layout, reset, nonlinearity, bidirectional, layers, hx in itertools.product(
        DTYPES, LAYOUTS, EITHER, NONLINEARITIES, EITHER, (1, 3), EITHER
    ):
        if reset and layout == "jagged":
            continue  # not supported
        options = {"bidirectional": bidirectional, "num_layers": layers, "hx": hx, "reset": reset}
        probe = Probe(TINY, dtype, layout, nonlinearity, **options)
        probe = replace(probe, sizes=random.Random(probe.name).choice(SMALL))
        draw = random.Random(probe.name)
        wanted = draw.choice((ALL, ALL, ALL, *WANTED))
        yield replace(
            probe,
            bias=draw.choice(EITHER),
            batch_first=draw.choice(EITHER),
            strided=draw.choice(EITHER),
            batch_invariant=draw.random() < 0.2,
            wanted=ALL if wanted == "hx" and not hx else wanted,
            given=draw.choice(("both", "both", *GIVEN)),
            call=draw.choice(("module", "module", "function")),
        )


def size_probes() -> Iterator[Probe]:
    """Yields probes with sizes around the thresholds at which the kernels switch methods."""
    for dtype in DTYPES:
        for index, (steps, batch) in enumerate(ROWS):
            for layout in ("dense", LAYOUTS[2 + index % 4]):
                sizes = Sizes(24, 40, steps, batch)
                nonlinearity = NONLINEARITIES[index // 2 % 2]
                yield Probe(sizes, dtype, layout, nonlinearity, hx=index % 3 > 0)
        for sizes in WIDE:
            yield Probe(sizes, dtype)
            yield Probe(sizes, dtype, "packed unsorted", "relu")
        for sizes, nonlinearity, invariant in itertools.product(SHORT, NONLINEARITIES, EITHER):
            probe = Probe(sizes, dtype, nonlinearity=nonlinearity, batch_invariant=invariant)
            draw = random.Random(probe.name)
            layout = draw.choice(("unbatched", "dense", "packed", "jagged"))
            bias, hx, strided = (draw.choice(EITHER) for _ in range(3))
            yield replace(probe, layout=layout, bias=bias, hx=hx, strided=strided)
        for sizes, nonlinearity in itertools.product(STACKS, NONLINEARITIES):
            probe = Probe(sizes, dtype, "dense", nonlinearity, num_layers=3)
            yield probe
            draw = random.Random(probe.name)
            yield replace(probe, layout=draw.choice(LAYOUTS[2:5]), reset=draw.choice(EITHER))


def value_probes() -> Iterator[Probe]:
    """Yields probes with values that saturate tanh, overflow, or are not finite."""
    for dtype, nonlinearity, values, layout, layers, sizes in itertools.product(
        DTYPES, NONLINEARITIES, ("saturated", "non-finite"), LAYOUTS[:5:2], (1, 2), (ALIGNED, ODD)
    ):
        yield Probe(sizes, dtype, layout, nonlinearity, num_layers=layers, values=values)


def gradient_probes() -> Iterator[Probe]:
    """Yields probes of all combinations of wanted and given gradients."""
    for dtype, wanted, given, layers in itertools.product(
        DTYPES, (*WANTED, SECOND_ORDER), GIVEN, (1, 3)
    ):
        yield Probe(ODD, dtype, num_layers=layers, wanted=wanted, given=given)


def other_probes() -> Iterator[Probe]:
    """Yields probes of step modules, dropout and autocast."""
    for dtype, nonlinearity, bias, hx, layout, sizes in itertools.product(
        DTYPES, NONLINEARITIES, EITHER, EITHER, LAYOUTS[:2], (TINY, BROAD)
    ):
        yield Probe(sizes, dtype, layout, nonlinearity, bias, hx=hx, call="cell")
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield Probe(ALIGNED, dtype, layout, num_layers=3, dropout=0.5)
    for autocast, layout, layers in itertools.product(DTYPES[2:], LAYOUTS, (1, 3)):
        yield Probe(ODD, "float32", layout, num_layers=layers, autocast=autocast)


SOURCES = (option_probes, size_probes, value_probes, gradient_probes, other_probes)


def other_cells() -> Iterator[Probe]:
    """Yields tanh probes for all cells except "rnn": all option probes and a third of the others.

    The nonlinearity and noise of leaky cells are random.
    """
    for cell, source in itertools.product([*LAYERS][1:], SOURCES):
        chosen = [probe for probe in source() if probe.nonlinearity == "tanh"]
        for probe in chosen if source is option_probes else chosen[::3]:
            probe = replace(probe, cell=cell)
            draw = random.Random(probe.name)
            if cell == "leaky":
                probe = replace(probe, nonlinearity=draw.choice(LEAKY_NONLINEARITIES))
                # Noise has the layout of the input; packed and jagged layouts are not covered.
                if probe.layout in ("dense", "unbatched", "lengths"):
                    probe = replace(probe, noise=draw.choice(EITHER))
            yield probe


def all_probes(cells: Iterable[str] = LAYERS) -> list[Probe]:
    """Returns all probes of the given cells, without duplicates."""
    probes = dict.fromkeys(probe for source in (*SOURCES, other_cells) for probe in source())
    return [probe for probe in probes if probe.cell in cells]
