"""`rnn()`: validation, layers and packed input around the operators, and their autograd."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import ops, reference
from .integrations import onnx, vmap

_MIXED = {torch.float32, torch.bfloat16, torch.float16}


class _FusedStack(torch.autograd.Function):
    """The fused operator with a gradient. Of the forward pass only the outputs are kept."""

    @staticmethod
    def forward(ctx, input, hx, rows, reset, options, *weights):
        options |= ops.WANT_HIDDEN
        output, h_n, hidden = ops.rnn_forward(input, hx, weights, rows, reset, options)
        ctx.save_for_backward(input, hx, rows, reset, output, *hidden, *weights)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        options, needed = ctx.options, ctx.needs_input_grad
        want_input, want_hx, want_weights = needed[0], needed[1], needed[_GIVEN:]
        input, hx, rows, reset, output, *hidden = ctx.saved_tensors
        count = len(want_weights)
        hidden, weights = hidden[:-count], hidden[-count:]
        if grad_output is None and grad_h_n is None:
            grad_input, grad_hx, grad_weights = None, None, []
        elif torch.is_grad_enabled():  # create_graph: the gradient itself must have one
            grad_input, grad_hx, *grad_weights = _differentiable_backward(
                ctx, input, hx, weights, rows, reset, grad_output, grad_h_n
            )
        else:
            per_layer = ops.weights_per_layer(options)
            grad_input, grad_hx, grad_weights = ops.rnn_backward(
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
                [
                    k // per_layer
                    for k in range(0, count, per_layer)
                    if any(want_weights[k : k + per_layer])
                ],
            )
        return (
            grad_input if want_input else None,
            grad_hx if want_hx else None,
            *_NOT_DIFFERENTIABLE,
            *(grad_weights or [None] * count),  # autograd drops what it did not ask for
        )


_NOT_DIFFERENTIABLE = (None,) * 3  # rows, reset and options
_GIVEN = 2 + len(_NOT_DIFFERENTIABLE)  # before the weights


def _differentiable_backward(ctx, input, hx, weights, rows, reset, grad_output, grad_h_n):
    """The gradients of input, hx and weights with a graph of their own, by way of the reference."""
    # A view of each, so that a tensor given in two places keeps two gradients.
    input, hx, *weights = (
        None if tensor is None else tensor.view_as(tensor) for tensor in (input, hx, *weights)
    )
    results = reference.rnn_stack(input, hx, weights, rows, reset, ctx.options)
    given = [
        (result, grad)
        for result, grad in zip(results, (grad_output, grad_h_n), strict=True)
        if grad is not None
    ]
    needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[_GIVEN:])
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


def _why_not_kernel(input: Tensor) -> str | None:
    """The reason why `input` (any layout, or the data of a packed sequence) goes to the reference
    path, or None: the fused kernel takes it."""
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0
        or (torch._C._are_functorch_transforms_active() and not vmap.only_vmap_is_active())
    ):
        return "a torch.func transform but vmap, or forward-mode differentiation, is active"
    return ops.why_not_kernel(input)


_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within it, the bits of a sequence's results do not depend on how it is batched.

    That is: not on the other sequences of the batch or its place among them, on padding, packing or
    lengths, or on the number of threads. It holds for what `rnn` and the modules compute forward;
    gradients of parameters are sums over the batch. One short sequence by itself then has its
    weights put in order first, like any batch; nothing else costs more.
    `FusedRNN(..., batch_invariant=True)` has the same for one module.

    Like torch's own such settings it is of the process, not of a thread.

    Args:
        enabled: False switches it off within an outer one.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = before


class Explanation(NamedTuple):
    """What `explain` returns; `str()` of it is a sentence."""

    path: str
    """`cpu` and an instruction set, `triton` and an architecture, or `reference`."""
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
    instruction set of this processor, `cpu amx` and `cpu avx512_bf16` its products in bfloat16;
    `triton sm_90`, say, is the fused kernel of a GPU; `reference` is ATen operators, step by step.

    Raises:
        RuntimeError: the input is on a GPU, and Triton or the GPU is not what the kernel needs.
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
    device = "triton" if data.is_cuda else "cpu"
    if reason is not None:
        return Explanation("reference", {device: reason})
    if data.is_cuda:
        kernel, better = ops.gpu_backend(data.device).device_of(data).arch, "runs here"
    else:
        kernel, better = ops.cpu_kernel(data.dtype), "is faster"
    return Explanation(f"{device} {kernel}", {"reference": f"the fused kernel {better}"})


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast hands it to `nn.RNN`: in its lower precision, float64 left alone."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _options_of_weights(weights, bias, bidirectional):
    """The options that say how many weights a layer has, having checked that it has so many."""
    options = (ops.BIAS if bias else 0) | (ops.BIDIRECTIONAL if bidirectional else 0)
    per_layer = ops.weights_per_layer(options)
    if not weights or len(weights) % per_layer:
        raise ValueError(
            f"weights must hold {per_layer} tensors for each layer (bias={bias}, "
            f"bidirectional={bidirectional}), got {len(weights)}"
        )
    return options


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
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Applies a vanilla RNN of one or more layers to whole sequences; `FusedRNN` calls this.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), as `torch.nn.RNN` defines it.

    Args:
        input: (seq_len, batch, input_size), with batch_first (batch, seq_len, input_size), without
            a batch (seq_len, input_size), a PackedSequence, sorted or not, or a jagged nested
            tensor (batch, any length, input_size). seq_len must be at least 1, but for a jagged
            tensor's; the batch may be empty. Any strides.
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
        lengths: how many steps of each sequence of a padded input are its own, (batch): integers
            from 0 to seq_len in any order, a tensor of any integer dtype and device, or a list.
            Padding costs no computation, and its values, even NaN, do not matter; output is zero
            there. The last state of a sequence of length 0 is its initial state. On an accelerator
            the values are not checked, which would wait for the device.
        reset: bool (seq_len, batch), laid out like input: (batch, seq_len) with batch_first,
            (seq_len) without a batch. Set where a new episode begins: it starts from a state of
            zeros, as if the sequence had been split there and its parts run one by one; the second
            direction runs each from its own end. Of a PackedSequence in the order of its padded
            form; not with a jagged tensor.
        batch_invariant: as within `namernn_fast.batch_invariant()`.

    Returns:
        output: the last layer's states at every step, like input with num_directions * hidden_size
        features (a PackedSequence for a PackedSequence, jagged for jagged), and h_n, like hx: the
        last state of every layer and direction.

    Raises:
        TypeError: input or hx is no tensor, lengths holds other things than integers, reset is no
            bool tensor.
        ValueError: the dtype of input is not that of the weights (outside autocast), its number of
            dimensions is wrong, `weights` does not fit the options, nonlinearity is unknown,
            lengths or reset come with an input that they do not go with.
        RuntimeError: a size, device or the dtype of hx does not fit; seq_len is 0; the batch_sizes
            of a packed sequence increase or do not sum to its rows; a length is not from 0 to
            seq_len; batch_invariant is wanted of ATen operators or on a GPU, which cannot promise
            it; on a GPU, Triton is missing or too old, or the GPU is.
    """
    options = _options_of_weights(weights, bias, bidirectional)
    if batch_first:
        options |= ops.BATCH_FIRST
    if batch_invariant or _batch_invariant:
        options |= ops.BATCH_INVARIANT
    if nonlinearity == "relu":
        options |= ops.RELU
    elif nonlinearity != "tanh":
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"hx must be a Tensor or None, got {type(hx).__name__}")

    rows = None
    dim = 3
    if isinstance(input, PackedSequence):
        data, rows, sorted_indices, unsorted_indices = input
        options |= ops.PACKED
        if sorted_indices is not None:
            hx = None if hx is None else hx.index_select(1, sorted_indices)
            if reset is not None:
                reset = reset.index_select(0 if batch_first else 1, sorted_indices)
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    elif not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    elif input.is_nested:
        data, rows = _jagged_parts(input)
        options |= ops.JAGGED
    else:
        data = input
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
            reset = None if reset is None else reset.unsqueeze(0 if batch_first else 1)
        elif dim != 3:
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
        elif hx is not None and hx.dim() != 3:
            raise RuntimeError(
                f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
            )
    if reset is not None:
        _check_reset(reset, options)
    if lengths is not None:
        rows = _as_rows(lengths, data, options)

    if torch._C._is_any_autocast_enabled():
        data = _autocast(data)
        hx = None if hx is None else _autocast(hx)
        weights = [_autocast(w) for w in weights]
    if hx is not None and hx.dtype != data.dtype and {hx.dtype, data.dtype} <= _MIXED:
        hx = hx.to(data.dtype)
    tracing = torch.compiler.is_compiling()
    if tracing and options & ops.PACKED and hx is None and sorted_indices is not None:
        # The batch as a size: what a tracer finds in batch_sizes is a value, which breaks graphs.
        states = ops.layer_count(weights, options) * ops.directions_of(options)
        hx = data.new_zeros(states, sorted_indices.shape[0], weights[1].shape[0])
    if dropout and (not training or ops.layer_count(weights, options) == 1):
        dropout = 0.0
    arguments = (data, hx, weights, rows, reset, options)
    if tracing and onnx.exporting():
        run_stack = onnx.rnn_stack
    elif (why_not := _why_not_kernel(data)) is not None:
        if options & ops.BATCH_INVARIANT:
            raise RuntimeError(f"batch_invariant needs the fused kernel: {why_not}")
        run_stack = _reference_stack
    elif not tracing and torch._C._are_functorch_transforms_active():
        run_stack = _mapped_stack
    else:
        run_stack = _fused_stack
    if (
        run_stack is not _fused_stack
        or tracing  # what a tracer runs checks nothing, nor does what runs
        or not weights[0].is_cpu  # where one of the tensors is on the meta device
        or (hx is not None and not hx.is_cpu)
    ):
        _check(*arguments)
        output, h_n = _run(run_stack, dropout, *arguments)
    else:
        try:
            output, h_n = _run(_fused_stack, dropout, *arguments)
        except RuntimeError:  # the operator checks its arguments; `nn.RNN` has words of its own
            _check(*arguments)
            raise

    if options & ops.PACKED:
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, rows, sorted_indices, unsorted_indices), h_n
    if options & ops.JAGGED:
        return torch.nested.nested_tensor_from_jagged(output, rows), h_n
    if dim == 2:
        return output.squeeze(0 if batch_first else 1), h_n.squeeze(1)
    return output, h_n


