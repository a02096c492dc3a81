"""8-bit weights for recurrent layers through `torchao.quantization.quantize_`.

torchao converts linear layers and convolutions. The config in this module replaces recurrent layers
of this package and of torch with prepared modules, as `prepare_rnn` does:

    from namernn_fast.torchao import RecurrentConfig, is_recurrent
    from torchao.quantization import quantize_

    quantize_(model, RecurrentConfig(), is_recurrent)

Importing this module imports torchao, which takes seconds.
"""

from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from .nn.replacing import is_replaceable, prepare_rnn


@dataclass
class RecurrentConfig(AOBaseConfig):  # type: ignore[misc]
    """Replaces recurrent layers with prepared ones.

    Attributes:
        dtype: as in `prepare_rnn`.
        min_hidden: as in `prepare_rnn`.
    """

    dtype: torch.dtype | None = torch.int8
    min_hidden: int | None = None


def is_recurrent(module: torch.nn.Module, name: str = "") -> bool:
    """Returns whether `RecurrentConfig` replaces a module; the `filter_fn` of `quantize_`.

    Args:
        module: any module of the model.
        name: ignored.
    """
    return is_replaceable(module)


@register_quantize_module_handler(RecurrentConfig)  # type: ignore[untyped-decorator]
def _prepare(module: torch.nn.Module, config: RecurrentConfig) -> torch.nn.Module:
    """Turns a module into a prepared module by changing the object in place.

    torchao would drop a new object if the model itself is the layer or if the layer has several
    names.
    """
    prepared = prepare_rnn(module, config.dtype, config.min_hidden)
    module.__class__, module.__dict__ = type(prepared), prepared.__dict__
    return module
