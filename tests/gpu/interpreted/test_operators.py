"""Tests `opcheck`, graph capture and rejected launches of GPU operators in Triton's interpreter."""

import operators
import pytest
import torch
from cases import Case

from namernn_fast import ops
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import device, launching
from namernn_fast.machine import transfers
from namernn_fast.testing import ErrorBudget

pytestmark = pytest.mark.covering(1)
D, H, T, B, VOCABULARY = 4, 20, 3, 2, 7
LENGTHS = torch.tensor([T, 2])


def rows_of(options, with_lengths):
    """Returns the input's shape without the feature dimension, and the sequence_layout."""
    if options & ops.PACKED:
        return (5,), torch.tensor([2, 2, 1])
    if options & ops.JAGGED:
        return (5,), torch.tensor([0, T, 5])
    shape = (B, T) if options & ops.BATCH_FIRST else (T, B)
    return shape, LENGTHS if with_lengths else None


CALLS = {
    "dense": {},
    "dense with ids": {"with_ids": True},
    "two layers": {"num_layers": 2, "options": ops.BIAS | ops.BIDIRECTIONAL},
    "lengths": {"with_lengths": True, "options": ops.BIAS | ops.BATCH_FIRST},
    "packed": {"options": ops.PACKED | ops.BIAS},
    "packed ids": {"options": ops.PACKED, "with_ids": True},
    "jagged": {"options": ops.JAGGED | ops.RELU | ops.BIAS},
    "reset": {"with_reset": True, "options": ops.BIAS | ops.BIDIRECTIONAL},
}


def call_of(options=ops.BIAS, num_layers=1, with_ids=False, with_lengths=False, with_reset=False):
    """Returns the arguments of `forward`, up to and including `options`."""
    shape, layout = rows_of(options, with_lengths)
    input = torch.randint(VOCABULARY, shape) if with_ids else torch.randn(*shape, D)
    directions = ops.directions_of(options)
    reset = torch.rand(T, B) < 0.4 if with_reset else None
    rnn = torch.nn.RNN(
        *(D, H, num_layers), bias=bool(options & ops.BIAS), bidirectional=directions == 2
    )
    weights = [p.detach() for p in rnn.parameters()]
    if with_ids:
        weights[0] = torch.randn(VOCABULARY, H)
    hx = torch.randn(num_layers * directions, B, H)
    return VANILLA.number, input, [hx], weights, layout, reset, options


def opcheck(operator, arguments):
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("more", [ops.WANT_SAVED, ops.LAST_STATE], ids=["output", "last state"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_forward_operator_passes_opcheck(call, more):
    *arguments, options = call_of(**call)
    opcheck(ops.forward, operators.arguments(*arguments, options | more, 0))


@pytest.mark.parametrize("wanted", ["everything", "weights", "hx"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_backward_operator_passes_opcheck(call, wanted):
    """The case `weights` is typical of training: only the weights need gradients."""
    cell, input, states, weights, *rows, options = call_of(**call)
    forward = (cell, input, states, weights, *rows, options | ops.WANT_SAVED, 0)
    output, (h_n,), saved = operators.forward(*forward)
    num_layers = ops.layer_count(VANILLA, weights, options)
    want_input = wanted == "everything" and not ops.has_ids(input)
    want_layers = [] if wanted == "hx" else list(range(num_layers))
    grads = (torch.randn_like(output), [torch.randn_like(h_n)])
    want = ([want_input, wanted != "weights"], want_layers)
    opcheck(ops.backward, operators.backward_arguments(*forward, output, saved, *grads, *want))


@pytest.mark.parametrize("count", [1, 3, 64, 130])
def test_upload_copies_numbers_to_the_gpu_unchanged(count):
    numbers = torch.randint(2**30 - 1, (count,)).tolist()
    numbers[0] = 2**30 - 2
    assert launching.upload(numbers, torch.device("cpu")).tolist() == numbers


@pytest.mark.parametrize("with_ids", [False, True])
def test_packed_calls_are_bit_identical_during_graph_capture(with_ids, monkeypatch):
    """During capture, batch_sizes reach the GPU as kernel arguments, not as a copied tensor."""
    call = (*call_of(ops.BIAS | ops.PACKED, with_ids=with_ids), 0)
    eager, (eager_h_n,), _ = operators.forward(*call)
    monkeypatch.setattr(transfers, "is_capturing", lambda device: True)
    uploaded, upload = [], launching.upload
    monkeypatch.setattr(
        launching, "upload", lambda *args: uploaded.append(args[0]) or upload(*args)
    )
    captured, (captured_h_n,), _ = operators.forward(*call)
    assert uploaded == [[2, 2, 1]]
    assert torch.equal(captured, eager)
    assert torch.equal(captured_h_n, eager_h_n)


def test_results_are_correct_after_a_rejected_launch(monkeypatch):
    monkeypatch.setattr(device, "_refusing", set())
    run, refused = launching.run, []

    def refuse(kernel, grid, arguments, settings):
        if settings.get("launch_cooperative_grid"):
            refused.append(arguments["FORM"].MEMBERS)
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        run(kernel, grid, arguments, settings)

    monkeypatch.setattr(launching, "run", refuse)
    budget = ErrorBudget(torch.float32)
    with pytest.warns(RuntimeWarning, match="refused a cooperative launch"):
        Case(3, 256, 2, 1).add_to(budget, torch.float32)
    budget.check()
    assert len(refused) == 1
