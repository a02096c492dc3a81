"""`Saved`: saves, loads, copies and converts prepared modules.

Files and copies hold the weights of the layer, because the order of packed weights depends on the
processor. With 8-bit weights they hold the integers and scales.
"""

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from ...call import int8
from ..weights import from_saved, matrices


class Temporary:
    """Tensors that only a pickle refers to.

    To send a tensor to another process, torch shares its memory, which must stay alive until the
    process has received it. So these tensors are sent by value instead.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def _by_value(temporary: Temporary) -> Any:
    return pickle.loads, (pickle.dumps(temporary),)


ForkingPickler.register(Temporary, _by_value)


class Saved(torch.nn.Module):
    """The base class of `Prepared`: the methods that unpack the weights and pack them again."""

    dtype: torch.dtype | None
    """int8 if the weights are 8-bit integers, otherwise None."""
    _layer: Any
    """The module that was prepared. It is on the meta device if its weights are packed."""
    _weights_ih: list[Tensor]
    """weight_ih of each direction of the first layer if a table replaces it, otherwise empty."""

    def _hold(self, layer: Any) -> None:
        """Replaces the weights with those of `layer`. On failure, leaves this module unchanged."""
        raise NotImplementedError

    def _weights(self) -> list[Tensor]:
        """Returns copies of the layer's weights."""
        raise NotImplementedError

    def _frozen(self) -> Any:
        """Returns a layer with copies of the weights, which do not require gradients."""
        return self._layer._with_weights(self._weights(), False)

    def restore(self) -> Any:
        """Returns a new module of the class that was prepared, with the weights of this module.

        The new module is in eval mode, and its parameters require gradients.

        Raises:
            RuntimeError: the weights were rounded to 8 bits.
        """
        if self.dtype is not None:
            raise RuntimeError("8-bit weights cannot be restored: they were rounded")
        return self._layer._with_weights(self._weights(), True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def identity(weight: Tensor) -> tuple[Any, ...]:
            return weight.data_ptr(), weight._version, weight.dtype, weight.device

        with torch.inference_mode(False):  # inference tensors have no version
            layer = self._frozen()
            before = [*map(identity, layer._weights())]
            if [*map(identity, layer._apply(fn)._weights())] != before:
                self._hold(layer)
        return self

    def _integer_names(self, layer: Any, weights_ih: list[Tensor]) -> list[str]:
        """Returns the names of the weights that are 8-bit integers.

        Tables, and the `weights_ih` that they replace, are in float32.
        """
        return [] if self.dtype is None else matrices(layer, len(weights_ih))

    def _to_save(
        self, layer: Any, weights: list[Tensor], weights_ih: list[Tensor]
    ) -> dict[str, Tensor]:
        """Returns the weights of a layer by name, 8-bit weights as integers and scales."""
        named = dict(zip(layer._names_in_state_dict(), weights, strict=True))
        int8.to_integers(named, self._integer_names(layer, weights_ih))
        return named

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        layer = self._frozen()
        layer.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        integers = self._integer_names(layer, self._weights_ih)
        int8.to_integers(destination, [prefix + name for name in integers])

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
        state = dict(self.__dict__, _panels=None, _shapes=[], _weights_ih=[], _embedding=None)
        weights = self._weights()
        state["_layer"] = self._layer._with_weights([w.to("meta") for w in weights], False)
        saved = self._to_save(self._layer, weights, self._weights_ih)
        return {**state, "_saved": Temporary(saved)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved").value
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(self._layer._with_weights(from_saved(self._layer, saved), False))

    def __prepare_scriptable__(self) -> Any:
        """Returns the module that `torch.jit.script` compiles instead of this one."""
        if self.dtype is not None:
            raise RuntimeError("TorchScript has no 8-bit weights: script the layer itself")
        return self.restore().__prepare_scriptable__()
