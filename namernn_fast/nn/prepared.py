"""`PreparedLayer` and `PreparedCell`: modules for inference whose weights are packed once.

`prepare()` of a fused layer, token layer or step module makes them. A prepared module holds the
weights in panels, and the layer that it was made from without the memory of its weights. To save,
copy or convert a prepared module, the weights are unpacked to a layer, and packed again. Where no
CPU kernel can run, the module holds a copy of the layer instead, and calls it.

With 8-bit weights, that layer has the rounded weights, which round to the same integers again. A
state_dict, a pickle and a copy hold the integers and scales.
"""

from typing import TYPE_CHECKING, Any, Generic, NoReturn

import torch
from torch import Tensor, is_grad_enabled
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from ..call import Call, int8, tokens
from ..call.layouts import Input, Lengths
from ..call.prepared_weights import PreparedWeights, without_memory
from ..functional import run, run_last_state
from ..integrations import onnx
from ..integrations.fx import make_leaves
from ..integrations.nn_rnn import exact_class
from ..machine import availability
from .direct import is_unobserved, step
from .states import States, given, map_states, states_in, without_layers
from .streams import Stream
from .weights import from_saved, matrices, names_in_state_dict, what_else_runs

MOST_TABLE_BYTES = 64 * 2**20
"""The largest table of a token layer's input products that is prepared, for all directions."""


