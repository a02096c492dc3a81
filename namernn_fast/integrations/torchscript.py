"""TorchScript: `torch.jit.trace`, `torch.jit.script` and `torch.onnx.export(..., dynamo=False)`.

Both record the operators of `nn.RNN`, since TorchScript has no place for an `autograd.Function`.
"""

from typing import TypeVar

import torch

Plain = TypeVar("Plain", bound=torch.nn.Module)


def plain_twin(module: torch.nn.Module, cls: type[Plain]) -> Plain:
    """Returns a module of the class `cls` that shares all that `module` has, parameters too."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


def refuse_untraceable() -> None:
    """Checks that a call with lengths or resets can be traced: in inference, but not for ONNX.

    Raises:
        RuntimeError: it cannot.
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) cannot export lengths= or reset=: use "
            "dynamo=True, which can export lengths="
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch.jit.trace cannot record gradients of a call with lengths= or reset=: trace it "
            "under torch.no_grad(), for inference, or use torch.export"
        )