def _jagged_parts(input):
    """The rows (rows, features) and the offsets (batch + 1) of a jagged nested tensor."""
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have layout=torch.jagged, got torch.strided: make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    if input.dim() != 3 or input._ragged_idx != 1:
        raise ValueError(
            "a jagged input must be (batch, jagged steps, features), got "
            f"{input.dim()} dimensions, of which number {input._ragged_idx} is jagged"
        )
    if input.lengths() is not None:
        raise ValueError("a jagged input must have no holes, which input.contiguous() removes")
    return input.values(), input.offsets()


def _check_reset(reset, options):
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset must be a bool tensor, got {kind}")
    if options & ops.JAGGED:
        raise ValueError(
            "reset does not go with a jagged input: pad it and give its lengths, or split it"
        )


def _as_rows(lengths, data, options):
    """lengths as the operator takes them: where the kernel runs, or on the device of input, so
    that nothing waits for it."""
    if options & (ops.PACKED | ops.JAGGED):
        raise ValueError(
            "lengths go with a padded input; a PackedSequence or a jagged tensor has its own"
        )
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=torch.int64 if lengths == [] else None)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return lengths.to(data.device, torch.int64, non_blocking=True)


def _run(run_stack, dropout, data, hx, weights, rows, reset, options):
    """All layers in one call, or, with dropout between them, in one call each."""
    if not dropout:
        return run_stack(data, hx, weights, rows, reset, options)
    states = []
    for own_hx, own_weights in ops.layers_of(hx, weights, options):
        if states:
            data = torch.nn.functional.dropout(data, dropout, training=True)
        data, h_n = run_stack(data, own_hx, own_weights, rows, reset, options)
        states.append(h_n)
    return data, torch.cat(states)


