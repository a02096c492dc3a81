"""`rnn()`: validation, layers and packed input around the operators, and their autograd."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import ops, reference

_MIXED = {torch.float32, torch.bfloat16, torch.float16}


class _FusedLayer(torch.autograd.Function):
    """The fused operator with a gradient. Of the forward pass only the output is kept."""

    @staticmethod
    def forward(ctx, input, hx, batch_sizes, nonlinearity, bidirectional, batch_first, *weights):
        output, h_n = ops.rnn_forward(
            input, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first
        )
        ctx.save_for_backward(input, hx, batch_sizes, output, *weights)
        ctx.options = (nonlinearity, bidirectional, batch_first)
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        input, hx, batch_sizes, output, *weights = ctx.saved_tensors
        want_input, want_hx, *_ = ctx.needs_input_grad
        want_weights = any(ctx.needs_input_grad[6:])
        if grad_output is None and grad_h_n is None:
            grad_input, grad_hx, grad_weights = None, None, []
        elif torch.is_grad_enabled():  # create_graph: the gradient itself must have one
            grad_input, grad_hx, *grad_weights = _differentiable_backward(
                ctx, grad_output, grad_h_n
            )
        else:
            grad_input, grad_hx, grad_weights = ops.rnn_backward(
                grad_output,
                grad_h_n,
                input,
                hx,
                weights,
                output,
                batch_sizes,
                *ctx.options,
                want_input,
                want_hx,
                want_weights,
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            *(None, None, None, None),
            *(grad_weights or [None] * len(weights)),
        )


def _differentiable_backward(ctx, grad_output, grad_h_n):
    """The gradients of input, hx and weights with a graph of their own, by way of the reference."""
    input, hx, batch_sizes, _, *weights = ctx.saved_tensors
    # A view of each, so that a tensor given in two places keeps two gradients.
    input, hx, *weights = (
        None if tensor is None else tensor.view_as(tensor) for tensor in (input, hx, *weights)
    )
    results = reference.rnn_layer(input, hx, weights, batch_sizes, *ctx.options)
    given = [
        (result, grad)
        for result, grad in zip(results, (grad_output, grad_h_n), strict=True)
        if grad is not None
    ]
    needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[6:])
    grads = iter(
        torch.autograd.grad(
            [result for result, _ in given],
            [s for s, n in zip((input, hx, *weights), needed, strict=True) if n],
            [grad for _, grad in given],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(grads) if n else None for n in needed]


def _transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is looking on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _why_not_kernel(input: Tensor) -> str | None:
    """The reason why `input` (any layout, or the data of a packed sequence) goes to the reference
    path, or None: the fused kernel takes it."""
    if not torch.compiler.is_compiling() and _transforms_active():
        return "a torch.func transform or forward-mode differentiation is active"
    return ops.why_not_cpu_kernel(input)


class Explanation(NamedTuple):
    """What `explain` returns; `str()` of it is a sentence."""

    path: str
    """`cpu` and an instruction set, or `reference`."""
    why_not: dict[str, str]
    """For every path not taken, the reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"not {path}: {reason}" for path, reason in self.why_not.items())
        return f"{self.path} ({reasons})" if reasons else self.path


