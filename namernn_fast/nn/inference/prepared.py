"""`PreparedLayer` and `PreparedCell`: modules for inference whose weights are packed once.

`prepare()` of a fused layer, token layer or step module returns a prepared module, which
holds the packed weights, and a copy of the layer on the meta device. Saving, copying or converting
a prepared module unpacks its weights into a layer, and packs them again (see `saving`). With 8-bit
weights, that layer has the rounded weights, which round to the same integers again. If no CPU
kernel can run, the prepared module holds and calls a copy of the layer instead.
"""

import itertools
from typing import TYPE_CHECKING, Any, Generic, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ... import ops
from ...call import Arguments, Call, Input, Lengths, given, int8, normalise, tokens
from ...call.prepared_weights import NO_GRADIENTS, PreparedWeights, without_memory
from ...functional import run, run_last_state
from ...integrations import onnx
from ...integrations.fx import make_leaves
from ...integrations.nn_rnn import FromExporter, exact_class, untraced
from ...machine import availability
from ...machine.context import is_dynamo_compiling, is_exporting, is_jit_tracing, is_unobserved
from ...machine.torch_private import _disable_current_modes
from ..last_state import HasLastState
from ..states import States, map_states, states_in, with_steps, without_layers
from ..weights import from_saved, why_no_int8_kernel
from .direct import step_of_module
from .saving import Saved
from .stream import Stream

MOST_TABLE_BYTES = 64 * 2**20
"""The maximum size of the table that `prepare()` makes for a token layer, for all directions."""


