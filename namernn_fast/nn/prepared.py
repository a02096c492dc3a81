"""`PreparedLayer` and `PreparedCell`: modules for inference whose weights are packed once.

`prepare()` of a fused layer, token layer or step module makes them. A prepared module holds the
weights in panels, and the layer that it was made from without the memory of its weights. To save,
copy or convert a prepared module (see `saving`), the weights are unpacked to a layer, and packed
again. With 8-bit weights, that layer has the rounded weights, which round to the same integers
again. Where no CPU kernel can run, the module holds a copy of the layer instead, and calls it.
"""

from typing import TYPE_CHECKING, Any, Generic, NoReturn

import torch
from torch import Tensor, is_grad_enabled
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..call import Call, int8, tokens
from ..call.layouts import Input, Lengths
from ..call.prepared_weights import PreparedWeights, without_memory
from ..functional import run, run_last_state
from ..integrations import onnx
from ..integrations.fx import make_leaves
from ..integrations.nn_rnn import exact_class, untraced
from ..machine import availability
from ..machine.torch_private import _disable_current_modes, _get_tracing_state
from .direct import is_unobserved, step
from .saving import Saved
from .states import States, given, map_states, states_in, without_layers
from .streams import Stream
from .weights import from_saved, what_else_runs

MOST_TABLE_BYTES = 64 * 2**20
"""The largest table of a token layer's input products that is prepared, for all directions."""