def explain(layer: torch.nn.Module, input: Tensor | PackedSequence) -> Explanation:
    """Says which path `layer(input)` takes and why not another.

    Args:
        layer: a FusedRNN or FusedRNNCell. Anything else is a TypeError.
        input: what the layer would be called with. Nothing is computed.

    The paths: `cpu avx512`, `cpu avx2` and `cpu baseline` are the fused kernel in the best
    instruction set of this processor, `cpu amx` and `cpu avx512_bf16` its forward pass in bfloat16;
    `reference` is ATen operators, step by step.
    """
    from .nn import FusedRNN, FusedRNNCell

    if not isinstance(layer, FusedRNN | FusedRNNCell):
        raise TypeError(f"layer must be a FusedRNN or FusedRNNCell, got {type(layer).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if torch._C._is_any_autocast_enabled():
        data = _autocast(data)
    reason = _why_not_kernel(data)
    if reason is None:
        return Explanation(
            f"cpu {ops.cpu_kernel(data.dtype)}", {"reference": "the fused kernel is faster"}
        )
    return Explanation("reference", {"cpu": reason})


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast hands it to `nn.RNN`: in its lower precision, float64 left alone."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class Prepacked(NamedTuple):
    """The weights of a stack of layers as the forward kernel reads them, from `prepack`."""

    layers: list[Tensor]
    """One opaque tensor for each layer, of use in this process only."""
    weights: list[Tensor]
    """Aliases of what it was made of: while they live, no other tensor can come to lie there."""
    versions: list[int]
    """The version that each of them had."""

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights it was made of, unchanged as far as torch knows."""
        return all(
            w.data_ptr() == own.data_ptr() and w._version == version
            for w, own, version in zip(weights, self.weights, self.versions, strict=True)
        )


def prepack(weights: Sequence[Tensor], num_layers: int, bidirectional: bool = False) -> Prepacked:
    """Packs the weights of `rnn` once, for calls of which no gradient is wanted.

    Args:
        weights: as for `rnn`, on the CPU, of a floating-point type.
        num_layers: how many layers they are of.
        bidirectional: whether every layer has two directions.

    Raises:
        RuntimeError: the fused kernel is not installed or does not take these weights, or they are
            inference tensors, whose changes torch does not count.
    """
    reason = ops.why_not_cpu_kernel(weights[0])
    if reason is not None:
        raise RuntimeError(f"weights cannot be prepacked: {reason}")
    if any(w.is_inference() for w in weights):
        raise RuntimeError(
            "weights cannot be prepacked: they were made in inference mode, where torch does not "
            "count changes"
        )
    per_layer = len(weights) // num_layers
    with torch.no_grad():
        layers = [
            ops.rnn_prepack(weights[k : k + per_layer], bidirectional)
            for k in range(0, len(weights), per_layer)
        ]
    return Prepacked(layers, [w.detach() for w in weights], [w._version for w in weights])


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    training: bool = False,
    prepacked: Prepacked | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences; `FusedRNN` calls this.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), or a PackedSequence, sorted or not. seq_len must be at
            least 1; the batch may be empty. Any strides.
        hx: initial states (num_layers * num_directions, batch, hidden_size), in the order of the
            input's sequences; without a batch (num_layers * num_directions, hidden_size); None for
            zeros. Float32 and 16 bits are converted to the dtype of input, which h_n has too.
        weights: for each layer and direction weight_ih (hidden_size, features), weight_hh
            (hidden_size, hidden_size) and, with bias, bias_ih and bias_hh (hidden_size). The number
            of layers follows from their number.
        nonlinearity: "tanh" or "relu".
        bias: whether `weights` holds biases.
        batch_first: whether batch comes before seq_len in input and output (not in hx and h_n).
        dropout: probability of zeroing an element of a layer's output, except the last layer's,
            while training.
        bidirectional: whether every layer also runs from the end of the sequences.
        training: whether dropout is applied.
        prepacked: what `prepack` made of these very weights, to be read in their place where no
            gradient is wanted and autocast is off.

    Returns:
        output: the last layer's states at every step, like input with num_directions * hidden_size
        features (a PackedSequence for a PackedSequence), and h_n, like hx: the last state of every
        layer and direction.

    Raises:
        TypeError: input or hx is no tensor.
        ValueError: the dtype of input is not that of the weights (outside autocast), its number of
            dimensions is wrong, `weights` does not fit the options, nonlinearity is unknown.
        RuntimeError: a size, device or the dtype of hx does not fit; seq_len is 0; the batch_sizes
            of a packed sequence increase or do not sum to its rows.
    """
    directions = 2 if bidirectional else 1
    per_layer = 4 * directions if bias else 2 * directions
    num_layers, rest = divmod(len(weights), per_layer)
    if rest or not num_layers:
        raise ValueError(
            f"weights must hold {per_layer} tensors for each layer (bias={bias}, "
            f"bidirectional={bidirectional}), got {len(weights)}"
        )
    if nonlinearity not in reference.ACTIVATIONS:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"hx must be a Tensor or None, got {type(hx).__name__}")

    packed = isinstance(input, PackedSequence)
    if packed:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    elif isinstance(input, Tensor):
        data, batch_sizes = input, None
        dim = data.dim()
        if dim == 2:
            data = data.unsqueeze(0 if batch_first else 1)
            if hx is not None:
                if hx.dim() != 2:
                    raise RuntimeError(
                        "For unbatched 2-D input, hx should also be 2-D "
                        f"but got {hx.dim()}-D tensor"
                    )
                hx = hx.unsqueeze(1)
        elif dim != 3:
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
        elif hx is not None and hx.dim() != 3:
            raise RuntimeError(
                f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
            )
    else:
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")

    if torch._C._is_any_autocast_enabled():
        data = _autocast(data)
        hx = None if hx is None else _autocast(hx)
        weights = [_autocast(w) for w in weights]
        prepacked = None
    if hx is not None and {hx.dtype, data.dtype} <= _MIXED:
        hx = hx.to(data.dtype)
    if packed and hx is None and sorted_indices is not None and torch.compiler.is_compiling():
        # The batch as a size: what a tracer finds in batch_sizes is a value, which breaks graphs.
        states = num_layers * directions
        hx = data.new_zeros(states, sorted_indices.shape[0], weights[1].shape[0])
    checked = (hx, weights, batch_sizes, num_layers * directions, batch_first)
    arguments = (data, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first)
    dropout = dropout if training else 0.0
    if _why_not_kernel(data) is not None:
        _check(data, *checked)
        output, h_n = _layers(_reference_layer, num_layers, dropout, *arguments)
    elif (
        torch.compiler.is_compiling()  # what a tracer runs checks nothing, nor does what runs
        or not weights[0].is_cpu  # where one of the tensors is on the meta device
        or (hx is not None and not hx.is_cpu)
    ):
        _check(data, *checked)
        output, h_n = _layers(_fused_layer, num_layers, dropout, *arguments)
    else:
        run_layer = _fused_layer
        if prepacked is not None and not _wants_gradient(data, hx, weights):
            run_layer = partial(_prepacked_layer, weights[1].shape[0])
            arguments = (data, hx, prepacked.layers, *arguments[3:])
        try:
            output, h_n = _layers(run_layer, num_layers, dropout, *arguments)
        except RuntimeError:  # the operator checks its arguments; `nn.RNN` has words of its own
            _check(data, *checked)
            raise

    if packed:
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n
    if dim == 2:
        return output.squeeze(0 if batch_first else 1), h_n.squeeze(1)
    return output, h_n


