"""Chooses the path of a call and runs it: a fused kernel, ATen operators, vmap, or ONNX."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import availability, native, ops, reference
from .autograd import FusedStack, apply_untransformed
from .call import Call, Path, Results
from .cells import Cell
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
    data = call.data
    checked = (
        path is not _fused_path
        or call.dropout  # the operator sees one layer at a time
        or not (data.is_cpu and like.is_cpu)  # a GPU, or different devices
    )
    for state in call.states:
        checked = checked or not state.is_cpu
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
    if tracing:
        return _compiled_path
    return _mapped_path if torch._C._are_functorch_transforms_active() else _fused_path


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
    last_states = []
    for k, states in enumerate(ops.states_of_layers(call.states, weights, options)):
        if k:
            data = torch.nn.functional.dropout(data, call.dropout, training=True)
        layer = replace(
            call,
            data=data,
            states=states,
            weights=weights[k * per_layer : (k + 1) * per_layer],
            reset=reset,
            options=options,
            dropout=0.0,
        )
        data, *last = path(layer)
        last_states.append(last)
    if batch_first:
        data = reference.with_batch_first(data)
    return data, *map(torch.cat, zip(*last_states, strict=True))


def _run_fused(call: Call, apply: Callable[..., Results], forward: Callable[..., Any]) -> Results:
    if torch.is_grad_enabled() and call.requires_grad():
        return apply(*call.flat())
    data, states, weights = call.data, call.states or None, call.weights
    number, layout, reset = call.cell.number, call.sequence_layout, call.reset
    output, last, _ = forward(
        number, data, states, weights, layout, reset, call.options, call.trees
    )
    return output, *last


def _fused_path(call: Call) -> Results:
    return _run_fused(call, apply_untransformed, ops.forward_untraced)


def _compiled_path(call: Call) -> Results:
    """The fused path in a graph that a compiler traces."""
    return _run_fused(call, FusedStack.apply, ops.forward)


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
            f"steps: use a {call.cell.layer} without lengths= and reset=, which it records for "
            "any length"
        )
    check_reference_arguments(call)
    return reference.run_stack(call)
