"""Tests every cell in every layout against the oracle, in Triton's interpreter."""

from dataclasses import replace

import hypothesis
import operators
import pytest
import torch
from cases import CONTIGUOUS
from drawn import Drawn, check_results, drawn_cases
from equation_cells import MORE
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import EVERY, KINDS
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import FusedRNN, ops
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import layers
from namernn_fast.machine import transfers

CELLS = tuple(
    (cell, activation) for cell in (*KINDS, *MORE) for activation in EVERY[cell].cell.nonlinearities
)
RESETS = {"none": {}, "zeros": {"resets": 0.5}, "reset_to": {"resets": 0.5, "with_reset_to": True}}
BLOCKS = {"one block": (24, 64), "odd blocks": (26, 16)}
"""hidden_size and the size of blocks. Fewer than 24 units would need several draws of a case."""


def case_of(cell, activation="tanh", options=None, **changes):
    known = len(EVERY[cell].cell.nonlinearities) > 1
    settings = {"bias": True, "batch_first": False, "bidirectional": False, "num_layers": 1}
    settings |= {"nonlinearity": activation} if known else {}
    case = {"D": 4, "H": 24, "T": 3, "B": 3, "layout": "dense", "seed": 1, "dtype": torch.float32}
    places = {"input_place": CONTIGUOUS, "hx_place": CONTIGUOUS}
    wanted = {"wanted": Drawn.__mro__[1].wanted, "given": Drawn.__mro__[1].given}
    case |= places | wanted | {"cell": cell, "options": settings | (options or {})} | changes
    return Drawn(**case)


@pytest.mark.covering(2)
@pytest.mark.parametrize(("cell", "activation"), CELLS)
@pytest.mark.parametrize("layout", ["dense", "lengths", "packed", "packed unsorted", "jagged"])
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch", [3, 5])
@pytest.mark.parametrize("more", ["bias", "batch_first", "ids", "no hx"])
@pytest.mark.parametrize("blocks", [*BLOCKS])
def test_results_and_gradients_meet_the_error_budget(
    cell, activation, layout, resets, directions, num_layers, batch, more, blocks, monkeypatch
):
    """Three sequences are multiplied without tl.dot, five with it."""
    hidden_size, block = BLOCKS[blocks]
    monkeypatch.setattr(layers, "LARGEST_BLOCK", block)
    options = {"bidirectional": directions == 2, "num_layers": num_layers}
    options |= {"bias": more != "bias", "batch_first": more == "batch_first"}
    case = case_of(
        cell,
        activation,
        options,
        **{"layout": layout, "H": hidden_size, "B": batch, "with_hx": more != "no hx"},
        **({} if layout == "jagged" else RESETS[resets]),
        vocabulary=6 if more == "ids" else 0,
        seed=len(layout) + batch,
    )
    check_results(case)


@pytest.mark.covering(1)
@pytest.mark.parametrize("cell", [*KINDS, *MORE])
@pytest.mark.parametrize("values", ["zeros", "saturating", "subnormal", "NaN", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_special_values_meet_the_error_budget(cell, values, dtype, batch):
    check_results(case_of(cell, values=values, dtype=dtype, B=batch, layout="lengths"))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*KINDS, *MORE])
def test_random_calls_meet_the_error_budget(cell, monkeypatch):
    @hypothesis.seed(0)
    @given(drawn_cases(cell), st.sampled_from([16, 64]))
    @settings(deadline=None, max_examples=8)
    def check(case, block):
        monkeypatch.setattr(layers, "LARGEST_BLOCK", block)
        hypothesis.assume(not case.options.get("proj_size"))
        dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
        T, B, H = min(case.T, 4), min(case.B, 5), 1 + case.H % 36
        layers_of_case = min(case.options["num_layers"], 2)
        wanted = case.wanted or frozenset(["hx"])
        check_results(
            replace(
                case,
                **{"T": T, "B": B, "H": H, "dtype": dtype, "wanted": wanted},
                options=case.options | {"num_layers": layers_of_case},
            )
        )

    check()


@pytest.mark.parametrize("cell", [*KINDS, *MORE])
def test_the_last_state_alone_has_the_bits_of_all_states(cell):
    """Without output, states of two steps share the memory of a ring."""
    layer = EVERY[cell].layer(3, 6, num_layers=2)
    x, lengths = torch.randn(5, 4, 3), torch.tensor([5, 2, 0, 3])
    with torch.no_grad():
        last, alone = layer(x, lengths=lengths)[1], layer.last_state(x, lengths=lengths)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (last, alone)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", [*KINDS, *MORE])
def test_a_batch_may_be_empty(cell):
    layer = EVERY[cell].layer(3, 6)
    x = torch.randn(2, 0, 3, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    assert output.shape == (2, 0, 6)
    assert all(p.grad.eq(0).all() for p in layer.parameters())


def test_recompute_gives_the_same_gradients():
    x, reset = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.3
    layer = EVERY["gru"].layer(4, 6)
    grads = []
    for recompute in (None, 2):
        layer.recompute = recompute
        layer.zero_grad()
        layer(x, reset=reset)[0].square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_input_needs_no_memory_of_the_cpu_in_a_captured_graph(monkeypatch):
    layer, lengths = EVERY["gru"].layer(4, 6), torch.tensor([5, 3, 3, 1])
    x = pack_padded_sequence(torch.randn(5, 4, 4), lengths)
    expected = layer(x)[0].data
    made = []
    monkeypatch.setattr(transfers, "is_capturing", lambda device: made.append(device) or True)
    assert torch.equal(layer(x)[0].data, expected)
    assert made


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_in_one_sequence_does_not_reach_other_sequences(nonlinearity):
    x = torch.randn(3, 5, 4)
    x[0, 1, 2] = torch.nan
    output, _ = FusedRNN(4, 5, nonlinearity=nonlinearity)(x)
    expected = torch.tensor([False, True, False, False, False])[:, None].expand_as(output)
    assert torch.equal(output.isnan(), expected)


@pytest.mark.parametrize("cell", ["rnn", "gru", "leaky", "everything"])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_operators_match_their_schemas_and_fake_kernels(cell, with_lengths):
    described = EVERY[cell].cell
    layer = EVERY[cell].layer(3, 5, num_layers=2)
    weights = [p.detach() for p in layer.parameters()]
    x, lengths = torch.randn(3, 2, 3), torch.tensor([3, 1]) if with_lengths else None
    states = [torch.randn(2, 2, 5) for _ in described.states]
    call = (described, x, states, weights, lengths, None, ops.BIAS | ops.WANT_SAVED, 0)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.forward, operators.arguments(*call), test_utils=checks)
    output, last, saved = operators.forward(*call)
    results = output, saved, torch.randn_like(output), [torch.randn_like(h) for h in last]
    wanted = [True] * (1 + len(states)), [0, 1]
    back = operators.backward_arguments(*call, *results, *wanted)
    torch.library.opcheck(ops.backward, back, test_utils=checks)


@pytest.mark.parametrize("id", [-1, 6])
def test_ids_out_of_range_raise_an_error_unless_they_are_padding(id):
    ids = torch.zeros(3, 2, dtype=torch.int64)
    weights = [torch.zeros(6, 25), torch.zeros(25, 25)]
    call = (VANILLA.number, ids, (), weights, torch.tensor([3, 2]), None, ops.LAST_STATE, 0)
    ids[2, 1] = id  # past the end of its sequence
    operators.forward(*call)
    ids[1, 1] = id
    with pytest.raises((IndexError, RuntimeError)):
        operators.forward(*call)
