"""Casts the tensors of a call. Under `torch.autocast`, casts them as torch's layers do."""

import torch
from torch import Tensor

from .. import ops
from ..cells import Cell
from ..machine.context import autocast_is_on
from .call import Call, Results

_CONVERTIBLE = {torch.float32, torch.bfloat16, torch.float16}


def autocast_dtype(
    input: Tensor, cell: Cell, kind: str = "padded", state: Tensor | None = None
) -> torch.dtype | None:
    """Returns the dtype in which autocast computes a layer, or None if autocast does not apply.

    On a CPU, autocast casts only the operands of products in `nn.GRU`, and in `nn.LSTM` with packed
    sequences or projections. The new state combines these products with the previous state, so it
    gets the promoted dtype of both.

    Args:
        input: features of any layout, or an embedding.
        cell: the layer's cell.
        kind: `projected` if the layer has projections, else `packed` if the sequences have lengths,
            of their own or as `lengths`, else `padded`.
        state: the initial state, or the second one if the cell has two; None for zeros.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return None
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and cell.torch and kind in cell.torch.autocasts_only_products:
        carried = input if state is None or state.dtype == torch.float64 else state
        return torch.promote_types(dtype, carried.dtype)
    return dtype


def cast_like_autocast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts a tensor to `dtype`, the result of `autocast_dtype`.

    Like autocast, leaves float64 tensors unchanged.
    """
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def convert_dtypes(call: Call) -> None:
    """Casts the tensors of a call as autocast does, then casts the states to the dtype of input.

    If input holds token ids, the embedding counts as input.
    """
    features = call.data if call.lookup is None else call.lookup.embedding
    if autocast_is_on():
        state = call.states[-1] if call.states else None
        kind = "padded" if call.sequence_layout is None else "packed"
        kind = "projected" if call.options & ops.PROJECTIONS else kind
        dtype = autocast_dtype(features, call.cell, kind, state)
        if call.prepared is not None:  # prepared weights cannot be cast
            dtype = call.prepared.shapes[0].dtype
        call.weights = [cast_like_autocast(weight, dtype) for weight in call.weights]
        call.convert_states(lambda state: cast_like_autocast(state, dtype))
        features = cast_like_autocast(features, dtype)
        if call.lookup is None:
            call.data = features
        else:
            call.lookup = call.lookup._replace(embedding=features)
    features_dtype = features.dtype
    if call.beside:
        call.beside = [rows.to(features_dtype) for rows in call.beside]
    for state in (*call.states, *call.restart_states):
        if state.dtype != features_dtype and features_dtype in _CONVERTIBLE:
            call.convert_states(
                lambda state: state.to(features_dtype) if state.dtype in _CONVERTIBLE else state
            )
            break


def cast_h(call: Call, results: Results) -> Results:
    """Casts output and h_n to autocast's dtype for matrix products. No-op for prepared weights."""
    output, h_n, c_n = results
    device, is_any_on = output.device.type, autocast_is_on()
    if call.prepared is not None or not (is_any_on and torch.is_autocast_enabled(device)):
        return results
    dtype = torch.get_autocast_dtype(device)
    return cast_like_autocast(output, dtype), cast_like_autocast(h_n, dtype), c_n
