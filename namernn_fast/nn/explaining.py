"""`explain` reports which path and shortcuts a call takes, and why it does not take others."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import dispatch, gpu_backend, ops, torch_operators
from ..call import Arguments, Call, Choice, Lengths, given, tokens
from ..call.checks import check_like_nn_rnn
from ..call.options import nonlinearity_of, precision_bits
from ..machine import fp32_precision
from ..machine.context import is_compiling
from .base.layer import FusedLayer
from .base.step_module import FusedCell
from .base.token_layer import TokenLayer
from .inference.prepared import Prepared, PreparedCell
from .inference.stream import Stream
from .replacing import PLAIN
from .states import with_steps
from .weights import check_forward, why_not_int8

Layer: TypeAlias = FusedLayer[Any]
STEP_BY_STEP = "PyTorch's operators, step by step"
TOKEN_ARGUMENTS = ("lengths", "reset", "reset_to")
SHORTCUTS = ("table", "last state", "shared prefixes")


class Explanation(NamedTuple):
    """The result of `explain`. `str()` turns an explanation into a sentence."""

    path: str
    """`cpu` with an instruction set, `triton` with an architecture, `torch`, or `reference`, which
    means PyTorch's operators, step by step."""
    why_not: dict[str, str]
    """The reason against each path that the call does not take, by path name. If torch's settings
    allow a lower precision, also the reason against `float32 products` or `bfloat16 products`."""
    shortcuts: tuple[str, ...] = ()
    """The shortcuts that the call takes: `prepared weights`, `8-bit weights`, `table`, `last
    state`, `shared prefixes`."""
    why_no_shortcut: dict[str, str] = {}  # noqa: RUF012 - never modified
    """The reason against each shortcut that the call does not take, by its name. Empty unless input
    holds token ids, the call is `last_state`, or the module is prepared."""
    source: str | None = None
    """The source code of the Triton kernels, if the call runs them."""

    def __str__(self) -> str:
        path = self.path
        if path == "reference":
            path += f", {STEP_BY_STEP}"
        path = " with ".join([path, *([", ".join(self.shortcuts)] if self.shortcuts else [])])
        not_taken = {**self.why_not, **self.why_no_shortcut}
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in not_taken.items())
        return f"{path} ({reasons})" if reasons else path


def explain(
    layer: torch.nn.Module | Stream,
    input: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    lengths: Lengths | None = None,
    *,
    reset: Tensor | None = None,
    reset_to: Tensor | tuple[Tensor, Tensor] | None = None,
    embedding: Tensor | None = None,
    padding_idx: int | None = None,
    last_state: bool = False,
    **inputs: Tensor | PackedSequence | None,
) -> Explanation:
    """Returns which path and shortcuts `layer(input)` takes, and why it does not take others.

    Does not run the layer. The result depends on the current settings: gradients on or off,
    autocast, torch.func transforms, the precision of float32 products.

    Paths:

    - `cpu avx512`, `cpu avx2`, `cpu baseline`: the fused CPU kernel for this processor.
    - `cpu amx`, `cpu avx512_bf16`: the CPU kernel with bfloat16 instructions for products. Float32
      layers use it only if torch's settings allow it.
    - `cpu amx_int8`, `cpu avx512_vnni`, `cpu avx_vnni`: the CPU kernel for 8-bit weights.
    - `triton sm_90`, for example: the fused GPU kernel.
    - `reference`: PyTorch's operators, step by step.
    - `torch`: torch's own operator. Step modules use it unless the fused kernel is faster. A GRU or
      an LSTM uses it for sequences on devices without a fused kernel.

    Shortcuts:

    - `prepared weights`: weights packed by `prepare()`, which may also be `8-bit weights`.
    - `table`: multiplies each embedding row by weight_ih once instead of once per token.
    - `last state`: does not write the output.
    - `shared prefixes`: computes common prefixes of token ids once, if that is faster.

    Args:
        layer: a fused or prepared layer, step module or token layer of this package, or a stream.
        input: the input of the call; token ids for a token layer, or with `embedding`.
        hx, .., padding_idx, inputs: the other arguments of the call.
        last_state: whether to explain `layer.last_state(input)` instead.

    Raises:
        RuntimeError: the input is on a GPU, and Triton or the GPU is missing or too old.
        TypeError, ValueError, RuntimeError: layer has the wrong type, or the call would raise the
            same error for the types, shapes, dtypes or devices of its arguments.

    Example:
        >>> from namernn_fast import FusedRNN
        >>> explain(FusedRNN(8, 16, device="meta"), torch.randn(5, 3, 8, device="meta")).why_not
        {'cpu': 'the CPU kernel does not run on meta'}
    """
    if not isinstance(layer, FusedLayer | FusedCell | TokenLayer | Prepared | Stream):
        raise _wrong_type(layer)
    if last_state and isinstance(layer, FusedLayer | TokenLayer):
        check_forward(layer)
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs)
    if isinstance(layer, Stream):
        _refuse_all_but(layer, arguments, layer._prepared._layer._cell.input_names)
        arguments.input = layer._as_sequence(data)
        arguments.inputs = {
            name: layer._as_sequence(value) for name, value in given(**inputs).items()
        }
        return _of_prepared(layer._prepared, arguments, last_state)
    if isinstance(layer, Prepared):
        return _of_prepared(layer, arguments, last_state)
    if isinstance(layer, FusedCell):
        return _of_step(layer, arguments)
    why_rows = None
    if isinstance(layer, TokenLayer):
        _refuse_all_but(layer, arguments, (*TOKEN_ARGUMENTS, *layer._cell.input_names))
        why_rows, arguments.embedding = layer.why_not_fused(), layer.embedding.weight
        arguments.padding_idx = layer.embedding.padding_idx
    rnn = layer._recurrent
    return _of_layer(rnn, rnn._call(arguments, rnn._weights()), last_state, why_rows)


