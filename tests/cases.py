"""Defines test cases. Each case runs on a fused layer, on torch's layer and in the oracle."""

import contextlib
import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import oracle
import torch
from kinds import EQUATION_KINDS, EVERY, KINDS, VARIANTS, map_states, tensors_in
from layouts import NO_IDS, Pieces, Place
from torch.nn.functional import embedding
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
    pad_sequence,
)

FUSED = {name: kind.layer for name, kind in EVERY.items()}
TORCH = {name: kind.nn_layer for name, kind in EVERY.items()}
CELLS = tuple(KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS = (*VARIANTS, *EQUATION_KINDS)
FUSED_LAYOUTS = ("lengths", "jagged")  # layouts that torch's layers do not accept
LAYOUTS = ("dense", "sliced", "packed", "packed unsorted", *FUSED_LAYOUTS)
# Groups of layouts in which a case has the same rows, and therefore equal results.
SAME_ROWS = (("dense", "sliced"), ("packed",), ("packed unsorted", "lengths", "jagged"))
CONTIGUOUS = Place((0, 1, 2), *[(0, 0, 0)] * 2, (1, 1, 1))
SLICED = replace(CONTIGUOUS, stride=(2, 2, 2))


def draws(hidden_size):
    """Returns how many random cases with this hidden size to pool in one error budget.

    A single case of a small layer has too few results to estimate its rounding error.
    """
    return 16 if hidden_size == 1 else 4 if hidden_size < 8 else 1


def named_states(name, states):
    """Returns the states by name. For example, the pattern `{}_n` gives the names h_n and c_n.

    In every cell, the first state is named h, and the second is named c.
    """
    return {name.format(letter): state for letter, state in zip("hcnm", states, strict=False)}


def layer_of(equation):
    """Returns the cell and options of a layer that computes `oracle.EQUATIONS[equation]`."""
    if equation in ("tanh", "relu"):
        return "rnn", {"nonlinearity": equation}
    cell, *nonlinearity = equation.split()
    return cell, {"nonlinearity": nonlinearity[0]} if nonlinearity else {}


@dataclass
class Case:
    """A layer's options and sizes, with random float64 inputs, weights and output gradients."""

    D: int
    H: int
    T: int
    B: int
    options: dict = field(default_factory=dict)
    layout: str = "dense"
    with_hx: bool = True
    seed: int = 0
    vocabulary: int = 0
    """The number of rows of the embedding, or 0 if the input is features instead of token ids."""
    padding_idx: int | None = None
    cell: str = "rnn"
    reset: ClassVar[torch.Tensor | None] = None
    """A mask (T, B) of the steps that start with a reset. None if there are no resets."""
    reset_to: ClassVar[list[torch.Tensor]] = []
    """The states after resets, as tensors (T, layers, B, features). Empty if there are none."""
    wanted: ClassVar[frozenset[str]] = frozenset(("input", "hx", "weights"))
    """The arguments that require a gradient. `input` includes the inputs besides x, and `hx`
    includes reset_to."""
    given: ClassVar[frozenset[str]] = frozenset(("output", "h_n", "c_n", "n_n", "m_n"))
    """The results that receive a gradient in the backward pass."""
    hx_place: ClassVar[Place] = CONTIGUOUS
    is_prepared: ClassVar[bool] = False
    """Whether to run what the fused layer's `prepare()` returns, instead of the layer."""

    def __post_init__(self):
        self._references = {}
        self.module = TORCH[self.cell](self.D, self.H, dtype=torch.float64, **self.options)
        self._draw(self.seed)
        # Redraw if rounding may flip the sign of a relu's argument, which decides its gradient.
        attempt = 0
        while self.has_kinks and self._on_a_kink():
            attempt += 1
            assert attempt <= 100, "every draw puts the argument of a relu on its kink"
            self._draw(self.seed + 1_000_000 * attempt)

    @property
    def has_kinks(self):
        """Whether the layer's activation function has a kink, as relu has at zero."""
        return self.options.get("nonlinearity") == "relu"

    def _on_a_kink(self):
        if not self.B:
            return False
        weights = [oracle.precise(weight, torch.float32) for weight in self.weights]
        layer = oracle.layer_like(self.module, weights, oracle.NotesKinks)
        case = copy.copy(self)
        case.wanted = frozenset()
        case._results(
            layer, self._call_on_pieces, lambda tensor: oracle.precise(tensor, torch.float32)
        )
        return layer.near_a_kink

    def _draw(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def randn(*size):
            return torch.randn(*size, dtype=torch.float64, generator=generator)

        bound = self.H**-0.5
        self.weights = [
            (torch.rand(p.shape, dtype=torch.float64, generator=generator) * 2 - 1)
            * (1 if name.startswith("rate") else bound)
            for name, p in self.module.named_parameters()
        ]
        states = self.module.num_layers * (2 if self.module.bidirectional else 1)
        # Draw 2 * D features, because `_results` takes every other feature.
        if self.vocabulary:
            self.rows = randn(self.vocabulary, 2 * self.D)
            self.ids = torch.randint(self.vocabulary, (self.T, self.B), generator=generator)
        else:
            self.rows = randn(self.T, self.B, 2 * self.D)
        sizes = self.cell_lists.state_sizes(self.P, self.H) if self.with_hx else ()
        self.initial = [randn(states, self.B, size) for size in sizes]
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        if self.B:
            lengths[seed % self.B] = self.T
        if self.layout == "packed":
            lengths = lengths.sort(descending=True).values
        elif self.layout in ("dense", "sliced"):
            lengths[:] = self.T
        self.lengths = lengths.tolist()
        width = self.P * (2 if self.module.bidirectional else 1)
        self.grad_output = randn(self.T, self.B, width)
        self.grads_of_last = [
            randn(states, self.B, size) for size in self.cell_lists.state_sizes(self.P, self.H)
        ]
        self.beside = {}
        for place, described in enumerate(self.cell_lists.inputs):
            if seed >> place & 1:
                shared = place > 0 and seed % 3 == 0
                features = described.features(self.H) * (1 if shared else states)
                self.beside[described.name] = randn(self.T, self.B, features) / 4

    @property
    def cell_lists(self):
        return EVERY[self.cell].cell

    @property
    def P(self):  # noqa: N802 - as in the kernels
        """The number of features of h."""
        return self.module.proj_size or self.H

    @property
    def states(self):
        """The initial states as passed to a layer: a tensor, a tuple of tensors or None."""
        return EVERY[self.cell].states(iter(self.initial).__next__) if self.initial else None

    @property
    def grads_of_results(self):
        """The gradients of output and of the last states, by name."""
        return {"output": self.grad_output, **named_states("{}_n", self.grads_of_last)}

    @property
    def input_place(self):
        return SLICED if self.layout == "sliced" else CONTIGUOUS

    def run(self, layer_class, dtype) -> dict[str, torch.Tensor]:
        """Runs a layer. Returns its results and the wanted gradients by name.

        The output is padded to (T, B, ...). Torch's layer does not support lengths, jagged tensors
        or resets. Instead, it runs each piece between resets as a separate packed sequence.
        """
        module = layer_class(self.D, self.H, dtype=dtype, **self.options)
        with torch.no_grad():
            for p, value in zip(module.parameters(), self.weights, strict=True):
                p.copy_(value)
        is_fused = layer_class is FUSED[self.cell]
        call = self._call_fused if is_fused else self._call_torchs
        return self._results(module, call, lambda tensor: tensor.to(dtype, copy=True), True)

    def _results(self, module, call, convert, is_placed=False):
        """Applies `convert` to all inputs. Returns the layer's results and wanted gradients."""
        module.requires_grad_("weights" in self.wanted)
        leaf = convert(self.rows[..., ::2])
        leaf = leaf if self.vocabulary else self._with_layout(leaf)
        leaf = self.input_place(leaf) if is_placed else leaf
        leaf.requires_grad_("input" in self.wanted)

        def placed(state):
            state = convert(state[:, 0] if self._unbatched else state)
            state = self.hx_place(state) if is_placed else state
            return state.requires_grad_("hx" in self.wanted)

        hx = None if self.states is None else map_states(self.states, placed)
        step = 1 + self.seed % 2  # with 2, the features are not contiguous
        reset_to = [
            convert(states.repeat_interleave(step, -1))[..., ::step] for states in self.reset_to
        ]
        for states in reset_to:
            states.requires_grad_("hx" in self.wanted)
        beside = {
            name: convert(rows).requires_grad_("input" in self.wanted)
            for name, rows in self.beside.items()
        }
        output, last = call(module, leaf, hx, reset_to, beside)
        results = {"output": output, **named_states("{}_n", last)}
        if self.wanted and output.requires_grad:
            names = sorted(self.given & results.keys())
            grads = [convert(self.grads_of_results[name]) for name in names]
            torch.autograd.backward([results[name] for name in names], grads)
        if "input" in self.wanted and self.vocabulary:
            results["grad_embedding"] = leaf.grad
        elif "input" in self.wanted:
            results["grad_input"] = self._with_layout(leaf.grad)
        if "input" in self.wanted:
            results |= {f"grad_{name}": rows.grad for name, rows in beside.items()}
        if "hx" in self.wanted:
            grads = [h.grad.unsqueeze(1) if self._unbatched else h.grad for h in tensors_in(hx)]
            results |= named_states("grad_{}x", grads)
            results |= named_states("grad_reset_to_{}", [h.grad for h in reset_to])
        if "weights" in self.wanted:
            results.update((f"grad_{name}", p.grad) for name, p in module._parameters.items())
        return {name: value.detach() for name, value in results.items()}

    @property
    def _unbatched(self):
        return self.layout == "unbatched"

    def _with_layout(self, rows):
        """Converts rows from (T, B, ...) to the shape that the layer takes, or back."""
        if self._unbatched:
            return rows[:, 0] if rows.dim() == 3 else rows.unsqueeze(1)
        return rows.transpose(0, 1) if self.module.batch_first else rows

    def _call_fused(self, module, leaf, hx, reset_to, beside):
        """Calls the fused layer. Returns its output (T, B, ...) and a list of its last states."""
        x, more = leaf, {}
        if self.vocabulary:
            ids = self._layer_ids
            x = self.input_place(ids.int() if self.seed % 3 == 0 else ids)
            if self.is_prepared:
                module = self._token_layer(module, leaf)
            else:
                more |= {"embedding": leaf, "padding_idx": self.padding_idx}
        if self.layout == "lengths":
            more["lengths"] = self.lengths
        if self.reset is not None:
            more["reset"] = self._with_layout(self.reset.unsqueeze(-1)).squeeze(-1)
        if reset_to:
            states = [self._as_reset_to(states) for states in reset_to]
            more["reset_to"] = tuple(states) if len(states) > 1 else states[0]
        module = module.prepare() if self.is_prepared else module
        return self._call(module, x, hx, beside, more)

    def _call_torchs(self, module, leaf, hx, reset_to, beside):
        """Calls torch's layer. Returns its output (T, B, ...) and a list of its last states."""
        if self.reset is not None or self.layout in FUSED_LAYOUTS:
            return self._call_on_pieces(module, leaf, hx, reset_to, beside)
        return self._call(module, self._rows_of(leaf), hx, beside, {})

    def _call_on_pieces(self, module, leaf, hx, reset_to, beside):
        """Like `_call_torchs`, but runs each piece between resets as a separate sequence."""
        x = self._rows_of(leaf)
        states = tensors_in(hx) or [x.new_zeros(g.shape) for g in self.grads_of_last]
        states = [h.unsqueeze(1) if h.dim() == 2 else h for h in states]
        return self.pieces.run(module, self._with_layout(x), states, reset_to, beside)

    def _rows_of(self, leaf):
        return embedding(self._layer_ids, leaf, self.padding_idx) if self.vocabulary else leaf

    def _call(self, module, x, hx, beside, more):
        for name, rows in beside.items():
            more[name] = self._arranged(self._with_layout(rows))
        output, last = module(self._arranged(x), hx, **more)
        if isinstance(output, PackedSequence):
            output, _ = pad_packed_sequence(output, total_length=self.T)
        elif output.is_nested:
            output = pad_sequence(output.unbind())
        else:
            output = self._with_layout(output)
        return output, [h.unsqueeze(1) if self._unbatched else h for h in tensors_in(last)]

    @property
    def _layer_ids(self):
        return self._with_layout(self.ids.unsqueeze(-1)).squeeze(-1)

    def _arranged(self, x):
        """Returns rows or token ids in the case's layout, padded with NaN or out-of-range ids."""
        first = self.module.batch_first
        if self.layout.startswith("packed"):
            is_sorted = self.layout == "packed"
            return pack_padded_sequence(x, self.lengths, first, enforce_sorted=is_sorted)
        if self.layout == "lengths":
            past = torch.arange(self.T)[:, None] >= torch.tensor(self.lengths, dtype=torch.int64)
            past = past.T if first else past
            if x.is_floating_point():
                return x.masked_fill(past.unsqueeze(-1), torch.nan)
            return x.masked_fill(past, NO_IDS[self.seed % 2])
        if self.layout == "jagged":
            sequences = x.unbind(0 if first else 1)
            rows = [s[:length] for s, length in zip(sequences, self.lengths, strict=True)]
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return x

    def _token_layer(self, layer, rows):
        """Returns a token layer that consists of `layer` and an embedding with these rows."""
        tokens = EVERY[self.cell].tokens(self.vocabulary, self.D, self.H, **self.options)
        tokens.rnn = layer
        tokens.embedding = torch.nn.Embedding.from_pretrained(rows, padding_idx=self.padding_idx)
        return tokens

    def _as_reset_to(self, states):
        """Converts states (T, layers, B, H) to the shape that a layer takes as reset_to."""
        if self._unbatched:
            return states.squeeze(2)
        return self._with_layout(states.transpose(1, 2)) if self.module.batch_first else states

    @property
    def pieces(self):
        directions = 2 if self.module.bidirectional else 1
        return Pieces(self.lengths, self.reset, len(self.grads_of_last[0]), directions)

    def run_oracle(self, dtype, rounding=None) -> dict[str, np.ndarray]:
        """Rounds the inputs to `dtype`. Returns the oracle's results and gradients by name.

        `rounding` is applied to the inputs, the weights and all computed numbers.
        """

        def precise(tensor):
            return oracle.precise(tensor, dtype, rounding)

        mixins = () if rounding is None else (oracle.Stores,)
        layer = oracle.layer_like(self.module, map(precise, self.weights), *mixins)
        with contextlib.nullcontext() if rounding is None else oracle.stored_for_backward():
            results = self._results(layer, self._call_on_pieces, precise)
        return {name: oracle.numbers_of(value) for name, value in results.items()}

    def in_layout(self, layout):
        """Returns a copy of the case in another layout. Both cases share the cached references."""
        case = copy.copy(self)
        case.layout = layout
        return case

    def references(self, dtype):
        """Returns the results of torch's layer and of the oracle, computed once per dtype."""
        if dtype not in self._references:
            self._references[dtype] = self.run(TORCH[self.cell], dtype), self.run_oracle(dtype)
        return self._references[dtype]

    def add_to(self, budget, dtype) -> None:
        """Adds the results of the fused layer, torch's layer and the oracle to a budget.

        Omits 16-bit gradients of relu, because rounding may flip the sign of the relu's argument.
        """
        kinks = self.has_kinks and dtype.itemsize == 2
        ours = self.run(FUSED[self.cell], dtype)
        theirs, reference = self.references(dtype)
        shape = (self.D, self.H, self.T, self.B, "tokens" if self.vocabulary else "rows")
        for name, value in reference.items():
            if kinks and name.startswith("grad"):
                continue
            budget.add((*shape, name), ours[name], theirs[name], value)
