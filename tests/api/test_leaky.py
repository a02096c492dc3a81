"""Tests what is special about leaky modules: rates, noise, and nonlinearities beyond tanh and relu.

Tests that are parametrized by cell cover everything else.
"""

import copy
import pickle

import operators
import pytest
import torch
from equation_cells import leaky_equation
from kinds import KINDS, flat
from layouts import check_derivatives
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import namernn_fast
from namernn_fast import (
    FusedGRU,
    FusedLeakyRNN,
    FusedLeakyRNNCell,
    FusedRNN,
    TokenLeakyRNN,
    explain,
    last_state,
    ops,
    prepare_rnn,
    restore_rnn,
)
from namernn_fast.cells import LEAKY
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget

NONLINEARITIES = ("tanh", "relu", "sigmoid", "softplus")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
D, H, T, B = 3, 5, 6, 4


def drawn(*size):
    return torch.randn(*size, dtype=torch.float64)


def twins(**options):
    """Returns a fused layer and its reference in float64, with a different rate for each unit."""
    ours = FusedLeakyRNN(D, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.startswith("rate"):
                parameter.normal_()
    theirs = KINDS["leaky"].nn_layer(D, H, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.covering(0)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_noise_and_rates_get_correct_derivatives(nonlinearity):
    module = FusedLeakyRNN(2, 3, 2, nonlinearity, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    leaves = [drawn(4, 2, 2), drawn(4, 2, 12), *(p.detach().clone() for p in module.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(x, noise, *parameters):
        of_call = dict(zip(names, parameters, strict=True))
        return flat(torch.func.functional_call(module, of_call, (x,), {"noise": noise}))

    check_derivatives(run, leaves)


def test_noise_works_in_step_modules_prepared_layers_and_streams(path):
    """A step module, a prepared layer and a stream match the layer."""
    ours, theirs = twins(num_layers=1)
    x, noise = drawn(T, B, D), drawn(T, B, H)
    wanted = theirs(x, noise=noise)
    step = FusedLeakyRNNCell(D, H, dtype=torch.float64)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
    with torch.no_grad():
        for module in (step, step.prepare()):
            state = None
            for x_t, noise_t in zip(x, noise, strict=True):
                state = module(x_t, state, noise=noise_t)
            torch.testing.assert_close(state, tuple(s[0] for s in wanted[1]), **EXACT)
        prepared = ours.prepare()
        torch.testing.assert_close(prepared(x, noise=noise), wanted, **EXACT)
        torch.testing.assert_close(prepared.last_state(x, noise=noise), wanted[1], **EXACT)
        for stream in (prepared.stream(B), step.prepare().stream(B)):
            rows = [stream(x_t, noise=of_t) for x_t, of_t in zip(x, noise, strict=True)]
            torch.testing.assert_close(torch.stack(rows), wanted[0], **EXACT)
        stream.reset()
        torch.testing.assert_close(stream(x, noise=noise), wanted[0], **EXACT)
        some = stream(x[0, :2], rows=[2, 0], noise=noise[0, :2], out=torch.empty_like(rows[0][:2]))
        assert some.shape == (2, H)
    with pytest.raises(RuntimeError, match=r"noise must have shape \(4, 5\), got \("):
        stream(x[0], noise=noise[0, :, 1:])
    with pytest.raises(ValueError, match="noise needs a leaky layer that reads features"):
        FusedGRU(D, H).prepare().stream(B)(torch.zeros(B, D), noise=torch.zeros(B, H))


def test_noise_works_with_token_ids_and_dropout(path):
    model = TokenLeakyRNN(9, D, H, 2, dtype=torch.float64, dropout=0.5)
    ids, noise = torch.randint(9, (T, B)), drawn(T, B, 2 * H)
    for module in (model.train(), model.eval()):
        torch.manual_seed(3)
        wanted = module.rnn(module.embedding(ids), noise=noise)
        torch.manual_seed(3)
        torch.testing.assert_close(module(ids, noise=noise), wanted, **EXACT)
    assert torch.equal(model.last_state(ids, noise=noise)[0], wanted[1][0])
    if model.prepare()._panels is not None:
        with pytest.raises(RuntimeError, match="multiplied by its embedding takes no noise"):
            model.prepare()(ids, noise=noise)


def test_noise_works_with_vmap_compile_and_export():
    ours, theirs = twins()
    xs, noises = drawn(2, T, B, D), drawn(2, T, B, H)
    mapped = torch.vmap(lambda x, noise: ours(x, noise=noise)[0])(xs, noises)
    for x, noise, output in zip(xs, noises, mapped, strict=True):
        torch.testing.assert_close(output, theirs(x, noise=noise)[0], **EXACT)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, noise=noise), ours(x, noise=noise), **EXACT)
    program = torch.export.export(ours, (x,), {"noise": noise})
    torch.testing.assert_close(program.module()(x, noise=noise), ours(x, noise=noise), **EXACT)


@pytest.mark.parametrize("layout", ["packed", "jagged"])
def test_compiled_calls_reject_noise_with_other_lengths_than_the_input(layout):
    def of(rows, lengths):
        if layout == "packed":
            return pack_padded_sequence(rows, lengths)
        cut = [row[:n] for row, n in zip(rows.unbind(1), lengths, strict=True)]
        return torch.nested.nested_tensor(cut, layout=torch.jagged)

    layer = FusedLeakyRNN(D, H)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input, noise = of(torch.randn(T, B, D), [6, 4, 2, 1]), torch.randn(T, B, H)
    found = compiled(input, noise=of(noise, [6, 4, 2, 1]))[1]
    torch.testing.assert_close(found, layer(input, noise=of(noise, [6, 4, 2, 1]))[1])
    with pytest.raises(RuntimeError, match="noise must have the sequence lengths of input"):
        compiled(input, noise=of(noise, [6, 3, 3, 1]))


PACKED = pack_padded_sequence(torch.zeros(T, B, D), [T] * B)
ORDERED, OTHER = (
    pack_padded_sequence(torch.zeros(T, B, D), lengths, enforce_sorted=False)
    for lengths in ([6, 3, 5, 1], [6, 5, 3, 1])
)
ONE_STEP = PackedSequence(torch.zeros(T * B, H), torch.tensor([T * B]))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"noise": torch.zeros(T, B, H + 1)}, RuntimeError, r"noise must have shape \(6, 4, 5\)"),
        ({"noise": torch.zeros(T, H)}, RuntimeError, r"noise must have shape \(6, 4, 5\), got"),
        ({"noise": [1.0]}, TypeError, "laid out like input, a Tensor, got a list"),
        ({"noise": PACKED}, TypeError, "laid out like input, a Tensor, got a PackedSequence"),
        ({"noise": torch.zeros(T, B, H, device="meta")}, RuntimeError, "noise must be at cpu"),
        ({"input": PACKED, "noise": ONE_STEP}, RuntimeError, "have the sequence lengths of input"),
        ({"input": ORDERED, "noise": OTHER}, RuntimeError, "have the sorted_indices of input"),
        ({"noise": torch.zeros(T, B, H) * 1j}, TypeError, "must hold real numbers, got .*complex"),
        ({"input": 3, "noise": torch.zeros(T, B, H)}, TypeError, "input must be a Tensor or a"),
    ],
)
def test_invalid_noise_is_rejected(path, changes, error, text):
    with pytest.raises(error, match=text):
        FusedLeakyRNN(D, H)(**{"input": torch.zeros(T, B, D)} | changes)


