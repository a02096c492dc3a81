"""Models whose recurrent layers compute in float64, as oracles of error budgets."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

RECURRENT = nn.RNNBase, nn.RNNCellBase
"""The base classes of torch's layers and step modules."""


def converted(values: Any, dtype: torch.dtype) -> Any:
    """Converts the arguments or results of a layer to a dtype."""
    return tree_map(
        lambda value: None if value is None else value.to(dtype),
        values,
        is_leaf=lambda value: isinstance(value, PackedSequence),
    )


def make_precise(model: nn.Module) -> nn.Module:
    """Makes a model's torch recurrent layers compute in float64. Other modules stay in float32.

    Returns:
        The model, whose layers still take and return float32.
    """
    for module in model.modules():
        if isinstance(module, RECURRENT):
            module.double()
            module.register_forward_pre_hook(lambda _, given: converted(given, torch.float64))
            module.register_forward_hook(lambda _, given, found: converted(found, torch.float32))
    return model
