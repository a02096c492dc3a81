"""The dtypes of calls under `torch.autocast`, which are those of torch's own layers."""

import torch
from torch import Tensor

from .cells import Cell


def autocast_dtype(
    input: Tensor, cell: Cell, packed: bool = False, state: Tensor | None = None
) -> torch.dtype | None:
    """Returns the dtype in which autocast computes a layer, or None if it does not apply.

    On a CPU torch has no rule for `nn.GRU`, nor for packed sequences of `nn.LSTM`, only for the
    products in them: a state combines products in the dtype of autocast with the previous state,
    and its dtype is what both are promoted to.

    Args:
        input: features of any layout, or an embedding.
        cell: of the layer.
        packed: whether the input is a PackedSequence.
        state: the initial state, for an LSTM the cell state; None for zeros.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return None
    dtype = torch.get_autocast_dtype(device)
    layout = "packed" if packed else "padded"
    if device == "cpu" and layout in cell.autocasts_only_products:
        carried = input if state is None or state.dtype == torch.float64 else state
        return torch.promote_types(dtype, carried.dtype)
    return dtype


def cast_like_autocast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts a tensor to the dtype of `autocast_dtype`, except float64, as autocast does."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)
