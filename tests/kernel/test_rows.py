"""Tests lengths, jagged tensors, resets within a sequence, and layers that run concurrently."""

import copy
import re

import numpy as np
import pytest
import torch
from cases import FUSED, LAYERS
from kinds import EVERY, flat, map_states, tensors_in
from layouts import Pieces, check_same
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from namernn_fast import ops, torch_operators
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget

ONE_LAYER = {}
STACK = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(
    params=["rnn", "rnn-reference"]
    + [f"{cell}{path}" for cell in LAYERS[1:] for path in ("", "-torch", "-reference")]
)
def cell(request, monkeypatch):
    """Makes layers use the kernel, torch's operator or ATen operators; returns the cell to test."""
    cell, *path = request.param.split("-")
    if path:
        monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    elif not availability.HAS_EXTENSION:
        pytest.skip("the C++ extension was not built")
    if path == ["reference"]:
        monkeypatch.setattr(torch_operators, "why_not", lambda *arguments: "a test")
    return cell


def layer_and_input(cell, options, seq_len, batch, dtype=torch.float64):
    module = FUSED[cell](3, 20, dtype=dtype, **options)
    states = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(seq_len, batch, 3, dtype=dtype, requires_grad=True)
    hx = EVERY[cell].states(torch.randn, states, batch, 20, dtype=dtype, requires_grad=True)
    return module, x, hx


def of_sequences(states, which):
    """Returns the states of the sequences with the given indices."""
    return map_states(states, lambda state: state[:, which])


def gradients(module, results, inputs):
    """Returns gradients of a random weighted sum of the results. All dtypes use equal weights."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator).to(r.dtype)).sum() for r in results)
    return torch.autograd.grad(loss, [*inputs, *module.parameters()], retain_graph=True)


@pytest.mark.parametrize("options", [ONE_LAYER, STACK])
def test_a_sequence_of_length_zero_returns_its_initial_state(cell, options):
    module, x, hx = layer_and_input(cell, options, 5, 4)
    output, *last = flat(module(x, hx, lengths=[3, 0, 5, 0]))
    initial = tensors_in(hx)
    for final, start in zip(last, initial, strict=True):
        assert torch.equal(final[:, [1, 3]], start[:, [1, 3]])
    assert not output[:, [1, 3]].any()
    assert not output[3:, 0].any()
    grads = gradients(module, (output, *last), (x, *initial))
    assert not grads[0][:, [1, 3]].any()
    assert not grads[0][3:, 0].any()
    # Empty sequences do not change the results of the other sequences.
    kept = flat(module(x[:, [0, 2]], of_sequences(hx, [0, 2]), lengths=[3, 5]))
    torch.testing.assert_close([state[:, [0, 2]] for state in (output, *last)], list(kept))
    loss = sum(state[:, [1, 3]].sum() for state in last)
    for grad_hx in torch.autograd.grad(loss, initial):
        assert torch.equal(grad_hx[:, [1, 3]], torch.ones_like(grad_hx[:, [1, 3]]))
        assert not grad_hx[:, [0, 2]].any()
    # All sequences may be empty, even without an initial state.
    output, *last = flat(module(x, lengths=torch.zeros(4, dtype=torch.int32)))
    assert not output.any()
    assert not any(state.any() for state in last)
    output.sum().backward()
    assert not module.weight_ih_l0.grad.any()


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_may_be_a_list_tuple_array_or_tensor(cell, batch_first):
    module, x, hx = layer_and_input(cell, {**STACK, "batch_first": batch_first}, 6, 3)
    x = (x.transpose(0, 1) if batch_first else x).contiguous()
    lengths = [2, 6, 4]
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    output, h_n = module(packed, hx)
    output, _ = pad_packed_sequence(output, batch_first=batch_first)
    forms = [lengths, tuple(lengths)]
    forms += [
        torch.tensor(lengths, dtype=dtype)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
    ]
    forms += [np.array(lengths), np.array(lengths, np.uint8)]
    forms.append(torch.tensor([9, 2, 9, 6, 9, 4])[1::2])
    for form in forms:
        got = module(x, hx, lengths=form)
        torch.testing.assert_close(got, (output, h_n))
    single = x[:1] if batch_first else x[:, :1]
    single = single.squeeze(0 if batch_first else 1)
    unbatched = module(single, of_sequences(hx, 0), lengths=torch.tensor([2]))
    torch.testing.assert_close(unbatched[1], of_sequences(h_n, 0))


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_unbatched_input_accepts_a_reset_mask_without_a_batch_dimension(cell, batch_first):
    """With a mask (seq_len,), a kernel's results are bit-identical to a batch with one sequence."""
    module, x, hx = layer_and_input(cell, {**STACK, "batch_first": batch_first}, 6, 1)
    reset = torch.tensor([False, True, False, False, True, False])
    batch_dim = 0 if batch_first else 1
    x = x.transpose(0, 1) if batch_first else x
    output, *last = flat(module(x, hx, reset=reset.unsqueeze(batch_dim)))
    alone = flat(module(x.squeeze(batch_dim), of_sequences(hx, 0), reset=reset))
    wanted = (output.squeeze(batch_dim), *(state[:, 0] for state in last))
    for pair in zip(alone, wanted, strict=True):
        check_same(*pair)


