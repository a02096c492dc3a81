"""The operators: schemas, fake kernels and handles, and which of them this installation has.

An operator runs a stack of layers, both directions where there are two, over whole sequences:

- input: (seq_len, batch, features), or (batch, seq_len, features) with BATCH_FIRST.
- rows: which of its rows exist, all if it is None: an int64 tensor, lengths (batch) of padded
  sequences in any order; with PACKED batch_sizes (seq_len), and input is the data of a
  PackedSequence (rows, features); with JAGGED offsets (batch + 1), and input has the sequences
  (rows, features) one after the other, each with its own rows in turn. It is on the device of
  input, but batch_sizes, which is on the CPU.
- reset: bool (seq_len, batch), (batch, seq_len) with BATCH_FIRST, set where a state starts anew.
- hx: (num_layers * directions, batch, hidden_size), or None for zeros.
- weights: for each layer and direction weight_ih, weight_hh and, with BIAS, bias_ih and bias_hh.
- options: a sum of the bits below. A bit costs nothing, an argument a fifth of a microsecond.
- output: like input with directions * hidden_size features; h_n: like hx; hidden: with WANT_HIDDEN
  the outputs of all layers but the last, which the backward pass needs.

Backward returns the gradients of input, hx and weights; one that is not wanted is empty.
want_layers has the numbers of the layers whose weights' gradients are wanted.
"""

import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "namernn_fast"

# The bits of `options`, in the order that csrc/library.cpp reads them.
RELU = 1  # else tanh
BIAS = 2
BIDIRECTIONAL = 4
BATCH_FIRST = 8
PACKED = 16
JAGGED = 32
BATCH_INVARIANT = 64
WANT_HIDDEN = 128