@pytest.mark.drop_in
def test_the_operators_of_other_cells_reject_noise(kind):
    weights = [*kind.layer(D, H).parameters()]
    call = kind.cell.number, torch.zeros(T, B, D), (), weights, None, None, ops.BIAS, 0, ()
    with pytest.raises(RuntimeError, match="options must not set INPUTS for the"):
        operators.forward(*call, [torch.zeros(T, B, H)])


def test_the_operator_rejects_invalid_noise():
    weights = [torch.zeros(D, H).T, torch.zeros(H, H), torch.zeros(H)]
    call = 3, torch.zeros(T, B, D), (), weights, None, None
    for noise, error in (
        (torch.zeros(T, B, 2 * H), r"noise must have shape \(.*\), got"),
        (torch.zeros(T, B, H).double(), "noise must have the dtype of input"),
    ):
        with pytest.raises(RuntimeError, match=error):
            operators.forward(*call, 0, 0, (), [noise])
    with pytest.raises(RuntimeError, match="options must not set two nonlinearities"):
        operators.forward(*call, ops.SIGMOID | ops.SOFTPLUS, 0)


def test_rates_must_be_above_0_and_at_most_1(path):
    rates = torch.rand(H) * 0.9 + 0.05
    for rate, wanted in ((0.25, torch.full((H,), 0.25)), (rates, rates), (rates.tolist(), rates)):
        for module in (FusedLeakyRNN(D, H, 2, rate=rate), FusedLeakyRNNCell(D, H, rate=rate)):
            found = [p for name, p in module.named_parameters() if name.startswith("rate")]
            for logits in found:
                torch.testing.assert_close(logits.detach().sigmoid(), wanted)
            before = [p.detach().clone() for p in found]
            module.reset_parameters()
            assert all(map(torch.equal, before, found))
    for rate in (0.0, -1.0, 1.5, float("nan"), [0.5, 0.5, 0.5, 0.5, 0.0]):
        with pytest.raises(
            ValueError, match=r"rate must be above 0 and at most 1, got (0|-1|1.5|nan)$"
        ):
            FusedLeakyRNN(D, H, rate=rate)
    with pytest.raises(
        ValueError, match=r"one number or 5 numbers, one per unit, got shape \(6,\)"
    ):
        FusedLeakyRNN(D, H, rate=[0.5] * (H + 1))
    # With a rate of 1, the layer is a vanilla RNN.
    module, vanilla = FusedLeakyRNN(D, H, rate=1), namernn_fast.FusedRNN(D, H)
    vanilla.load_state_dict({k: v for k, v in module.state_dict().items() if k != "rate_l0"})
    torch.testing.assert_close(module(torch.ones(T, B, D))[0], vanilla(torch.ones(T, B, D))[0])
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert torch.equal(module.double().rates, torch.ones(1, H, dtype=torch.float64))
    for cls in (FusedLeakyRNN, FusedLeakyRNNCell):
        for rate in (1, 1 - 1e-9, [0.5, 0.5, 0.5, 0.5, 1.0]):
            with pytest.raises(ValueError, match="rate must be below 1 with train_rate=True"):
                cls(D, H, rate=rate, train_rate=True)