class Prepared(Saved, Generic[States]):
    """The base class of the prepared modules.

    Its options are those of the layer. `batch_invariant` can be set, which packs the weights again
    and ends all streams; the other options cannot.

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
    """(vocabulary, input_size) of a token layer."""
    _ties: dict[str, Any]
    """What `restore_rnn` needs to tie parameters again, by the name of the weight."""

    def __init__(self, layer: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        int8.check_prepared_dtype(dtype)
        self.training, self.dtype, self._ties = False, dtype, {}
        self._hold(layer)

    def stream(self, batch: int) -> Stream:
        """Returns a `Stream`, which keeps the states of a batch of sequences between calls.

        Args:
            batch: the number of sequences. Their states begin as zeros.

        Raises:
            ValueError: batch is negative or no integer, or the layer is bidirectional.
        """
        return Stream(self, batch)

    def refresh(self, layer: torch.nn.Module) -> None:
        """Copies the weights of a layer again, into the same memory if they are packed.

        No other thread may be running a call of this module.

        Args:
            layer: a layer with the class, options, dtype and device of the prepared layer.

        Raises:
            ValueError: one of these differs.
            RuntimeError: the layer has hooks or another `forward`.
        """
        is_layer = hasattr(layer, "_with_weights")  # a prepared module is none
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
        """Returns the names of the attributes that belong to the layer."""
        layer = self.__dict__.get("_layer")
        return () if layer is None else (*layer._recurrent.__constants__, "batch_invariant")

    def flatten_parameters(self) -> None:
        """No-op, as in the fused layers on a CPU."""

    def _hold(self, layer: Any) -> None:
        """Packs the weights of a layer or, where no CPU kernel can run, keeps a copy of them."""
        why_not = layer._why_not_preparable()
        if why_not is not None:
            raise RuntimeError(f"prepare() cannot take this {type(layer).__name__}: {why_not}")
        if self.dtype is not None:
            int8.check_weights(layer._weights())
        weights = [weight.detach() for weight in layer._weights()]
        rnn = layer._recurrent
        held: dict[str, Any] = {"_described": _description(layer)}
        has_kernel = self.dtype is None or not getattr(rnn, "proj_size", None)
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
        self.__dict__.update(held)  # last, because anything else may fail

    def _pack(self, rnn: Any, weights: list[Tensor], embedding: Tensor | None) -> dict[str, Any]:
        """Packs weights, and returns the attributes that describe them."""
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

    def _plain(self, *arguments: Any) -> Any:
        """Returns the layer that runs a call with these arguments, or None if this module does.

        Raises:
            RuntimeError: this module is in training mode, the layer would have to compute
                gradients, or Dynamo exports the call.
        """
        if self.training:
            raise RuntimeError(
                "a prepared module is in training mode, but is only for inference: call its "
                "eval(), or call the layer itself"
            )
        # A recorded program must not depend on this processor.
        recorded = torch.compiler.is_exporting() or _get_tracing_state() is not None
        if self._panels is not None and not recorded:
            return None
        if torch.is_grad_enabled() and any(map(_requires_grad, arguments)):
            _refuse("computes no gradients")
        if self._panels is None:
            return self._layer
        if torch.compiler.is_dynamo_compiling():
            _refuse("needs torch.export(strict=False)")
        # So that the program gets the weights as constants
        with _disable_current_modes(), untraced():
            layer = self._frozen()
        if self.dtype is not None and onnx.exporting():
            layer._recurrent._more_options = ops.INT8
        return layer

    def _call(
        self, input: Any, hx: Any, reset: Any = None, reset_to: Any = None, **inputs: Any
    ) -> Call:
        panels = self._panels
        assert panels is not None
        inputs = given(**inputs)
        if inputs and panels.has_table:
            names = " and ".join(inputs)
            _refuse(f"whose weight_ih was multiplied by its embedding takes no {names}")
        rows = None, reset, panels.call_options()
        more: Any = {"prepared": panels, "reset_to": reset_to, "inputs": inputs or None}
        return Call(panels.cell, input, hx, self._shapes, *rows, **more)


class PreparedLayer(Prepared[States]):
    """A layer or token layer whose weights are packed once; see `FusedRNN.prepare`."""

    def forward(
        self,
        input: Input,
        hx: States | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        noise: Input | None = None,
    ) -> tuple[Input, States]:
        """Runs the layer over whole sequences, of features or, for a token layer, of token ids.

        Args:
            input, .., noise: as in `FusedRNN.forward` or `TokenRNN.forward`.

        Raises:
            RuntimeError: the module is in training mode, or gradients or a torch.func transform
                other than vmap are asked for.
            TypeError, ValueError, RuntimeError, IndexError: as in `FusedRNN.forward`.
        """
        panels = self._panels
        plain_rows = lengths is None and reset is None and reset_to is None and noise is None
        if (
            panels is not None
            and not self.training
            and self._embedding is None
            and plain_rows
            and type(input) is Tensor
        ):
            results = panels.run_simple(input, hx)  # type: ignore[arg-type]
            if results is not None:
                return results  # type: ignore[no-any-return]
        plain = self._plain(input, hx, reset_to, noise)
        if plain is not None:
            return plain(input, hx, lengths, reset, reset_to=reset_to, noise=noise)  # type: ignore[no-any-return]
        call = self._call(input, hx, reset, reset_to, noise=noise)
        return run(call, input, lengths, self._embedding)

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward

    def last_state(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: States | None = None,
        noise: Input | None = None,
        *,
        share_prefixes: bool | None = None,
    ) -> States:
        """Returns only the last states of `forward`; the output is never written.

        If the module has hooks, calls the module so that these run.

        Args:
            input, .., share_prefixes: as in `FusedRNN.last_state`.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: as in `FusedRNN.last_state`.
        """
        what_else = what_else_runs(self)
        if what_else is not None:
            if share_prefixes:
                tokens.refuse_to_share(f"the module has {what_else}")
            return self(input, hx, lengths, reset, reset_to, noise)[1]
        plain = self._plain(input, hx, reset_to, noise)
        if plain is not None:
            more = {"reset_to": reset_to, "noise": noise, "share_prefixes": share_prefixes}
            return plain.last_state(input, hx, lengths, reset, **more)  # type: ignore[no-any-return]
        call = self._call(input, hx, reset, reset_to, noise=noise)
        return run_last_state(call, input, lengths, self._embedding, None, share_prefixes)  # type: ignore[no-any-return]


class PreparedCell(Prepared[States]):
    """A step module whose weights are packed once; see `FusedRNN.prepare`."""

    def forward(self, input: Tensor, hx: States | None = None, noise: Any = None) -> States:
        """Returns the next state, (batch, hidden_size), or (hidden_size) for one row.

        Args:
            input, hx, noise: as in `FusedRNNCell.forward` or `FusedLeakyRNNCell.forward`.

        Raises:
            ValueError, RuntimeError: as in the step module, or as in `PreparedLayer.forward`.
        """
        panels = self._panels
        if (
            panels is not None
            and not self.training
            and noise is None
            and is_unobserved()
            and not (is_grad_enabled() and any(map(_requires_grad, (input, hx))))
        ):
            options, hidden_size = panels.current_options(), panels.sizes[2]
            last = step(panels.cell, input, hx, [panels.tensor], hidden_size, options)
            if last is not None:
                return last  # type: ignore[no-any-return]
        plain = self._plain(input, hx, noise)
        if plain is None and not self._layer._fits(input, hx, self._shapes[0]):
            plain = self._frozen()  # raises torch's own error
        if plain is not None:
            return plain(input, hx, **given(noise=noise))  # type: ignore[no-any-return]
        states = map_states(hx, lambda state: state.unsqueeze(0))
        more = {} if noise is None else {"noise": noise.unsqueeze(0)}
        call = self._call(input.unsqueeze(0), states, **more)
        return map_states(run(call, call.data)[1], without_layers)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward


def _options_of(layer: Any, weights: list[Tensor]) -> int:
    """Returns the option bits of a layer or step module, whatever `batch_invariant()` is."""
    options: int = layer._options(weights) & ~ops.BATCH_INVARIANT
    return options | (ops.BATCH_INVARIANT if getattr(layer, "batch_invariant", False) else 0)


def _description(layer: Any) -> list[Any]:
    """Returns what must be equal in two layers for one to refresh the other."""
    rnn, weights = layer._recurrent, layer._weights()
    like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
    return [exact_class(layer), rnn.extra_repr(), _options_of(rnn, rnn._weights()), *like]


def _requires_grad(argument: Any) -> bool:
    """Returns whether an input or states require a gradient."""
    if isinstance(argument, PackedSequence):
        argument = argument.data
    return any(getattr(tensor, "requires_grad", False) for tensor in states_in(argument))


def _refuse(why: str) -> NoReturn:
    raise RuntimeError(f"a prepared module {why}: call the layer itself")


make_leaves(PreparedLayer, PreparedCell)