_library = torch.library.Library(NAMESPACE, "DEF")
_ROWS = "Tensor? rows, Tensor? reset, int options"
_library.define(
    f"rnn_forward(Tensor input, Tensor? hx, Tensor[] weights, {_ROWS}) -> "
    "(Tensor output, Tensor h_n, Tensor[] hidden)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, "
    f"Tensor[] weights, Tensor output, Tensor[] hidden, {_ROWS}, bool want_input, bool want_hx, "
    "int[] want_layers) -> (Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("cpu_kernel(bool bfloat16) -> str")
_library.define(
    "cpu_plan(int[] batch_sizes, int input_size, int hidden_size, int num_layers, int threads, "
    "int near_bytes) -> (int, int, float, int)"
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


def cpu_kernel(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set that the CPU kernel uses here: avx512, avx2 or baseline, and for the
    products in bfloat16 avx512_bf16 or amx where the processor is faster with it."""
    return torch.ops.namernn_fast.cpu_kernel(dtype == torch.bfloat16)


def directions_of(options: int) -> int:
    return 2 if options & BIDIRECTIONAL else 1


def weights_per_layer(options: int) -> int:
    return directions_of(options) * (4 if options & BIAS else 2)


def layer_count(weights: Sequence[Tensor], options: int) -> int:
    return len(weights) // weights_per_layer(options)


def layers_of(
    hx: Tensor | None, weights: Sequence[Tensor], options: int
) -> Iterator[tuple[Tensor | None, Sequence[Tensor]]]:
    """The initial states and the weights of each layer of a stack."""
    count, layers = weights_per_layer(options), layer_count(weights, options)
    states = [None] * layers if hx is None else hx.chunk(layers)
    for k, own_hx in enumerate(states):
        yield own_hx, weights[k * count : (k + 1) * count]


class Plan(NamedTuple):
    """How a layer's recurrence would be shared out: groups of sequences, members over the hidden
    units of each, and the time in ns that the rule's model has for it; and how many layers of a
    stack of them would run at once, a thread each, in place of that."""

    groups: int
    members: int
    nanoseconds: float
    layers: int


def cpu_plan(
    batch_sizes: Sequence[int],
    input_size: int,
    hidden_size: int,
    threads: int,
    near_bytes: int = 2**20,
    num_layers: int = 1,
) -> Plan:
    """What the CPU kernel's threading rule chooses in float32, on a machine that need not be this.

    Args:
        batch_sizes: the number of sequences at each step.
        input_size, hidden_size: of the layer.
        threads: the number of threads to share the work.
        near_bytes: the size of a core's own cache, in bytes.
        num_layers: of a stack of such layers, in one direction.
    """
    return Plan(
        *torch.ops.namernn_fast.cpu_plan(
            batch_sizes, input_size, hidden_size, num_layers, threads, near_bytes
        )
    )


@torch.library.register_fake(f"{NAMESPACE}::rnn_forward")
def _(input, hx, weights, rows, reset, options):
    num_layers, directions = layer_count(weights, options), directions_of(options)
    hidden_size = weights[1].shape[0]
    if hx is not None:
        batch = hx.shape[1]
    elif options & PACKED:  # the batch is a value in batch_sizes, unknown to a tracer
        batch = torch.library.get_ctx().new_dynamic_size()
    elif options & JAGGED:
        batch = rows.shape[0] - 1
    else:
        batch = input.shape[0 if options & BATCH_FIRST else 1]
    output_shape = (*input.shape[:-1], directions * hidden_size)
    hidden = num_layers - 1 if options & WANT_HIDDEN else 0
    return (
        input.new_empty(output_shape),
        input.new_empty((num_layers * directions, batch, hidden_size)),
        [input.new_empty(output_shape) for _ in range(hidden)],
    )


@torch.library.register_fake(f"{NAMESPACE}::rnn_backward")
def _(
    grad_output,
    grad_h_n,
    input,
    hx,
    weights,
    output,
    hidden,
    rows,
    reset,
    options,
    want_input,
    want_hx,
    want_layers,
):
    per_layer = weights_per_layer(options)
    return (
        input.new_empty(input.shape if want_input else (0,)),
        input.new_empty(hx.shape if want_hx else (0,)),
        [
            w.new_empty(w.shape if i // per_layer in want_layers else (0,))
            for i, w in enumerate(weights if want_layers else [])
        ],
    )


_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_kernel(input: Tensor) -> str | None:
    """The reason why no fused kernel takes this input, or None: that of its device does."""
    if not input.is_cuda:
        return why_not_cpu_kernel(input)
    if input.dtype not in TRITON_DTYPES:
        return f"the GPU kernels have floating-point types of 16 and 32 bits, not {input.dtype}"
    return None


def why_not_cpu_kernel(input: Tensor) -> str | None:
    """The reason why the CPU kernel does not take this input, or None: it does."""
    if not input.is_cpu:
        return f"the CPU kernel does not run on {input.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension was not built"
    if input.dtype not in _CPU_DTYPES:
        return f"the CPU kernel has floating-point types of 16 to 64 bits, not {input.dtype}"
    return None


TRITON_MINIMUM = (3, 6)
_CAPABILITY_MINIMUM = (8, 0)


def _or_move(device: torch.device) -> str:
    return f"or move the layer and its input from {device} to the CPU"


def _require_triton(device: torch.device) -> None:
    wanted = ".".join(map(str, TRITON_MINIMUM))
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            f"namernn_fast: on {device.type} devices it needs Triton, which cannot be imported "
            f"({error}): pip install 'triton>={wanted}', {_or_move(device)}"
        ) from error
    found = triton.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON_MINIMUM:
        raise RuntimeError(
            f"namernn_fast: it needs Triton {wanted} or newer, found {found}: "
            f"pip install --upgrade 'triton>={wanted}', {_or_move(device)}"
        )
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY_MINIMUM:
            raise RuntimeError(
                "namernn_fast: it needs a GPU of compute capability "
                f"{_CAPABILITY_MINIMUM[0]}.{_CAPABILITY_MINIMUM[1]} or newer, {device} has "
                f"{capability[0]}.{capability[1]}: use torch.nn.RNN there, {_or_move(device)}"
            )


@functools.cache
def gpu_backend(device: torch.device):
    """The implementations for GPUs, imported when the first tensor on one arrives.

    Raises:
        RuntimeError: Triton is missing or too old, or the device is.
    """
    _require_triton(device)
    return importlib.import_module(f"{__package__}.gpu")


@torch.library.impl(_library, "rnn_forward", "CUDA")
def _(input, *arguments):
    return gpu_backend(input.device).rnn_forward(input, *arguments)


@torch.library.impl(_library, "rnn_backward", "CUDA")
def _(grad_output, grad_h_n, input, *arguments):
    backend = gpu_backend(input.device)
    return backend.rnn_backward(grad_output, grad_h_n, input, *arguments)