def test_rates_can_be_read_and_are_in_the_repr():
    layer = FusedLeakyRNN(D, H, 2, "relu", bidirectional=True, rate=0.2, train_rate=True)
    torch.testing.assert_close(layer.rates, torch.full((4, H), 0.2))
    layer.rates.sum().backward()
    assert layer.rate_l1_reverse.grad.all()
    assert repr(layer) == (
        f"FusedLeakyRNN({D}, {H}, num_layers=2, bidirectional=True, nonlinearity=relu, rate=0.2)"
    )
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    cell = FusedLeakyRNNCell(D, H, rate=rates)
    torch.testing.assert_close(cell.rates, torch.tensor(rates))
    assert repr(cell) == f"FusedLeakyRNNCell({D}, {H}, rate=0.1 to 0.5)"
    assert "rate" not in repr(FusedLeakyRNN(D, H, device="meta"))
    with FakeTensorMode():
        assert "rate" not in repr(FusedLeakyRNN(D, H))


@pytest.mark.parametrize("trains", [False, True])
def test_rates_get_gradients_only_with_train_rate(trains):
    module = FusedLeakyRNN(D, H, train_rate=trains)
    module(torch.randn(T, B, D))[0].sum().backward()
    assert module.rate_l0.requires_grad == trains
    assert (module.rate_l0.grad is not None) == trains
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_omitted_initial_states_are_zero_for_every_nonlinearity(nonlinearity, path):
    ours, _ = twins(nonlinearity=nonlinearity)
    x, zeros = drawn(T, B, D), torch.zeros(1, B, H, dtype=torch.float64)
    assert torch.equal(ours(x)[0], ours(x, (zeros, zeros))[0])


def test_unknown_nonlinearities_are_rejected(path):
    message = "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu' or 'sigmoid' or 'softplus'"
    for cls in (FusedLeakyRNN, FusedLeakyRNNCell):
        with pytest.raises(ValueError, match=message):
            cls(D, H, nonlinearity="gelu")
    message = "nonlinearity must be tanh or relu or sigmoid or softplus"
    with pytest.raises(ValueError, match=message):
        last_state(torch.zeros(T, B, D), None, [], cell="leaky", nonlinearity="gelu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_everything_and_keeps_the_error_budget(dtype):
    """As for a dense LSTM, all results of a leaky layer under autocast are in 16 bits."""
    budget = ErrorBudget(dtype)
    for _ in range(4):
        ours, theirs = (module.float() for module in twins())
        x, noise = torch.randn(T, B, D), torch.randn(T, B, H)
        exact = copy.deepcopy(theirs).double()(x.double(), noise=noise.double())
        with torch.autocast("cpu", dtype):
            results = flat(ours(x, noise=noise))
        assert {result.dtype for result in results} == {dtype}
        rival = flat(theirs.to(dtype)(x.to(dtype), noise=noise.to(dtype)))
        for name, tensors in enumerate(zip(results, rival, flat(exact), strict=True)):
            budget.add(name, *tensors)
    budget.check()


def test_torchscript_and_onnx_raise_errors_with_a_reason(tmp_path):
    layer, x = FusedLeakyRNN(D, H), torch.randn(T, B, D)
    cell = FusedLeakyRNNCell(D, H)
    for module in (layer, layer.prepare(), TokenLeakyRNN(9, D, H), cell):
        with pytest.raises(RuntimeError, match="torch has no FusedLeakyRNN: trace the call with"):
            torch.jit.script(module)
    for module, input in ((layer, x), (cell, x[0])):
        reason = rf"a {type(module).__name__}.*: trace the call under torch.no_grad"
        with pytest.raises(RuntimeError, match=reason):
            torch.jit.trace(module, (input,))
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(x[:3])[0], layer(x[:3])[0])
    for other in (layer, leaky_equation.layer(D, H)):
        with pytest.raises(Exception, match=f"ONNX has no {other._cell.name} layer"):
            torch.onnx.export(other, (x,), tmp_path / "leaky.onnx", dynamo=True)