def _wrong_type(layer: Any) -> TypeError:
    """Returns the error of `explain` for a module that is not of this package."""
    hint = ""
    for name, part in layer.named_modules() if isinstance(layer, torch.nn.Module) else ():
        if isinstance(part, FusedLayer | FusedCell | TokenLayer | Prepared):
            hint = f": pass its {name}"
            break
    if type(layer) in PLAIN.values():
        hint = ": replace_rnn makes it one"
    return TypeError(
        "layer must be a fused or prepared layer, cell or token layer of this package, got "
        f"{type(layer).__name__}{hint}"
    )


def _refuse_all_but(layer: Any, arguments: Arguments, known: Sequence[str]) -> None:
    """Raises TypeError if `arguments` has an argument after hx that is not in `known`."""
    for name in arguments.keywords():
        if name not in known:
            raise TypeError(f"a {type(layer).__name__} takes no {name}")


def _of_layer(
    layer: Layer | Prepared[Any], call: Call, last_state: bool, why_rows: str | None = None
) -> Explanation:
    """Explains a call as `_of_call` does, and adds the source code of Triton kernels."""
    explained = _of_call(layer, call, last_state, why_rows)
    if not explained.path.startswith("triton"):
        return explained
    from ..gpu.layers import source_of

    source = source_of(call.cell, nonlinearity_of(call.options), call.hidden_size())
    return explained._replace(source=source)


def _of_call(
    layer: Layer | Prepared[Any], call: Call, last_state: bool, why_rows: str | None
) -> Explanation:
    """Explains a call on features or token ids.

    Args:
        layer: the layer that computes the call.
        call: the call.
        last_state: as in `explain`.
        why_rows: why the layer gets embedded rows instead of ids, or None if it gets ids.
    """
    choice, not_asked = _choice(call), None if last_state else "the output is needed"
    if call.lookup is None:
        check_like_nn_rnn(call)
        path, why_not = _named(call, choice)
        if not last_state:
            return Explanation(path, why_not)
        no_ids = "input does not hold token ids"
        return _with_shortcuts(
            path, why_not, no_ids, _why_output(layer, call, call.data, path), no_ids
        )
    rows, padding_idx, _ = call.lookup
    tokens.check_embedding(rows, padding_idx, call.data, call.weights)
    path, why_not = _named(call, choice)
    output = not_asked or _why_output(layer, call, rows, path)
    if why_rows is not None:
        return _with_shortcuts(path, why_not, why_rows, output, why_rows)
    table = tokens.why_not_table(call, rows, choice)
    shared = not_asked or tokens.why_not_shared(call, rows, choice)
    return _with_shortcuts(path, why_not, table, output, shared)


def _of_step(cell: FusedCell[Any], arguments: Arguments) -> Explanation:
    """Explains a call to a step module, which may run torch's own cell instead."""
    _refuse_all_but(cell, arguments, cell._cell.input_names)
    input = arguments.input
    reason = cell.why_not_fused(input, arguments.hx)
    if reason is not None:
        return Explanation("torch", {"triton" if input.is_cuda else "cpu": reason})
    call = cell._call(with_steps(arguments, cell._cell), cell._weights())
    path, why_not = _named(call, _choice(call))
    slower = "torch's own cell is slower for a single step of this size on this processor"
    why_not_torch = {"torch": cell.why_not_torch() or slower}
    return Explanation(path, why_not | why_not_torch if path == "reference" else why_not_torch)


def _of_prepared(layer: Prepared[Any], arguments: Arguments, last_state: bool) -> Explanation:
    """Explains a call to a prepared module. The arguments are as in `explain`."""
    if layer._panels is None:
        input, hx, keywords = arguments.input, arguments.hx, arguments.keywords()
        explained = explain(layer._layer, input, hx, last_state=last_state, **keywords)
        if layer.dtype is not None:
            only = "no kernel takes them, so the layer computes with the rounded weights in float32"
            explained = explained._replace(
                why_no_shortcut={**explained.why_no_shortcut, "8-bit weights": only}
            )
        return explained
    if isinstance(layer, PreparedCell):
        _refuse_all_but(layer, arguments, layer._layer._cell.input_names)
        arguments = with_steps(arguments, layer._layer._cell)
    else:
        layer._add_embedding(arguments)
    explained = _of_layer(layer, layer._call(arguments), last_state)
    gains_nothing, why_not = why_not_int8(layer._layer), {**explained.why_not}
    names, reasons = ["prepared weights"], {}
    if layer.dtype is not None:
        names.append("8-bit weights")
        if gains_nothing is not None:
            why_not["float32 weights"] = f"8-bit weights were requested, although {gains_nothing}"
    else:
        reasons["8-bit weights"] = gains_nothing or "the layer was prepared with its own dtype"
    return Explanation(
        explained.path,
        why_not,
        (*names, *explained.shortcuts),
        reasons | explained.why_no_shortcut,
    )


