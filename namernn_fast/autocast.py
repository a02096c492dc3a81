"""The dtypes of calls under `torch.autocast`, which are those of torch's own layers."""

import torch
from torch import Tensor

from .call import Cell


def autocast_dtype(input: Tensor, cell: Cell, packed: bool = False) -> torch.dtype | None:
    """Returns the dtype in which autocast computes a layer, or None if it does not apply.

    On a CPU torch has no rule for `nn.GRU`, nor for packed sequences of `nn.LSTM`: their results
    keep the dtype of the input.

    Args:
        input: features of any layout, or an embedding.
        cell: of the layer.
        packed: whether the input is a PackedSequence.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return None
    if device == "cpu" and (cell == "gru" or (cell == "lstm" and packed)):
        return input.dtype
    return torch.get_autocast_dtype(device)


def cast_like_autocast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts a tensor to the dtype of `autocast_dtype`, except float64, as autocast does."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)