class Prepared(torch.nn.Module, Generic[States]):
    """The base class of the prepared modules.

    Args:
        layer: the module to prepare.
        dtype: None, or torch.int8 for 8-bit weights.
    """

    dtype: torch.dtype | None
    """int8 if the weights are 8-bit integers, otherwise None."""

    _layer: Any
    """The module that was prepared. It is on the meta device if its weights are packed."""
    _panels: PreparedWeights | None
    _shapes: list[Tensor]
    """Tensors with the shapes of the layer's weights, without memory."""
    _described: list[Any]
    """The `_description` of the layer."""
    _embedding: Tensor | None
    """(vocabulary, input_size) of a token layer."""
    _weights_ih: list[Tensor]
    """weight_ih of each direction of the first layer if a table replaces it, otherwise empty."""

    def __init__(self, layer: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        int8.check_prepared_dtype(dtype)
        self.training, self.dtype = False, dtype
        self._hold(layer)

    def stream(self, batch: int) -> Stream:
        """Returns a `Stream`, which keeps the states of a batch of sequences between calls.

        Args:
            batch: the number of sequences. Their states begin as zeros.

        Raises:
            ValueError: batch is negative or no integer, or the layer is bidirectional.
        """
        return Stream(self, batch)

    def restore(self) -> Any:
        """Returns a new module of the class that was prepared, with the weights of this one.

        It is in eval mode, and its parameters require gradients.

        Raises:
            RuntimeError: the weights were rounded to 8 bits.
        """
        if self.dtype is not None:
            raise RuntimeError("8-bit weights cannot be restored: they were rounded")
        return self._layer._with_weights(self._weights(), True)

    def refresh(self, layer: torch.nn.Module) -> None:
        """Copies the weights of a layer again, into the same memory if they are packed.

        No other thread may be running a call of this module.

        Args:
            layer: a layer with the class, options, dtype and device of the prepared layer.

        Raises:
            ValueError: one of these differs.
            RuntimeError: the layer has hooks or another `forward`.
        """
        if not hasattr(layer, "_weights") or _description(layer) != self._described:
            raise ValueError(f"layer must be like the prepared {self._layer!r}, got {layer!r}")
        self._hold(layer)

    def train(self, mode: bool = True) -> Any:
        """Raises an error if `mode` is True: a prepared module is always in eval mode."""
        return _refuse("is always in eval mode") if mode else self

    def extra_repr(self) -> str:
        """Returns the layer that was prepared, and `dtype` if it was given, for `repr`."""
        return repr(self._layer) + (f", dtype={self.dtype}" if self.dtype is not None else "")

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_layer")
        layer = getattr(layer, "rnn", layer)
        if layer is not None and name in (*layer.__constants__, "batch_invariant"):
            return getattr(layer, name)
        return super().__getattr__(name)

    def flatten_parameters(self) -> None:
        """No-op, as in the fused layers on a CPU."""

    def _hold(self, layer: Any) -> None:
        """Packs the weights of a layer or, where no CPU kernel can run, keeps a copy of them."""
        why_not = layer._why_not_preparable()
        if why_not is not None:
            raise RuntimeError(f"prepare() cannot take this {type(layer).__name__}: {why_not}")
        if self.dtype is not None:
            int8.check_weights(layer._weights())
        self._described = _description(layer)
        self._embedding, self._weights_ih = None, []
        weights = [weight.detach() for weight in layer._weights()]
        rnn = getattr(layer, "rnn", layer)
        has_kernel = self.dtype is None or not getattr(rnn, "proj_size", None)
        if availability.why_not_cpu_kernel(weights[0]) or not has_kernel:
            self._panels = None
            weights = [weight.clone() for weight in weights]
            if self.dtype is not None:
                weights = from_saved(layer, self._to_save(layer, weights))
        else:
            embedding = None if rnn is layer else weights[0]
            self._pack(rnn, weights if embedding is None else weights[1:], embedding)
            weights = [weight.to("meta") for weight in weights]
        # Not registered as a submodule, because a prepared module has no parameters.
        self.__dict__["_layer"] = layer._with_weights(weights, False)

    def _pack(self, rnn: Any, weights: list[Tensor], embedding: Tensor | None) -> None:
        options = _options_of(rnn, weights) | (ops.INT8 if self.dtype is not None else 0)
        self._shapes = [without_memory(weight) for weight in weights]
        if embedding is not None:
            self._embedding, inputs = embedding.clone(), tokens.places_of_inputs(options)
            table = len(embedding) * len(weights[0]) * len(inputs) * embedding.element_size()
            if 0 < table <= MOST_TABLE_BYTES and not options & ops.BATCH_INVARIANT:
                self._weights_ih = [weights[place].clone() for place in inputs]
                weights = tokens.with_tables(embedding, None, weights, options)
        with torch.inference_mode(False):  # so that any thread can refresh the tensor
            panels = getattr(self, "_panels", None)
            if panels is not None and panels.fits(weights):
                panels.refresh(weights)
            else:
                has_table = bool(self._weights_ih)
                self._panels = PreparedWeights.pack(rnn._cell, weights, options, has_table)

    def _weights(self) -> list[Tensor]:
        """Returns copies of the layer's weights."""
        if self._panels is None:
            return [weight.clone() for weight in self._layer._weights()]
        weights = self._panels.unpack()
        places = tokens.places_of_inputs(self._panels.options)
        for place, weight in zip(places, self._weights_ih, strict=False):
            weights[place] = weight.clone()
        return weights if self._embedding is None else [self._embedding.clone(), *weights]

    def _frozen(self) -> Any:
        """Returns a layer with copies of the weights, which do not require gradients."""
        return self._layer._with_weights(self._weights(), False)

    def _plain(self, *arguments: Any) -> Any:
        """Returns the layer that runs a call with these arguments, or None if this module does.

        Raises:
            RuntimeError: the layer would have to compute gradients, or Dynamo exports the call.
        """
        # A recorded program must not depend on this processor.
        recorded = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        if self._panels is not None and not recorded:
            return None
        if torch.is_grad_enabled() and any(map(_requires_grad, arguments)):
            _refuse("computes no gradients")
        if self._panels is None:
            return self._layer
        if torch.compiler.is_dynamo_compiling():
            _refuse("needs torch.export(strict=False)")
        with _disable_current_modes():  # so that the program gets the weights as constants
            layer = self._frozen()
        if self.dtype is not None and onnx.exporting():
            getattr(layer, "rnn", layer)._more_options = ops.INT8
        return layer

    def _call(
        self, input: Any, hx: Any, reset: Any = None, reset_to: Any = None, noise: Any = None
    ) -> Call:
        panels = self._panels
        assert panels is not None
        if noise is not None and panels.has_table:
            _refuse("whose weight_ih was multiplied by its embedding takes no noise")
        rows = None, reset, panels.call_options()
        more = {"prepared": panels, "reset_to": reset_to, "noise": noise}
        return Call(panels.cell, input, hx, self._shapes, *rows, **more)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        layer = self._frozen()
        before = [(weight.data_ptr(), weight._version) for weight in layer._weights()]
        weights = layer._apply(fn)._weights()
        if [(weight.data_ptr(), weight._version) for weight in weights] != before:
            self._hold(layer)
        return self

    def _integer_names(self, layer: Any) -> list[str]:
        """Returns the names of the weights that are 8-bit integers, if any are.

        A table of input products is in float32, and so are the weights that it was made of.
        """
        return [] if self.dtype is None else matrices(layer, len(self._weights_ih))

    def _to_save(self, layer: Any, weights: list[Tensor]) -> dict[str, Tensor]:
        """Returns the weights of a layer by name, those of 8 bits as integers and scales."""
        named = dict(zip(names_in_state_dict(layer), weights, strict=True))
        int8.to_integers(named, self._integer_names(layer))
        return named

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        layer = self._frozen()
        layer.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        int8.to_integers(destination, [prefix + name for name in self._integer_names(layer)])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        layer, errors = self._frozen(), lists[-1]
        known = len(errors)
        if self.dtype is not None:
            state_dict = dict(state_dict)
            errors += int8.to_weights(state_dict, [prefix + name for name in matrices(layer, 0)])
        for name, module in layer.named_modules():
            path = f"{prefix}{name}." if name else prefix
            module._load_from_state_dict(state_dict, path, local_metadata, strict, *lists)
        if len(errors) == known:
            self._hold(layer)

    def __getstate__(self) -> dict[str, Any]:
        # Panels depend on the processor, so a pickle or a copy holds the layer's weights.
        state = dict(self.__dict__, _panels=None, _shapes=[], _weights_ih=[], _embedding=None)
        weights = self._weights()
        state["_layer"] = self._layer._with_weights([w.to("meta") for w in weights], False)
        return {**state, "_saved": self._to_save(self._layer, weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(self._layer._with_weights(from_saved(self._layer, saved), False))

    def __prepare_scriptable__(self) -> Any:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if self.dtype is not None:
            raise RuntimeError("TorchScript has no 8-bit weights: script the layer itself")
        return self.restore().__prepare_scriptable__()


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
            RuntimeError: gradients or a torch.func transform other than vmap are asked for.
            TypeError, ValueError, RuntimeError, IndexError: as in `FusedRNN.forward`.
        """
        panels = self._panels
        plain_rows = lengths is None and reset is None and reset_to is None and noise is None
        if panels is not None and self._embedding is None and plain_rows and type(input) is Tensor:
            results = panels.run_simple(input, hx)  # type: ignore[arg-type]
            if results is not None:
                return results  # type: ignore[no-any-return]
        plain = self._plain(input, hx, reset_to, noise)
        if plain is not None:
            return plain(input, hx, lengths, reset, reset_to=reset_to, noise=noise)  # type: ignore[no-any-return]
        return run(self._call(input, hx, reset, reset_to, noise), input, lengths, self._embedding)

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
        call = self._call(input, hx, reset, reset_to, noise)
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
        call = self._call(input.unsqueeze(0), states)
        call.noise = None if noise is None else noise.unsqueeze(0)
        return map_states(run(call, call.data)[1], without_layers)  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # torch annotates __call__ as returning Any
        __call__ = forward


def _options_of(layer: Any, weights: list[Tensor]) -> int:
    """Returns the option bits of a layer or step module, whatever `batch_invariant()` is."""
    options: int = layer._options(weights) & ~ops.BATCH_INVARIANT
    return options | (ops.BATCH_INVARIANT if getattr(layer, "batch_invariant", False) else 0)


def _description(layer: Any) -> list[Any]:
    """Returns what must be equal in two layers for one to refresh the other."""
    rnn, weights = getattr(layer, "rnn", layer), layer._weights()
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
