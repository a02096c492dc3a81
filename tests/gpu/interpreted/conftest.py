"""Runs the GPU operators on CPU tensors in Triton's interpreter, for `tests/gpu/test_triton.py`."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from namernn_fast import gpu, ops

if not triton.knobs.runtime.interpret:
    raise RuntimeError("set the environment variable TRITON_INTERPRET=1")


@pytest.fixture(autouse=True, scope="session")
def _gpu_operators_on_the_cpu():
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    arguments = {"forward": ops.ForwardArguments, "backward": ops.BackwardArguments}
    for name, read in arguments.items():
        run = getattr(gpu, name)
        library.impl(
            name,
            lambda *values, run=run, read=read: run(read(*values)),
            "CPU",
            allow_override=True,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        patch.setattr(interpreter.GridExecutor, "__call__", _launch)
        yield library  # keeps the operators registered


def _create_dot(self, left, right, sum, input_precision, max_num_imprecise_acc):
    """Multiplies matrices. Triton's interpreter multiplies the bit patterns of bfloat16 numbers."""

    def values(operand):
        if operand.dtype == tl.bfloat16:
            found = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None)
            return found.view(np.float32)
        return operand.data.astype(sum.data.dtype)

    product = np.matmul(values(left), values(right))
    return interpreter.TensorHandle(product + sum.data, sum.dtype.scalar)


def _call(self, *arguments, **options):
    """Calls a function in a kernel. Triton's version also patches `triton.language` each time."""
    if self.fn.__module__.startswith("namernn_fast.gpu"):
        return self.rewrite()(*arguments, **options)
    return _interpreted_call(self, *arguments, **options)


_interpreted_call = interpreter.InterpretedFunction.__call__


def _launch(self, **arguments):
    """Launches a kernel. Triton's interpreter drops arguments that the kernel does not take."""
    assert arguments.keys() - self.arg_names == {"num_warps", "enable_fp_fusion"}
    _interpreted_launch(self, **arguments)


_interpreted_launch = interpreter.GridExecutor.__call__
