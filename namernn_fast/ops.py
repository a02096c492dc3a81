"""The operators: schemas, fake kernels and handles, and which of them this installation has.

An operator runs one layer, both directions where there are two, over the whole sequence:

- input: (seq_len, batch, features), or (batch, seq_len, features) with batch_first, or, with
  batch_sizes, the data of a PackedSequence (rows, features).
- hx: (directions, batch, hidden_size), or None for zeros.
- weights: for each direction weight_ih, weight_hh and, with biases, bias_ih, bias_hh.
- output: like input with directions * hidden_size features; h_n: like hx.

Backward returns the gradients of input, hx and weights; one that is not wanted is empty.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "namernn_fast"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "rnn_forward(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
    "str nonlinearity, bool bidirectional, bool batch_first) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    "Tensor[] weights, Tensor output, Tensor? batch_sizes, str nonlinearity, bool bidirectional, "
    "bool batch_first, bool want_input, bool want_hx, bool want_weights) "
    "-> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("rnn_prepack(Tensor[] weights, bool bidirectional) -> Tensor")
_library.define(
    "rnn_forward_prepacked(Tensor input, Tensor? hx, Tensor packed, int hidden_size, "
    "Tensor? batch_sizes, str nonlinearity, bool bidirectional, bool batch_first) "
    "-> (Tensor, Tensor)"
)
_library.define("cpu_kernel(bool bfloat16) -> str")
_library.define(
    "cpu_plan(int[] batch_sizes, int input_size, int hidden_size, int threads, int near_bytes) "
    "-> (int, int, float)"
)


def _load_extension() -> bool:
    if importlib.util.find_spec(f"{NAMESPACE}._C") is None:
        warnings.warn(
            "namernn_fast was built without its C++ extension: every input takes the slower path "
            "through ATen operators. Reinstall it with a C++ compiler at hand to have the kernels.",
            stacklevel=3,
        )
        return False
    importlib.import_module(f"{NAMESPACE}._C")
    return True


HAS_EXTENSION = _load_extension()

rnn_forward = torch.ops.namernn_fast.rnn_forward.default
rnn_backward = torch.ops.namernn_fast.rnn_backward.default
rnn_prepack = torch.ops.namernn_fast.rnn_prepack.default
rnn_forward_prepacked = torch.ops.namernn_fast.rnn_forward_prepacked.default


def cpu_kernel(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set that the CPU kernel uses here: avx512, avx2 or baseline, and for the
    forward pass in bfloat16 avx512_bf16 or amx where the processor is faster with it."""
    return torch.ops.namernn_fast.cpu_kernel(dtype == torch.bfloat16)


class Plan(NamedTuple):
    """How a layer's recurrence would be shared out: groups of sequences, members over the hidden
    units of each, and the time in ns that the rule's model has for it."""

    groups: int
    members: int
    nanoseconds: float


def cpu_plan(
    batch_sizes: Sequence[int],
    input_size: int,
    hidden_size: int,
    threads: int,
    near_bytes: int = 2**20,
) -> Plan:
    """What the CPU kernel's threading rule chooses in float32, on a machine that need not be this.

    Args:
        batch_sizes: the number of sequences at each step.
        input_size, hidden_size: of the layer.
        threads: the number of threads to share the work.
        near_bytes: the size of a core's own cache, in bytes.
    """
    return Plan(
        *torch.ops.namernn_fast.cpu_plan(batch_sizes, input_size, hidden_size, threads, near_bytes)
    )


@torch.library.register_fake(f"{NAMESPACE}::rnn_forward")
def _(input, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first):
    directions = 2 if bidirectional else 1
    hidden_size = weights[1].shape[0]
    if hx is not None:
        batch = hx.shape[1]
    elif batch_sizes is not None:  # the batch is a value in batch_sizes, unknown to a tracer
        batch = torch.library.get_ctx().new_dynamic_size()
    else:
        batch = input.shape[0 if batch_first else 1]
    output = input.new_empty((*input.shape[:-1], directions * hidden_size))
    return output, input.new_empty((directions, batch, hidden_size))


@torch.library.register_fake(f"{NAMESPACE}::rnn_backward")
def _(
    grad_output,
    grad_h_n,
    input,
    hx,
    weights,
    output,
    batch_sizes,
    nonlinearity,
    bidirectional,
    batch_first,
    want_input,
    want_hx,
    want_weights,
):
    return (
        input.new_empty(input.shape if want_input else (0,)),
        input.new_empty(hx.shape if want_hx else (0,)),
        [w.new_empty(w.shape) for w in weights] if want_weights else [],
    )


_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_cpu_kernel(input: Tensor) -> str | None:
    """The reason why the CPU kernel does not take this input, or None: it does."""
    if not input.is_cpu:
        return f"the CPU kernel does not run on {input.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension was not built"
    if input.dtype not in _CPU_DTYPES:
        return f"the CPU kernel has floating-point types of 16 to 64 bits, not {input.dtype}"
    return None
