"""Wrappers that join separate lists of tensors into the one list that the operators take."""

from namernn_fast import ops, prepared_ops
from namernn_fast.cells import Cell


def described(cell):
    """Returns the arguments `cell` and `program` of an operator. `cell` is a number or a `Cell`."""
    return (cell.number, cell.program) if isinstance(cell, Cell) else (cell, None)


def arguments(
    cell, input, states, weights, sequence_layout, reset, options, trees, reset_to=(), inputs=()
):
    """Returns the arguments of `ops.forward`. `cell` is a number or a `Cell`."""
    tensors, options = ops.Lists(states, reset_to, inputs, weights).joined(options)
    number, program = described(cell)
    return number, input, [*tensors], sequence_layout, reset, options, trees, program


def backward_arguments(
    cell,
    input,
    states,
    weights,
    sequence_layout,
    reset,
    options,
    trees,
    output,
    saved,
    grad_output,
    grad_last_states,
    wanted,
    want_layers,
    reset_to=(),
    inputs=(),
):
    """Returns the arguments of `ops.backward`."""
    rows = sequence_layout, reset, options, trees
    results = output, saved, grad_output, grad_last_states, wanted, want_layers
    shared = arguments(cell, input, states, weights, *rows, reset_to, inputs)
    return *shared[:7], *results, *shared[7:]


def forward(*call, **more):
    """Runs `ops.forward`."""
    return ops.forward(*arguments(*call, **more))


def backward(*call, **more):
    """Runs `ops.backward`."""
    return ops.backward(*backward_arguments(*call, **more))


def prepared_arguments(cell, input, states, prepared, sizes, layout, reset, options, trees):
    """Returns the arguments of `prepared_ops.forward`."""
    tensors, options = ops.Lists(states, (), (), [prepared]).joined(options)
    number, program = described(cell)
    return number, input, [*tensors], sizes, layout, reset, options, trees, program


def forward_prepared(*call):
    """Runs `prepared_ops.forward`."""
    return prepared_ops.forward(*prepared_arguments(*call))
