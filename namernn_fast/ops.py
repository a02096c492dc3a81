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
_library.define("cpu_kernel() -> str")


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


def cpu_kernel() -> str:
    """The instruction set that the CPU kernel uses here: avx512, avx2 or baseline."""
    return torch.ops.namernn_fast.cpu_kernel()


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


def why_not_cpu_kernel(input: Tensor) -> str | None:
    """The reason why the CPU kernel does not take this input, or None: it does."""
    if input.device.type != "cpu":
        return f"the CPU kernel does not run on {input.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension was not built"
    if input.dtype not in (torch.float32, torch.float64):
        return f"the CPU kernel has float32 and float64, not {input.dtype}"
    return None
