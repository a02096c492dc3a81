"""Chooses the path of a call and runs it: a fused kernel, ATen operators, vmap, or ONNX."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    availability,
    fakes,  # noqa: F401 - registers the fake kernels
    native,
    ops,
    reference,
)
from .autograd import FusedStack, apply_untransformed
from .call import CLASSES, Call, Cell, Path, Results
from .checks import check_ids, check_like_nn_rnn, check_reference_arguments
from .integrations import onnx, vmap


def run(call: Call) -> Results:
    """Runs a stack of layers on the path chosen for its device and dtype.

    Raises:
        RuntimeError, ValueError: the arguments do not match; batch_invariant is set, but the path
            does not support it.
        IndexError: a token id is out of range.
    """
    like = call.weights[0]  # not data, which may be token ids
    tracing = torch.compiler.is_compiling()
    path = _choose_path(call, tracing)
    by_layers = call.dropout and not (path is native.run_stack and native.is_whole(call))
    if tracing:  # Check now: fake kernels do not, and compiled programs should not need to.
        check_like_nn_rnn(call)
        return _run_layers(path, call) if by_layers else path(call)
    data, hx, cx = call.data, call.hx, call.cx
    checked = (
        path is not _fused_path
        or call.dropout  # the operator sees one layer at a time
        or not (data.is_cpu and like.is_cpu)  # a GPU, or different devices
        or (hx is not None and not hx.is_cpu)
        or (cx is not None and not cx.is_cpu)
    )
    if checked:
        check_like_nn_rnn(call)
    try:
        return _run_layers(path, call) if by_layers else path(call)
    except (IndexError, RuntimeError):
        # The operator has found a bad argument. Re-check to raise nn.RNN's own message, or the
        # message that all paths share for a token id out of range.
        if not checked:
            check_like_nn_rnn(call)
        if ops.has_ids(data):
            check_ids(data, like.shape[0], call.sequence_layout, call.options)
        raise


def _choose_path(call: Call, tracing: bool) -> Path:
    """Returns the path of a call."""
    if tracing and onnx.exporting():
        return onnx.rnn_stack
    why_not = why_not_kernel(call.weights[0], tracing, call.cell)
    if why_not is not None:
        if call.options & ops.BATCH_INVARIANT:
            raise RuntimeError(f"batch_invariant needs the fused kernel: {why_not}")
        ragged = None if native.is_whole(call) else call.sequence_layout
        why_not_torch = native.why_not(call.cell, call.reset, tracing, ragged)
        return native.run_stack if why_not_torch is None else _reference_path
    if not tracing and torch._C._are_functorch_transforms_active():
        return _mapped_path
    return _fused_path


def why_not_kernel(like: Tensor, tracing: bool, cell: Cell) -> str | None:
    """Returns why the fused kernels cannot take a call in this context, or None if they can.

    Args:
        like: a tensor with the device and dtype of the call: a weight, or features of any layout.
        tracing: whether a compiler is tracing the call.
        cell: of the call.
    """
    if not tracing and (
        forward_ad._current_level >= 0
        or (torch._C._are_functorch_transforms_active() and not vmap.only_vmap_is_active())
    ):
        return "a torch.func transform other than vmap, or forward-mode AD, is active"
    return availability.why_not_kernel(like, cell)


def _run_layers(path: Path, call: Call) -> Results:
    """Runs each layer of a stack in a separate call, with dropout between them.

    The layers run time-major so that dropout draws the same masks as `nn.RNN`. LAST_STATE is
    dropped because dropout needs the output of every layer.
    """
    data, weights, reset = call.data, call.weights, call.reset
    options = call.options & ~ops.LAST_STATE
    batch_first = options & ops.BATCH_FIRST and not options & (ops.PACKED | ops.JAGGED)
    if batch_first:
        data, options = data.transpose(0, 1), options & ~ops.BATCH_FIRST
        reset = None if reset is None else reset.transpose(0, 1)
    per_layer = ops.weights_per_layer(options)
    states = []
    hx, cx = (ops.states_of_layers(of_all, weights, options) for of_all in (call.hx, call.cx))
    for k, (own_hx, own_cx) in enumerate(zip(hx, cx, strict=True)):
        if k:
            data = torch.nn.functional.dropout(data, call.dropout, training=True)
        own_weights = weights[k * per_layer : (k + 1) * per_layer]
        own = replace(
            call,
            data=data,
            hx=own_hx,
            cx=own_cx,
            weights=own_weights,
            reset=reset,
            options=options,
            dropout=0.0,
        )
        data, *last = path(own)
        states.append(last)
    if batch_first:
        data = reference.with_batch_first(data)
    return data, *map(torch.cat, zip(*states, strict=True))


def _fused_path(call: Call) -> Results:
    if torch.is_grad_enabled() and call.requires_grad():
        apply = FusedStack.apply if torch.compiler.is_compiling() else apply_untransformed
        return apply(*call.flat())
    tensors = call.data, call.hx, call.cx, call.weights, call.sequence_layout, call.reset
    return ops.forward(call.cell, *tensors, call.options, call.trees)[0]


def _mapped_path(call: Call) -> Results:
    """Runs the fused path under one or more levels of vmap."""
    if not torch._C._are_functorch_transforms_active():
        return _fused_path(call)
    if not vmap.is_mapped(call):
        with vmap.one_level_below():
            return _mapped_path(call)
    return vmap.Mapped.apply(_mapped_path, *call.flat())  # type: ignore[no-any-return,no-untyped-call]


def _reference_path(call: Call) -> Results:
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError(
            "torch.jit.trace would record the loop over ATen operators with a fixed number of "
            f"steps: use a {CLASSES[call.cell]} without lengths= and reset=, which it records for "
            "any length"
        )
    check_reference_arguments(call)
    return reference.run_stack(call)