def _layers(run_layer, num_layers, dropout, data, hx, weights, *options):
    """All layers, one after the other, with dropout between them."""
    if num_layers == 1:
        return run_layer(data, hx, weights, *options)
    per_layer = len(weights) // num_layers
    per_state = 1 if hx is None else hx.shape[0] // num_layers
    states = []
    for k in range(num_layers):
        data, h_n = run_layer(
            data,
            None if hx is None else hx[k * per_state : (k + 1) * per_state],
            weights[k * per_layer : (k + 1) * per_layer],
            *options,
        )
        states.append(h_n)
        if dropout and k < num_layers - 1:
            data = torch.nn.functional.dropout(data, dropout, training=True)
    return data, torch.cat(states)


def _check(data, hx, weights, batch_sizes, states, batch_first):
    """Raises the errors of `nn.RNN` for input and hx that do not fit the weights."""
    weight_ih, weight_hh = weights[:2]
    if data.dtype != weight_ih.dtype:
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), "
            f"or convert model: model.to({data.dtype})"
        )
    if data.device != weight_ih.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{data.device} and parameter tensor at {weight_ih.device}"
        )
    if data.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weight_ih.shape[1]}, got {data.shape[-1]}"
        )
    if batch_sizes is None and data.shape[1 if batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if hx is None:
        return
    # The operator compares a packed batch with batch_sizes[0], which is no number while tracing.
    packed = batch_sizes is not None
    batch = hx.shape[1] if packed else data.shape[0 if batch_first else 1]
    expected = (states, batch, weight_hh.shape[0])
    if hx.shape != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
    if hx.device != data.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{data.device} and hidden tensor at {hx.device}"
        )
    if hx.dtype != data.dtype:
        raise RuntimeError(f"hx must have the dtype of input, {data.dtype}, got {hx.dtype}")


def _wants_gradient(data, hx, weights):
    return torch.is_grad_enabled() and (
        data.requires_grad
        or (hx is not None and hx.requires_grad)
        or any(w.requires_grad for w in weights)
    )


def _fused_layer(data, hx, weights, batch_sizes, *options):
    if _wants_gradient(data, hx, weights):
        return _FusedLayer.apply(data, hx, batch_sizes, *options, *weights)
    return ops.rnn_forward(data, hx, weights, batch_sizes, *options)


def _prepacked_layer(hidden_size, data, hx, packed, batch_sizes, *options):
    return ops.rnn_forward_prepacked(data, hx, packed[0], hidden_size, batch_sizes, *options)


def _reference_layer(data, hx, weights, batch_sizes, *options):
    _check_weights(data, weights)
    if batch_sizes is not None:
        _check_batch_sizes(data, hx, batch_sizes)
    return reference.rnn_layer(data, hx, weights, batch_sizes, *options)


def _check_weights(data, weights):
    """The operator's own checks of one layer's weights, for the path that does not come by it."""
    hidden_size, features = weights[1].shape[0], data.shape[-1]
    shapes = {
        "weight_ih": (hidden_size, features),
        "weight_hh": (hidden_size, hidden_size),
        "bias_ih": (hidden_size,),
        "bias_hh": (hidden_size,),
    }
    names = list(shapes) if weights[2:] and weights[2].dim() == 1 else list(shapes)[:2]
    for i, weight in enumerate(weights):
        name = names[i % len(names)]
        if weight.shape != shapes[name]:
            raise RuntimeError(f"{name} must have shape {shapes[name]}, got {tuple(weight.shape)}")


def _check_batch_sizes(data, hx, batch_sizes):
    """The operator's own checks of a packed sequence, for the path that does not come by it."""
    sizes = batch_sizes.tolist()
    if not sizes:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for t, size in enumerate(sizes):
        if size < 1:
            raise RuntimeError(f"batch_sizes must be positive, got {size} at step {t}")
        if t and size > sizes[t - 1]:
            raise RuntimeError(
                f"batch_sizes must not increase, got {size} after {sizes[t - 1]} at step {t}"
            )
    if sum(sizes) != data.shape[0]:
        raise RuntimeError(
            f"batch_sizes must sum to the rows of data, {data.shape[0]}, got a sum of {sum(sizes)}"
        )
    if hx is not None and hx.shape[1] != sizes[0]:
        expected = (hx.shape[0], sizes[0], hx.shape[2])
        raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
