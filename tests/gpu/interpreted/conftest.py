"""Runs the GPU operators on the CPU in Triton's interpreter, for `tests/gpu/test_triton.py`.

The interpreter runs one program after another, so it cannot run kernels whose programs wait for
each other.
"""

import numpy as np
import pytest
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from benchmarks.gpu.dry_run import H100, on_cuda, serve_cpu_tensors
from namernn_fast.gpu import launching

if not triton.knobs.runtime.interpret:
    raise RuntimeError("set the environment variable TRITON_INTERPRET=1")

_KERNELS = "namernn_fast.gpu.kernels"


@pytest.fixture(autouse=True, scope="session")
def _gpu_operators_on_the_cpu():
    library = serve_cpu_tensors(lambda: H100, on_cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "run", _run)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        patch.setattr(interpreter.ReduceOps, "sum", _sum)
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        # The compiled kernels also run with assertions enabled.
        options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield library  # keeps the operators registered


def _create_dot(self, left, right, sum, input_precision, max_num_imprecise_acc):
    """Multiplies matrices with the rounding of tensor cores.

    Triton's interpreter multiplies the bit patterns of bfloat16 numbers instead of their values,
    and does not truncate the last 13 bits of TF32 operands.
    """

    def values(operand):
        if operand.dtype == tl.bfloat16:
            found = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None)
            return found.view(np.float32)
        found = operand.data.astype(sum.data.dtype)
        if operand.dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            found = (found.view(np.int32) & -0x2000).view(np.float32)
        return found

    product = np.matmul(values(left), values(right))
    return interpreter.TensorHandle(product + sum.data, sum.dtype.scalar)


def _sum(self, input):
    """Sums numbers in a tree, as GPUs do. NumPy does this only if the numbers are contiguous."""
    adjacent = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1))
    return self.to_tensor(adjacent.sum(-1), input.dtype)


def _call(self, *arguments, **options):
    """Calls a function in a kernel. Triton's version also patches `triton.language` each time."""
    if self.fn.__module__.startswith(_KERNELS):
        return self.rewrite()(*arguments, **options)
    return _interpreted_call(self, *arguments, **options)


_interpreted_call = interpreter.InterpretedFunction.__call__


def _run(kernel, grid, arguments, settings):
    """Replaces `launching.run`, and runs a kernel in the interpreter."""
    if "FORM" in arguments:
        assert arguments["FORM"].MEMBERS == 1, "programs that wait for each other need the emulator"
    kernel[grid](**arguments)


@pytest.fixture(autouse=True)
def _ieee_by_default(fp32_precision):
    """Disables TF32 unless a test enables it: the baseline, `nn.RNN` on the CPU, uses float32."""