def test_leaky_modules_can_be_explained_prepared_and_restored():
    layer, x = FusedLeakyRNN(D, H), torch.randn(T, B, D)
    assert availability.why_not_gpu_kernel(layer._cell) is None
    step = explain(FusedLeakyRNNCell(D, H), x[0])
    assert step.path.startswith("cpu ")
    assert step.why_not == {"torch": "torch has no such cell"}
    model = torch.nn.Sequential(layer, FusedLeakyRNNCell(D, H))
    assert restore_rnn(model)[0] is layer
    prepare_rnn(model)
    assert [type(module).__name__ for module in model] == ["PreparedLayer", "PreparedCell"]
    assert type(restore_rnn(model)[0]) is FusedLeakyRNN


def test_wrong_states_and_noise_are_named():
    layer, cell = FusedLeakyRNN(D, H), FusedLeakyRNNCell(D, H)
    x, state = torch.zeros(T, B, D), torch.zeros(1, B, H)
    with pytest.raises(TypeError, match="hx must be a pair of tensors or None, got Tensor"):
        layer(x, state)
    with pytest.raises(RuntimeError, match="hx must be a pair of tensors or None, got 1 of them"):
        layer(x, (state,))
    with pytest.raises(TypeError, match="hx must be a Tensor or None, got tuple"):
        FusedRNN(D, H)(x, (state, state))
    with pytest.raises(
        RuntimeError, match=r"the states in hx should also be 3-D but got \(2-D, 2-D"
    ):
        layer(x, (state[0], state[0]))
    with pytest.raises(TypeError, match="hx must be a pair of tensors or None, got Tensor"):
        cell(x[0], state[0])
    with pytest.raises(RuntimeError, match="hx must have 2 dimensions, as input has, got 3"):
        cell(x[0], (state, state))
    with pytest.raises(RuntimeError, match="noise must have 2 dimensions, as input has, got 1"):
        cell(x[0], noise=state[0, 0])


def test_copies_keep_rates_and_nonlinearity():
    layer, x = FusedLeakyRNN(D, H, 2, "softplus", rate=0.3), torch.randn(T, B, D)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(torch.equal, flat(other(x)), flat(layer(x))))
    layer.flatten_parameters()


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_step_matches_the_equation(nonlinearity, with_noise):
    """Checks `make_step`, the reference of other tests, against an independent formula."""
    weight_ih, weight_hh, bias_ih, bias_hh, rate = (
        drawn(*size) for size in ((H, D), (H, H), (H,), (H,), (H,))
    )
    x, r, v, noise = drawn(B, D), drawn(B, H), drawn(B, H), drawn(B, H) * with_noise
    a = 1 / (1 + torch.exp(-rate))
    wanted_v = (1 - a) * v + a * (x @ weight_ih.T + bias_ih + r @ weight_hh.T + bias_hh) + noise
    wanted_r = {
        "tanh": 1 - 2 / (torch.exp(2 * wanted_v) + 1),
        "relu": wanted_v.clamp(min=0),
        "sigmoid": 1 / (1 + torch.exp(-wanted_v)),
        "softplus": torch.log(1 + torch.exp(wanted_v)),
    }[nonlinearity]
    weights = {"weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh, "rate": rate}
    step = LEAKY.make_step(weights, nonlinearity=nonlinearity, in_place=False)
    sums = x @ weight_ih.T + LEAKY.bias_of_input(weights)
    states = step(torch.cat([sums, noise], 1) if with_noise else sums, torch.cat([r, v], 1))
    torch.testing.assert_close(states, torch.cat([wanted_r, wanted_v], 1), **EXACT)
