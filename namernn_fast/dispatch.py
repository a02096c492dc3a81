"""Chooses the path of each call, and runs the call on that path.

The paths are the fused kernels, torch's own operators, ATen operators, and ONNX nodes.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import ops, prepared_ops, reference, torch_operators
from .autograd import FusedStack, apply_untransformed
from .call import Call, Choice, Path, Results, tokens
from .call.checks import check_ids, check_like_nn_rnn, check_reference_arguments
from .call.options import PRECISION_BITS, precision_bits
from .call.prepared_weights import NO_GRADIENTS, PreparedWeights
from .call.time_major import with_batch_first
from .integrations import onnx, vmap
from .machine import availability, fp32_precision
from .machine.context import (
    functorch_is_active,
    is_compiling,
    is_jit_tracing,
    is_transformed,
    only_vmap_is_active,
)
from .recompute import run_in_pieces


def run(call: Call) -> Results:
    """Chooses one path for a whole stack of layers, and runs the stack on that path.

    Raises:
        RuntimeError, ValueError: shapes, dtypes or devices do not match; or batch_invariant is
            set, but the path does not support it.
        IndexError: a token id is out of range.
    """
    tracing = is_compiling()
    choice = choose(call, tracing)
    path, why_not_kernel, _, _ = choice
    if why_not_kernel is not None:
        if call.prepared is not None:
            reason = f"{why_not_kernel}: call the layer itself"
            raise RuntimeError(f"a prepared module cannot run: {reason}")
        if call.options & ops.BATCH_INVARIANT:
            raise RuntimeError(f"batch_invariant needs the fused kernel: {why_not_kernel}")
    if call.lookup is not None:
        tokens.look_up(call, choice)
    like = call.weights[0]  # data may be integer token ids
    by_layers = call.recompute is not None or (
        call.dropout and not (path is torch_operators.run_stack and torch_operators.is_whole(call))
    )
    if tracing:
        # Check while tracing, because the operators' fake kernels check nothing.
        check_like_nn_rnn(call)
        fp32_precision.guard_on_cpu(call.cell.fp32_precision)
        call.options |= precision_bits(call.cell)
        return _run_layers(path, call) if by_layers else path(call)
    precision = fp32_precision.get("mkldnn", call.cell.fp32_precision)
    if precision in PRECISION_BITS:  # inlined, because precision_bits() is slower
        call.options |= PRECISION_BITS[precision]
    data = call.data
    checked = (
        path is not _fused_path
        or call.dropout  # each operator call sees only one layer
        or not (data.is_cpu and like.is_cpu)  # GPU, or mixed devices
    )
    for beside in (*call.states, *call.restart_states, *call.beside):
        checked = checked or not beside.is_cpu
    if checked:
        check_like_nn_rnn(call)
    try:
        return _run_layers(path, call) if by_layers else path(call)
    except (IndexError, RuntimeError):
        # The operator rejected an argument. Re-check to raise nn.RNN's own error or, for a token id
        # out of range, the error that all paths share.
        if not checked:
            check_like_nn_rnn(call)
        if ops.has_ids(data):
            check_ids(data, like.shape[0], call.sequence_layout, call.options)
        raise


def choose(call: Call, tracing: bool) -> Choice:
    """Chooses the path of a call from its device, its dtype and the active transforms.

    The choice is the same before and after `tokens.look_up`.

    Args:
        call: the call.
        tracing: whether a compiler is tracing the call.
    """
    if tracing and onnx.exporting():
        node = f"the {call.cell.name.upper()} node of ONNX"
        return Choice(onnx.rnn_stack, why_not_ids=f"{node} takes rows of features")
    transformed = not tracing and is_transformed()
    why_not_kernel: str | None
    if transformed and not only_vmap_is_active():
        why_not_kernel = "a torch.func transform other than vmap, or forward-mode AD, is active"
    else:
        weight = call.weights[0]
        why_not_kernel = availability.why_not_kernel(weight, call.cell, call)
        if why_not_kernel is None:
            return _COMPILED if tracing else _MAPPED if transformed else _FUSED
    why_not_torch = torch_operators.why_not(call, tracing)
    path = torch_operators.run_stack if why_not_torch is None else _reference_path
    has_torch_operator = torch_operators.has_operator(call.cell)
    why_not_ids = "torch's own operator takes rows of features" if has_torch_operator else None
    return Choice(path, why_not_kernel, why_not_torch, why_not_ids)


def _run_layers(path: Path, call: Call) -> Results:
    """Runs each layer of a stack in a separate call, with dropout between layers or in pieces.

    The layers run time-major so that dropout draws the same masks as `nn.RNN`. Clears LAST_STATE,
    because dropout needs the output of every layer.
    """
    data, weights, reset = call.data, call.weights, call.reset
    beside, size = [*zip(call.cell.inputs, call.beside, strict=False)], call.hidden_size()
    options = call.options & ~ops.LAST_STATE
    batch_first = options & ops.BATCH_FIRST and not options & (ops.PACKED | ops.JAGGED)
    if batch_first:
        data, options = data.transpose(0, 1), options & ~ops.BATCH_FIRST
        reset = None if reset is None else reset.transpose(0, 1)
        beside = [(described, rows.transpose(0, 1)) for described, rows in beside]
    per_layer = ops.weights_per_layer(call.cell, options)
    number = len(weights) // per_layer
    last_states = []
    for k, states in enumerate(call.states_of_layers(number)):
        if k and call.dropout:
            data = torch.nn.functional.dropout(data, call.dropout, training=True)
        layer = replace(
            call,
            data=data,
            states=states,
            weights=weights[k * per_layer : (k + 1) * per_layer],
            reset=reset,
            restart_states=[restart[:, k : k + 1] for restart in call.restart_states],
            options=options,
            dropout=0.0,
            recompute=None,
            beside=[i.part_of(rows, size, k, number) for i, rows in beside],
        )
        if call.recompute is None:
            data, *last = path(layer)
        else:
            data, *last = run_in_pieces(path, layer, call.recompute)
        last_states.append(last)
    if batch_first:
        data = with_batch_first(data)
    return data, *map(torch.cat, zip(*last_states, strict=True))


def _run_fused(call: Call, apply: Callable[..., Results], forward: Callable[..., Any]) -> Results:
    if torch.is_grad_enabled() and call.requires_grad():
        return apply(*call.flat())
    tensors, options = call.joined(call.weights)
    output, last, _ = forward(
        call.cell.number,
        call.data,
        tensors,
        call.sequence_layout,
        call.reset,
        options,
        call.trees,
        call.cell.program,
    )
    return output, *last


def _run_prepared(call: Call, prepared: PreparedWeights, forward: Callable[..., Any]) -> Results:
    if torch.is_grad_enabled() and call.requires_grad():
        raise RuntimeError(NO_GRADIENTS)
    tensors, options = call.joined([prepared.tensor])
    output, last = forward(
        call.cell.number,
        call.data,
        tensors,
        prepared.sizes,
        call.sequence_layout,
        call.reset,
        options,
        call.trees,
        call.cell.program,
    )
    return output, *last


def _fused_path(call: Call) -> Results:
    if call.prepared is not None:
        return _run_prepared(call, call.prepared, prepared_ops.forward_untraced)
    return _run_fused(call, apply_untransformed, ops.forward_untraced)


def _compiled_path(call: Call) -> Results:
    """Runs the fused path in a graph that a compiler is tracing."""
    if call.prepared is not None:
        return _run_prepared(call, call.prepared, prepared_ops.forward)
    return _run_fused(call, FusedStack.apply, ops.forward)


def _mapped_path(call: Call, prepared: PreparedWeights | None = None) -> Results:
    """Runs the fused path under one or more levels of vmap.

    `prepared` replaces `call.prepared`, which `Call.flat` drops.
    """
    if prepared is not None:
        call.prepared = prepared
    if not functorch_is_active():
        return _fused_path(call)
    if not vmap.is_mapped(call):
        with vmap.one_level_below():
            return _mapped_path(call)
    path = functools.partial(_mapped_path, prepared=call.prepared)
    return vmap.Mapped.apply(path, *call.flat())  # type: ignore[no-any-return,no-untyped-call,unused-ignore]


def _reference_path(call: Call) -> Results:
    if is_jit_tracing():
        raise RuntimeError(
            "torch.jit.trace would record the loop over ATen operators with a fixed number of "
            f"steps: use a {call.cell.layer} without lengths= and reset=, whose trace works for "
            "any length"
        )
    check_reference_arguments(call)
    return reference.run_stack(call)


_FUSED, _MAPPED, _COMPILED = map(Choice, (_fused_path, _mapped_path, _compiled_path))