class Prepared(FromExporter, Saved, Generic[States]):
    """The base class of the prepared modules.

    A prepared module has the options of its layer as attributes. Setting `batch_invariant` packs
    the weights again and invalidates all streams; no other option can be set.

    Args:
        layer: the module to prepare.
        dtype: None, or torch.int8 for 8-bit weights.
    """

    _panels: PreparedWeights | None
    _shapes: list[Tensor]
    """Tensors with the shapes of the layer's weights, without memory."""
    _described: list[Any]
    """The `_description` of the layer."""
    _embedding: Tensor | None
    """The embedding of a token layer, (vocabulary, input_size), otherwise None."""
    _ties: dict[str, Any]
    """The `_Tie` of each shared parameter, by weight name. `restore_rnn` ties them again."""

    def __init__(self, layer: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        int8.check_prepared_dtype(dtype)
        self.training, self.dtype, self._ties = False, dtype, {}
        self._hold(layer)

    def stream(self, batch: int) -> Stream:
        """Returns a `Stream`, which keeps the states of a batch of sequences between calls.

        Args:
            batch: the number of sequences. Their states start as zeros.

        Raises:
            ValueError: batch is negative or not an integer, or the layer is bidirectional.
        """
        return Stream(self, batch)

    def refresh(self, layer: torch.nn.Module) -> None:
        """Copies the current weights of a layer, into the same memory if they are packed.

        No other thread may be running a call of this module.

        Args:
            layer: a layer with the class, options, dtype and device of the prepared layer.

        Raises:
            ValueError: the class, an option, the dtype or the device differs.
            RuntimeError: the layer has hooks or another `forward`.
        """
        is_layer = hasattr(layer, "_with_weights")  # False for a prepared module
        if not is_layer or _description(layer) != self._described:
            raise ValueError(f"layer must be like the prepared {self._layer!r}, got {layer!r}")
        self._hold(layer)

    def extra_repr(self) -> str:
        """Returns the layer that was prepared, and `dtype` if it was given, for `repr`."""
        return repr(self._layer) + (f", dtype={self.dtype}" if self.dtype is not None else "")

    def __getattr__(self, name: str) -> Any:
        if name in self._option_names():
            return getattr(self._layer._recurrent, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._option_names():
            return super().__setattr__(name, value)
        if name != "batch_invariant" or not hasattr(self._layer._recurrent, name):
            can = "only batch_invariant of a prepared layer can be set"
            raise AttributeError(f"{can}, got {name}: prepare another {type(self._layer).__name__}")
        layer = self._frozen()
        layer._recurrent.batch_invariant = value
        self._hold(layer)

    def _option_names(self) -> tuple[str, ...]:
        """Returns the names of the layer's options, which this module has as attributes."""
        layer = self.__dict__.get("_layer")
        return () if layer is None else (*layer._recurrent.__constants__, "batch_invariant")

    def flatten_parameters(self) -> None:
        """No-op, as in the fused layers on a CPU."""

    def _hold(self, layer: Any) -> None:
        """Packs the weights of a layer, or keeps a copy of them if no CPU kernel can run."""
        why_not = layer._why_not_preparable()
        if why_not is not None:
            raise RuntimeError(f"prepare() cannot take this {type(layer).__name__}: {why_not}")
        if self.dtype is not None:
            int8.check_weights(layer._weights())
        weights = [weight.detach() for weight in layer._weights()]
        rnn = layer._recurrent
        held: dict[str, Any] = {"_described": _description(layer)}
        has_kernel = self.dtype is None or why_no_int8_kernel(rnn) is None
        if availability.why_not_cpu_kernel(weights[0]) or not has_kernel:
            held |= {"_panels": None, "_shapes": [], "_embedding": None, "_weights_ih": []}
            weights = [weight.clone() for weight in weights]
            if self.dtype is not None:
                weights = from_saved(layer, self._to_save(layer, weights, []))
        else:
            embedding = None if rnn is layer else weights[0]
            held |= self._pack(rnn, weights if embedding is None else weights[1:], embedding)
            weights = [weight.to("meta") for weight in weights]
        # Not registered as a submodule, because a prepared module has no parameters.
        held["_layer"] = layer._with_weights(weights, False)
        self.__dict__.update(held)  # last, because the code above may fail

    def _pack(self, rnn: Any, weights: list[Tensor], embedding: Tensor | None) -> dict[str, Any]:
        """Packs weights, and returns the attributes of this module that depend on the weights."""
        options = _options_of(rnn, weights) | (ops.INT8 if self.dtype is not None else 0)
        shapes, weights_ih = [without_memory(weight) for weight in weights], []
        if embedding is not None:
            embedding, inputs = embedding.clone(), tokens.places_of_inputs(rnn._cell, options)
            table = len(embedding) * len(weights[0]) * len(inputs) * embedding.element_size()
            if 0 < table <= MOST_TABLE_BYTES and not options & ops.BATCH_INVARIANT:
                weights_ih = [weights[place].clone() for place in inputs]
                weights = tokens.with_tables(embedding, None, weights, rnn._cell, options)
        with torch.inference_mode(False):  # so that any thread can refresh the tensor
            panels = self.__dict__.get("_panels")
            if panels is not None and panels.fits(weights, options):
                panels.refresh(weights)
            else:
                panels = PreparedWeights.pack(rnn._cell, weights, options, bool(weights_ih))
        more = {"_embedding": embedding, "_weights_ih": weights_ih}
        return {"_panels": panels, "_shapes": shapes, **more}

    def _weights(self) -> list[Tensor]:
        if self._panels is None:
            return [weight.clone() for weight in self._layer._weights()]
        weights = self._panels.unpack()
        places = tokens.places_of_inputs(self._panels.cell, self._panels.options)
        for place, weight in zip(places, self._weights_ih, strict=False):
            weights[place] = weight.clone()
        return weights if self._embedding is None else [self._embedding.clone(), *weights]

    def _plain(self, arguments: Arguments) -> Any:
        """Returns the layer that computes a call, or None if this module computes it.

        Raises:
            RuntimeError: this module is in training mode, the layer would have to compute
                gradients, or Dynamo exports the call.
        """
        if self.training:
            raise RuntimeError(
                "a prepared module is in training mode, but is only for inference: call its "
                "eval(), or call the layer itself"
            )
        # A recorded program must run on any processor, so it must not contain packed weights.
        recorded = is_exporting() or is_jit_tracing()
        if self._panels is not None and not recorded:
            return None
        if torch.is_grad_enabled() and _requires_grad(arguments):
            raise RuntimeError(NO_GRADIENTS)
        if self._panels is None:
            return self._layer
        if is_dynamo_compiling():
            _refuse("needs torch.export(strict=False)")
        # The exported program must hold the weights as constants.
        with _disable_current_modes(), untraced():
            layer = self._frozen()
        if self.dtype is not None and onnx.exporting():
            layer._recurrent._more_options = ops.INT8
        return layer

    def _call(self, arguments: Arguments) -> Call:
        """Converts arguments to the `Call` of this module."""
        panels = self._panels
        assert panels is not None
        if panels.has_table and (inputs := given(**arguments.inputs)):
            names = " and ".join(inputs)
            _refuse(f"whose weight_ih was multiplied by its embedding takes no {names}")
        options = panels.call_options()
        return normalise(arguments, panels.cell, self._shapes, options, prepared=panels)


class PreparedLayer(Prepared[States], HasLastState[States]):
    """A layer or token layer whose weights are packed once; see `FusedRNN.prepare`."""

    def forward(
        self,
        input: Input,
        hx: States | None = None,
        lengths: Lengths | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
        **inputs: Input | None,
    ) -> tuple[Input, States]:
        """Runs the layer over whole sequences, of features or, for a token layer, of token ids.

        Args:
            input, .., inputs: as in `FusedRNN.forward` or `TokenRNN.forward`.

        Raises:
            RuntimeError: the module is in training mode, an argument requires a gradient, or a
                torch.func transform other than vmap is active.
            TypeError, ValueError, RuntimeError, IndexError: as in `FusedRNN.forward`.
        """
        panels = self._panels
        if (
            panels is not None
            and not self.training
            and self._embedding is None
            and lengths is None
            and reset is None
            and reset_to is None
            and embedding is None
            and padding_idx is None
            and not inputs
            and type(input) is Tensor
        ):
            results = panels.run_simple(input, hx)  # type: ignore[arg-type]
            if results is not None:
                return results  # type: ignore[no-any-return]
        arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs)
        plain = self._plain(arguments)
        if plain is not None:
            return plain(input, hx, **arguments.keywords())  # type: ignore[no-any-return]
        self._add_embedding(arguments)
        return run(arguments, self._call(arguments))

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def _last_state(self, arguments: Arguments) -> Any:
        plain = self._plain(arguments)
        if plain is not None:
            keywords = {**arguments.keywords(), "share_prefixes": arguments.share_prefixes}
            return plain.last_state(arguments.input, arguments.hx, **keywords)
        self._add_embedding(arguments)
        return run_last_state(arguments, self._call(arguments))

    def _add_embedding(self, arguments: Arguments) -> None:
        """Adds the embedding of a token layer to the arguments of its call."""
        if self._embedding is not None:
            for name in ("embedding", "padding_idx"):
                if getattr(arguments, name) is not None:
                    raise TypeError(f"a prepared {type(self._layer).__name__} takes no {name}")
            arguments.embedding = self._embedding


class PreparedCell(Prepared[States]):
    """A step module whose weights are packed once; see `FusedRNN.prepare`."""

    def forward(self, input: Tensor, hx: States | None = None, **inputs: Tensor | None) -> States:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input, hx, inputs: as in `FusedRNNCell.forward`.

        Raises:
            ValueError, RuntimeError: as in the step module, or as in `PreparedLayer.forward`.
        """
        panels = self._panels
        if panels is not None and not (self.training or inputs) and is_unobserved():
            options, hidden_size = panels.current_options(), panels.sizes[2]
            weights = [panels.tensor]
            last = step_of_module(panels.cell, input, hx, weights, hidden_size, options)
            if last is not None:
                return last  # type: ignore[no-any-return]
        arguments = Arguments(input, hx, inputs=inputs)
        plain = self._plain(arguments)
        if plain is None and not self._layer._fits(input, hx, self._shapes[0]):
            plain = self._frozen()  # torch's cell raises its own error
        if plain is not None:
            return plain(input, hx, **arguments.keywords())  # type: ignore[no-any-return]
        arguments = with_steps(arguments, self._layer._cell)
        last = run(arguments, self._call(arguments))[1]
        return map_states(last, without_layers)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward


def _options_of(layer: Any, weights: list[Tensor]) -> int:
    """Returns the option bits of a layer or step module, ignoring `batch_invariant()`."""
    options: int = layer._options(weights) & ~ops.BATCH_INVARIANT
    return options | (ops.BATCH_INVARIANT if getattr(layer, "batch_invariant", False) else 0)


def _description(layer: Any) -> list[Any]:
    """Returns the properties of a layer that `refresh` requires to be unchanged."""
    rnn, weights = layer._recurrent, layer._weights()
    like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
    described = exact_class(layer), rnn._cell.program
    return [*described, _options_of(rnn, rnn._weights()), *like]


def _requires_grad(arguments: Arguments) -> bool:
    """Returns whether an argument of a call requires a gradient."""
    values = [arguments.input, arguments.hx, *arguments.keywords().values()]
    data = [value.data if isinstance(value, PackedSequence) else value for value in values]
    tensors = itertools.chain.from_iterable(map(states_in, data))
    return any(getattr(tensor, "requires_grad", False) for tensor in tensors)


def _refuse(why: str) -> NoReturn:
    raise RuntimeError(f"a prepared module {why}: call the layer itself")


make_leaves(PreparedLayer, PreparedCell)
