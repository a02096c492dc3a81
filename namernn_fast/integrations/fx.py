"""`torch.fx`: the modules are leaves of a graph, as those of `torch.nn` are.

A tracer takes modules of the package `torch.nn` alone for leaves, and calls every other module with
proxies in place of tensors.
"""

from typing import Any

import torch
from torch.fx.proxy import Proxy, TraceError


def is_traced(*inputs) -> bool:
    """Returns whether any of the inputs is a stand-in of a tracer."""
    return any(isinstance(value, Proxy) for value in inputs)


def call_module(module: torch.nn.Module, *inputs, **options) -> Any:
    """Records a call of `module` as one node, and returns the stand-in of its result.

    Raises:
        TraceError: module is what is traced, and no part of it.
    """
    tracer: Any = next(value.tracer for value in inputs if isinstance(value, Proxy))
    path = tracer.path_of_module(module)
    if not path:
        raise TraceError(
            f"torch.fx cannot trace into {type(module).__name__}, which is a leaf: trace a module "
            "that contains it"
        )
    return tracer.create_proxy("call_module", path, inputs, options)