@pytest.mark.covering(2)
@pytest.mark.parametrize("options", [ONE_LAYER, STACK, {"bias": False}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("often", [0.05, 0.6])
@pytest.mark.parametrize("restarts", [False, True])
def test_resets_match_a_separate_call_per_segment(cell, options, layout, often, restarts, threads):
    """A reset restarts a sequence from zeros or, with `restarts`, from the states in reset_to."""
    threads(2)
    if EVERY[cell].has_nonlinearity and not options.get("bias", True):
        options = {**options, "nonlinearity": "relu"}
    module, x, hx = layer_and_input(cell, options, 12, 7)
    lengths = [12, 3, 12, 7, 1, 12, 9] if layout != "dense" else [12] * 7
    reset = torch.rand(12, 7) < often
    reset[4, 2] = reset[0, 0] = True
    more = {"reset": reset}
    if restarts and not module.bidirectional:
        size = 12, module.num_layers, 7, 20
        states = EVERY[cell].states(torch.randn, *size, dtype=x.dtype, requires_grad=True)
        more["reset_to"] = states
    if layout == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, last = module(packed, hx, **more)
        output, _ = pad_packed_sequence(output)
    else:
        given = {"lengths": lengths} if layout == "lengths" else {}
        output, last = module(x, hx, **more, **given)
    initial, after = tensors_in(hx), tensors_in(more.get("reset_to"))
    pieces = Pieces(lengths, reset, len(initial[0]), 1 + module.bidirectional)
    wanted, wanted_last = pieces.run(module, x, initial, after)
    got, wanted = [output, *tensors_in(last)], [wanted, *wanted_last]
    torch.testing.assert_close(got, wanted)
    leaves = (x, *initial, *after)
    torch.testing.assert_close(*(gradients(module, results, leaves) for results in (got, wanted)))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seq_len", [10, 1000])
@pytest.mark.parametrize("cell", LAYERS)
def test_values_before_a_reset_do_not_affect_later_steps(cell, dtype, seq_len, threads):
    """Even NaN before a reset is discarded, whether or not it is in the same time block."""
    threads(2)
    module, x, hx = layer_and_input(cell, STACK, seq_len, 64, dtype)
    reset = torch.zeros(seq_len, 64, dtype=torch.bool)
    reset[seq_len // 2] = True
    poisoned = torch.full_like(x[: seq_len // 2], torch.nan)
    backwards = (torch.arange(4) % 2 == 1)[:, None, None]
    output, _ = module(torch.cat([poisoned, x[seq_len // 2 :]]), hx, reset=reset)
    initial = map_states(hx, lambda state: torch.where(backwards, state, 0.0))
    wanted, _ = module(x[seq_len // 2 :], initial)
    assert torch.equal(output[seq_len // 2 :], wanted)
    everywhere, _ = module(x, reset=torch.ones_like(reset))
    assert torch.equal(everywhere, module(x.flatten(0, 1)[None])[0].view_as(everywhere))


def test_a_jagged_input_returns_a_jagged_output(cell):
    module, _, hx = layer_and_input(cell, STACK, 1, 4)
    lengths = [4, 0, 7, 1]
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]
    input = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    output, last = module(input, hx)
    assert output.layout == torch.jagged
    assert torch.equal(output.offsets(), input.offsets())
    results = [pad_sequence(output.unbind()), *tensors_in(last)]
    wanted = [*flat(module(pad_sequence(sequences), hx, lengths=lengths))]
    torch.testing.assert_close(results, wanted)
    states = tensors_in(hx)
    torch.testing.assert_close(
        gradients(module, results, states), gradients(module, wanted, states)
    )


def test_invalid_lengths_resets_and_layouts_are_rejected(cell):
    module, x, _ = layer_and_input(cell, {}, 5, 2)
    x, modules = x.detach(), [module, module.prepare()]
    jagged = torch.nested.nested_tensor([x[:2, 0], x[:3, 0]], layout=torch.jagged)
    packed = pack_padded_sequence(x, [5, 2])
    wide = torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged)
    strided = torch.nested.nested_tensor([x[:2, 0], x[:3, 0]])
    reset = torch.zeros(5, 2, dtype=torch.bool)
    after = EVERY[cell].states(torch.randn, 5, 1, 2, 20, dtype=x.dtype)
    size = re.escape(str(tuple(tensors_in(after)[0].shape)))
    wrong, meta, whole = (
        map_states(after, change)
        for change in (lambda s: s[:4], lambda s: s.to("meta"), lambda s: s.long())
    )
    no_integers, no_bools = "lengths must be integers, got torch.fl", "reset must be a bool tensor"
    for input, more, error, text in (
        (x, {"lengths": [5, 6]}, RuntimeError, "lengths must be between 0 and 5.* got 6 for"),
        (x, {"lengths": [-1, 5]}, RuntimeError, "lengths must be between 0 and 5.*, got -1"),
        (x, {"lengths": [5]}, RuntimeError, "one length for each of the 2 sequences"),
        (x, {"lengths": [5.0, 2.0]}, TypeError, no_integers),
        (x, {"lengths": [float("nan"), 2]}, TypeError, no_integers),
        (x, {"lengths": [None, 2]}, TypeError, r"lengths must be integers, got \[None, 2\]"),
        (x, {"lengths": np.array([5.0, 2.0])}, TypeError, no_integers),
        (x, {"lengths": torch.tensor([])}, TypeError, no_integers),
        (packed, {"lengths": [5, 2]}, ValueError, "lengths need a padded input: a"),
        (jagged, {"lengths": [5, 2]}, ValueError, "lengths need a padded input: a"),
        (x, {"reset": reset.int()}, TypeError, f"{no_bools}, got torch."),
        (x, {"reset": [True]}, TypeError, f"{no_bools}, got list"),
        (x, {"reset": reset.T}, RuntimeError, r"must have shape \(5, 2\), got \(2, 5\)"),
        (packed, {"reset": reset[:4]}, RuntimeError, r"shape \(5, 2\), got \(4, 2\)"),
        (packed, {"reset": reset[0]}, RuntimeError, r"padded to 2 dimensions.* got shape \(2,\)"),
        (x, {"reset": reset[:, 0]}, RuntimeError, r"must have shape \(5, 2\), got \(5,\)"),
        (jagged, {"reset": reset}, ValueError, "reset does not support a jagged input"),
        (x, {"reset_to": after}, ValueError, "reset_to needs reset, which marks where"),
        (x, {"reset": reset, "reset_to": 1}, TypeError, "reset_to must be a .*, got int"),
        (x, {"reset": reset, "reset_to": wrong}, RuntimeError, f"reset_to must have shape {size},"),
        (packed, {"reset": reset, "reset_to": wrong}, RuntimeError, f"have shape {size}, got"),
        (x, {"reset": reset, "reset_to": meta}, RuntimeError, "reset_to must be at cpu, .* meta"),
        (x, {"reset": reset.T, "reset_to": after}, RuntimeError, r"reset must have shape \(5, 2\)"),
        (packed, {"reset": reset.T, "reset_to": after}, RuntimeError, "reset must have shape"),
        (x, {"reset": reset, "reset_to": (x, None, x)}, TypeError, "got (tuple|Tensor, NoneType)"),
        (x, {"reset": reset, "reset_to": whole}, RuntimeError, "reset_to must have the dtype of"),
        (strided, {}, ValueError, "a nested input must have layout=torch.jagged"),
        (wide, {}, ValueError, "must be .batch, jagged steps, features., got 4 dimensions"),
    ):
        for each in modules:
            with pytest.raises(error, match=text):
                each(input, **more)
    both, *_ = layer_and_input(cell, {"bidirectional": True}, 5, 2)
    with pytest.raises(ValueError, match="reset_to takes one direction: the second"):
        both(x, reset=reset, reset_to=after)


@pytest.mark.parametrize("layout", ["dense", "lengths", "packed", "jagged"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cell", LAYERS)
def test_layers_that_run_concurrently_compute_the_same_results(cell, layout, batch, threads):
    """On two threads, the three layers form a wave: layer 1 starts before layer 0 has finished."""
    seq_len, lists = 600, EVERY[cell].cell
    assert ops.cpu_plan([batch] * seq_len, 20, 20, 2, num_layers=3, cell=lists).layers == 2
    module, x, hx = layer_and_input(cell, {"num_layers": 3}, seq_len, batch, torch.float32)
    lengths = {
        "dense": [seq_len] * batch,
        "lengths": [0, seq_len, 250][-batch:],
        "packed": [seq_len, 590, 7][:batch],
        "jagged": [7, seq_len, 590][-batch:],
    }[layout]
    reset = torch.rand(seq_len, batch) < 0.02
    precise = copy.deepcopy(module).double()

    def run(module, x, hx, more):
        """Returns all tensors that belong to sequences, and the gradients of the weights."""
        if layout == "packed":
            output, last = module(pack_padded_sequence(x, lengths), hx, **more)
            output = output.data
        elif layout == "jagged":
            rows = [x[:length, b] for b, length in enumerate(lengths)]
            output, last = module(torch.nested.as_nested_tensor(rows, layout=torch.jagged), hx)
            output = output.values()
        else:
            lengths_given = {"lengths": lengths} if layout == "lengths" else {}
            output, last = module(x, hx, **more, **lengths_given)
        initial = tensors_in(hx)
        given = tensors_in(more.get("reset_to"))
        grads = gradients(module, flat((output, last)), (x, *initial, *given))
        with torch.no_grad():  # inference keeps nothing for a backward pass
            states = tensors_in(module(x, hx, **more)[1])
        per_sequence = 1 + len(initial) + len(given)
        return (output, *tensors_in(last), *states, *grads[:per_sequence]), grads[per_sequence:]

    after = EVERY[cell].states(torch.randn, seq_len, 3, batch, 20, requires_grad=True)
    calls = {}, {"reset": reset}, {"reset": reset, "reset_to": after}
    for more in calls[:1] if layout == "jagged" else calls:
        threads(1)
        results, weights = run(module, x, hx, more)
        exact_more = more
        if "reset_to" in more:
            exact_more = {**more, "reset_to": map_states(after, torch.Tensor.double)}
        _, exact = run(precise, x.double(), map_states(hx, torch.Tensor.double), exact_more)
        threads(2)
        results_wave, weights_wave = run(module, x, hx, more)
        torch.testing.assert_close(results_wave, results, rtol=0, atol=0)
        within_budget(weights_wave, weights, exact)


def within_budget(ours, theirs, exact):
    budget = ErrorBudget(torch.float32)
    for name, tensors in enumerate(zip(ours, theirs, exact, strict=True)):
        budget.add(name, *tensors[:2], tensors[2].numpy())
    budget.check()


@pytest.mark.parametrize("cell", LAYERS)
def test_layers_that_run_concurrently_compute_requested_gradients(cell, threads):
    module, x, _ = layer_and_input(cell, {"num_layers": 3}, 600, 2, torch.float32)
    module.requires_grad_(False)
    for weight in (module.weight_hh_l1, module.bias_ih_l2):
        weight.requires_grad_()

    def run(module, x):
        loss = module(x.detach())[0].square().sum()
        return torch.autograd.grad(loss, [module.weight_hh_l1, module.bias_ih_l2])

    threads(1)
    one_by_one = run(module, x)
    exact = run(copy.deepcopy(module).double(), x.double())
    threads(2)
    within_budget(run(module, x), one_by_one, exact)