def _check(data, hx, weights, rows, reset, options):
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
    padded = not options & (ops.PACKED | ops.JAGGED)
    batch_first = options & ops.BATCH_FIRST
    if padded and data.shape[1 if batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if padded and reset is not None and reset.shape != data.shape[:2]:
        raise RuntimeError(
            f"reset must have shape {tuple(data.shape[:2])}, got {tuple(reset.shape)}"
        )
    if hx is None:
        return
    # The operator compares a packed batch with batch_sizes[0], which is no number while tracing.
    batch = data.shape[0 if batch_first else 1] if padded else hx.shape[1]
    states = ops.layer_count(weights, options) * ops.directions_of(options)
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


def _mapped_stack(data, hx, weights, rows, reset, options):
    """The fused stack under vmap, and perhaps another one below."""
    if torch._C._are_functorch_transforms_active():
        return vmap.Mapped.apply(_mapped_stack, data, hx, rows, reset, options, *weights)
    return _fused_stack(data, hx, weights, rows, reset, options)


def _fused_stack(data, hx, weights, rows, reset, options):
    if _wants_gradient(data, hx, weights):
        return _FusedStack.apply(data, hx, rows, reset, options, *weights)
    output, h_n, _ = ops.rnn_forward(data, hx, weights, rows, reset, options)
    return output, h_n


def _reference_stack(data, hx, weights, rows, reset, options):
    _check_weights(data, weights, options)
    if options & ops.PACKED:
        _check_batch_sizes(data, hx, rows, reset, options)
    elif rows is not None and not options & ops.JAGGED:
        _check_lengths(data, rows, options)
    return reference.rnn_stack(data, hx, weights, rows, reset, options)


def _check_weights(data, weights, options):
    """The operator's own checks of the weights, for the path that does not come by it."""
    hidden_size = weights[1].shape[0]
    per_layer, directions = ops.weights_per_layer(options), ops.directions_of(options)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: per_layer // directions]
    for i, weight in enumerate(weights):
        name = names[i % len(names)]
        features = data.shape[-1] if i < per_layer else directions * hidden_size
        columns = {"weight_ih": (features,), "weight_hh": (hidden_size,)}.get(name, ())
        if weight.shape != (hidden_size, *columns):
            expected = (hidden_size, *columns)
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(weight.shape)}")


def _check_lengths(data, lengths, options):
    """The operator's own checks of lengths, as far as no device must be waited for."""
    batch_first = options & ops.BATCH_FIRST
    steps, batch = data.shape[1 if batch_first else 0], data.shape[0 if batch_first else 1]
    if lengths.shape != (batch,):
        raise RuntimeError(
            f"lengths must have one length for each of the {batch} sequences, got "
            f"{tuple(lengths.shape)}"
        )
    if not lengths.is_cpu or torch.compiler.is_compiling():
        return
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= steps:
            raise RuntimeError(
                f"lengths must be from 0 to {steps}, the steps of input, got {length} for "
                f"sequence {b}"
            )


def _check_batch_sizes(data, hx, batch_sizes, reset, options):
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
    if reset is not None:
        batch_first = options & ops.BATCH_FIRST
        shape = (sizes[0], len(sizes)) if batch_first else (len(sizes), sizes[0])
        if reset.shape != shape:
            raise RuntimeError(f"reset must have shape {shape}, got {tuple(reset.shape)}")