def _with_shortcuts(path: str, why_not: dict[str, str], *reasons: str | None) -> Explanation:
    """Returns the explanation of a call.

    `reasons` has an entry for each of `SHORTCUTS`: why the call does not take the shortcut, or None
    if the call takes it.
    """
    named = dict(zip(SHORTCUTS, reasons, strict=True))
    return Explanation(
        path,
        why_not,
        tuple(name for name, reason in named.items() if reason is None),
        {name: reason for name, reason in named.items() if reason is not None},
    )


def _choice(call: Call) -> Choice:
    return dispatch.choose(call, is_compiling())


def _named(call: Call, choice: Choice) -> tuple[str, dict[str, str]]:
    """Returns the name of the path chosen for a call, and the reasons against the other paths."""
    like = call.weights[0]
    why_only_float = ops.why_only_float(call.cell, call.weights, call.hidden_size(), call.options)
    device = "triton" if like.is_cuda else "cpu"
    if choice.why_not_kernel is not None:
        why_not = {device: choice.why_not_kernel}
        if choice.path is torch_operators.run_stack:
            return "torch", why_not
        if torch_operators.has_operator(call.cell):
            why_not["torch"] = str(choice.why_not_torch)
        return "reference", why_not
    if like.is_cuda:
        kernel, better = gpu_backend.architecture(like.device), "runs here instead of"
    else:
        dtype = torch.int8 if call.options & ops.INT8 else like.dtype
        if why_only_float is not None:
            dtype = torch.float32
        kernel, better = ops.cpu_kernel(dtype), "is faster than"
    why_not = {"reference": f"the fused kernel {better} {STEP_BY_STEP}"}
    bits = precision_bits(call.cell)
    if bits and not like.is_cuda and like.dtype == torch.float32 and not call.options & ops.INT8:
        products, reason = _products(call, call.options | bits, why_only_float)
        if products == "bfloat16":
            kernel = ops.cpu_kernel(torch.bfloat16)
        other = "float32" if products == "bfloat16" else "bfloat16"
        why_not[f"{other} products"] = reason
    return f"{device} {kernel}", why_not


def _products(call: Call, options: int, why_only_float: str | None) -> tuple[str, str]:
    """Returns the type in which the CPU kernel multiplies float32 numbers, and the reason.

    `options` are the option bits of the call, with a bit that allows a lower precision.
    """
    setting = f"torch.backends.mkldnn.{call.cell.fp32_precision}.fp32_precision"
    value = fp32_precision.on_cpu(call.cell.fp32_precision)
    hidden_size = call.state_sizes()[0]
    if why_only_float is not None:
        return "float32", f"the kernels with bfloat16 instructions do not support {why_only_float}"
    if ops.cpu_terms(options, *_sizes(call), hidden_size):
        return "bfloat16", f"{setting} is {value!r}"
    large = 2**10, 2**10, 2**20, 2**10
    if not ops.cpu_terms(options & ~ops.BATCH_INVARIANT, *large):
        return "float32", "this processor has no instructions that would make them faster"
    if not ops.cpu_terms(options, *large):
        return "float32", "with batch_invariant, small batches would be slower"
    return "float32", "they would not be faster for this size"


def _sizes(call: Call) -> tuple[int, int, int]:
    """Returns how many steps, nonempty sequences and rows a call has."""
    data, layout = call.data, call.sequence_layout
    if call.options & ops.PACKED:
        assert layout is not None
        return len(layout), int(layout[0]), data.shape[0]
    if call.options & ops.JAGGED:
        assert layout is not None
        lengths = layout.diff()
        return int(lengths.max()), int(lengths.count_nonzero()), data.shape[0]
    steps, batch = data.shape[:2]
    if call.options & ops.BATCH_FIRST:
        steps, batch = batch, steps
    return steps, batch, steps * batch


def _why_output(layer: Layer | Prepared[Any], call: Call, rows: Tensor, path: str) -> str | None:
    """Returns why a call to `last_state` also computes the output, or None if it does not.

    Args:
        layer: the layer that is called.
        call: the call, normalised.
        rows: the input of the call or, for token ids, the embedding.
        path: the path of the call.
    """
    if isinstance(layer, Prepared):
        return None
    if path == "reference":
        return f"{STEP_BY_STEP}, compute every state"
    if path == "torch":
        return "torch's own operator returns every state"
    if call.dropout:
        return "dropout needs the output of each layer"
    read = rows, *call.states, *layer.parameters()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
        return "the backward pass reads the output"
    return None
