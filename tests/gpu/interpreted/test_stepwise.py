"""Tests stepwise layers, which compute each step with torch operators instead of a kernel.

Also tests when the package runs layers stepwise. A float64 oracle computes the expected results.
"""

from dataclasses import replace

import hypothesis
import pytest
import torch
from drawn import LUCKY, check_results, drawn_cases
from hypothesis import example, given, settings
from plans import resident, streamed

from namernn_fast import FusedRNN, last_state, ops
from namernn_fast.gpu import layer, plan, stepwise, tuning
from namernn_fast.gpu.problem import SequenceLayout, Stack
from namernn_fast.machine import transfers

pytestmark = pytest.mark.covering(1)
TORCH = streamed(17)._replace(stepwise=True)


def let_torch_multiply(patch):
    """Makes layers of any size run stepwise. If a kernel is launched, the test fails."""
    patch.setattr(stepwise, "FEWEST_UNITS_OF_STEPS", 1)
    patch.setattr(stepwise, "plan_of", lambda *_: TORCH)
    patch.setattr(layer, "plan_of", lambda *_: pytest.fail("a kernel was launched"))


@pytest.fixture
def stepwise_alone(monkeypatch):
    let_torch_multiply(monkeypatch)


@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu", "batch_first": True}], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("wanted", [("input", "hx", "weights"), ("weights",), ("hx",)], ids=str)
@pytest.mark.usefixtures("stepwise_alone")
def test_stepwise_layers_meet_the_error_budget(options, directions, wanted):
    for T, num_layers in ((1, 1), (4, 2)):
        case = replace(
            LUCKY,
            **{"D": 3, "H": 17, "T": T, "B": 3, "dtype": torch.float32, "values": "ordinary"},
            options=LUCKY.options
            | {"num_layers": num_layers, "bidirectional": directions == 2}
            | options,
            layout="dense",
            with_hx="hx" in wanted,
            wanted=frozenset(wanted),
        )
        check_results(case)


@pytest.mark.usefixtures("stepwise_alone")
def test_a_nan_weight_makes_the_first_step_nan_without_hx():
    theirs, ours = torch.nn.RNN(2, 3), FusedRNN(2, 3)
    theirs.weight_hh_l0.data[0, 0] = torch.nan
    ours.load_state_dict(theirs.state_dict())
    x = torch.ones(1, 1, 2)
    expected = theirs(x)[0].isnan()
    assert expected.sum() == 1
    assert torch.equal(ours(x)[0].isnan(), expected)


# For one step without hx, the gradient of weight_hh is NaN * 0, which must be NaN.
NAN_AT_ONCE = replace(
    LUCKY,
    **{"D": 3, "H": 17, "T": 1, "B": 3, "values": "NaN", "layout": "dense", "with_hx": False},
)


@pytest.mark.slow
@hypothesis.seed(0)  # without a seed, examples change with every edit of this function
@given(drawn_cases())
@example(NAN_AT_ONCE)
@settings(deadline=None, max_examples=40)
def test_random_stepwise_calls_meet_the_error_budget(case):
    """Calls include empty batches, saturated values, infinity, NaN and omitted arguments."""
    case.dtype, case.layout, case.resets, case.vocabulary = torch.float32, "dense", 0.0, 0
    case.__post_init__()
    with pytest.MonkeyPatch.context() as patch:
        let_torch_multiply(patch)
        check_results(case)


@pytest.mark.usefixtures("stepwise_alone")
def test_stepwise_last_state_matches_torch():
    rnn = torch.nn.RNN(5, 17, bidirectional=True)
    x, hx = torch.randn(6, 3, 5), torch.randn(2, 3, 17)
    weights = [p.detach() for p in rnn.parameters()]
    found = last_state(x, hx, weights, bidirectional=True)
    torch.testing.assert_close(found, rnn(x, hx)[1].detach())


def stack_of(hidden_size, batch, **layout):
    rows = SequenceLayout(T=2, B=batch, N=2 * batch, time_stride=batch, batch_stride=1)
    return Stack(rows._replace(**layout), None, [], ops.BIAS, 1, hidden_size)


def suits(hidden_size, batch, dtype=torch.float32, **layout):
    return stepwise.suits(stack_of(hidden_size, batch, **layout), torch.empty(0, dtype=dtype))


@pytest.fixture(params=[False, True], ids=["eager", "captured"])
def is_captured(request, monkeypatch):
    monkeypatch.setattr(transfers, "is_capturing", lambda device: request.param)
    return request.param


def test_only_layers_with_large_steps_run_stepwise(is_captured, fp32_precision):
    """Except in captured graphs, each step must take longer than its launches."""
    assert suits(1024, 1024)
    assert suits(512, 1024)
    assert suits(512, 256) == is_captured
    assert not suits(512, 1)  # cooperative
    assert not suits(256, 4096)
    fp32_precision("tf32", "tf32")
    assert suits(1024, 1024)
    assert suits(1024, 64) == is_captured
    assert not suits(512, 1024)


def test_other_calls_do_not_run_stepwise(is_captured, fp32_precision):
    tensor = torch.empty(0)
    assert not suits(1024, 1024, torch.bfloat16)
    assert not suits(1024, 0)
    for name in ("lengths", "offsets", "starts", "reset"):
        assert not suits(1024, 1024, **{name: tensor})
    for flags in (("tf32", "ieee"), ("ieee", "tf32")):
        fp32_precision(*flags)
        assert not suits(1024, 1024)


def test_a_tuned_plan_decides_whether_a_layer_runs_stepwise(is_captured, monkeypatch):
    size = plan.size_of(1024, 1024, torch.empty(0), 1)
    for stepwise_or_not in (False, True):
        chosen = plan.choose(size)._replace(stepwise=stepwise_or_not)
        monkeypatch.setitem(plan.tuned, size, chosen)
        assert suits(1024, 1024) == stepwise_or_not
    monkeypatch.setitem(plan.tuned, size, resident(1024))
    assert not suits(1024, 1024)


def test_autotune_times_kernels_and_stepwise_layers():
    size = plan.size_of(1024, 1024, torch.empty(0), 1)
    tried = {found.stepwise for found in tuning._candidates(size) if found.kind == "streamed"}
    assert tried == {False, True}
    small = size._replace(hidden_size=256, batch=4096)
    assert not any(found.stepwise for found in tuning._candidates(small))
