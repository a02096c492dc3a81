"""Tests weight changes, autocast, 16-bit dtypes, very long input and determinism."""

import copy
import itertools

import pytest
import torch
from cases import named_states
from kinds import (
    KINDS,
    VARIANTS,
    flat,
    map_states,
    onednn_has_bfloat16_lstm,
    tensors_in,
)
from layouts import tensors_of
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import FusedRNN, explain, ops
from namernn_fast.testing import ErrorBudget

STACK = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([3, 5, 1])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(module, x, packed):
    """Runs a module on a dense or packed batch. Returns the output and the last states."""
    input = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if packed else x
    return tensors_of(module(input))


def tie(module):
    module.weight_hh_l1 = module.weight_hh_l0


def rescale_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)


def copy_in_place(module):
    with torch.no_grad():
        module.weight_hh_l0.copy_(module.weight_hh_l1 * 2)


def assign_data(module):
    module.weight_hh_l0.data = module.weight_hh_l1.data * 2


def optimize(**options):
    def step(module):
        flat(module(torch.ones(2, 1, 4, dtype=torch.float64)))[1].sum().backward()
        torch.optim.Adam(module.parameters(), **options).step()
        module.zero_grad()

    return step


CHANGES = {
    "weight_norm": rescale_norm,
    "spectral_norm": lambda module: parametrizations.spectral_norm(module, "weight_hh_l0"),
    "old spectral_norm": lambda module: torch.nn.utils.spectral_norm(module, "weight_hh_l0"),
    "prune": lambda module: prune.l1_unstructured(module, "weight_hh_l0", 0.5),
    "prune, remove": lambda module: prune.remove(
        prune.l1_unstructured(module, "weight_hh_l0", 0.5), "weight_hh_l0"
    ),
    "tie": tie,
    "copy_": copy_in_place,
    "data =": assign_data,
    "data.zero_": lambda module: module.weight_hh_l0.data.zero_(),
    "load_state_dict": lambda module: module.load_state_dict(
        {name: 2 * p for name, p in module.state_dict().items()}, assign=True
    ),
    "Adam": optimize(),
    "Adam foreach": optimize(foreach=True),
    "Adam fused": optimize(fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weight_changes_take_effect_in_the_next_call(kind, change):
    modules = kind.twins(4, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    results = []
    for module in modules:
        with torch.no_grad():
            before = module(x)[0]
        torch.manual_seed(0)  # spectral_norm draws random numbers
        change(module)
        with torch.no_grad():
            after = flat(module.eval()(x))
        assert not torch.equal(before, after[0])
        module(x)[0].sum().backward()
        results.append([*after, {name: p.grad for name, p in module.named_parameters()}])
    torch.testing.assert_close(*results)


CAST, PROMOTED = "autocast's dtype", "autocast's dtype promoted with the state's dtype"
# Torch's dtypes of output, h_n and c_n under autocast on a CPU. Without hx, the dtype of the state
# is the dtype of the input. Every layout with lengths has torch's rules for packed sequences.
AUTOCAST = {
    ("rnn", "dense"): (CAST, CAST),
    ("rnn", "packed"): (CAST, CAST),
    ("gru", "dense"): (PROMOTED, PROMOTED),
    ("gru", "packed"): (PROMOTED, PROMOTED),
    ("lstm", "dense"): (CAST, CAST, CAST),
    ("lstm", "packed"): (PROMOTED, PROMOTED, PROMOTED),
    ("projected", "dense"): (CAST, CAST, PROMOTED),
    ("projected", "packed"): (CAST, CAST, PROMOTED),
}


def result_dtypes(name, layout, autocast, input, state=None):
    """Returns the dtypes of output, h_n and c_n under autocast, by torch's rules."""
    promoted = torch.promote_types(autocast, input if state is None else state)
    rules = AUTOCAST[name, "dense" if layout == "dense" else "packed"]
    return [{CAST: autocast, PROMOTED: promoted}[rule] for rule in rules]


def can_compare_dtypes(name, layout, *dtypes):
    """Returns whether torch's layer follows autocast's dtype rules on this processor.

    oneDNN computes dense LSTMs, and supports bfloat16 and float16 only on some processors. On other
    processors torch raises an error or returns other dtypes (docs/differences.md).
    """
    if (name, layout) != ("lstm", "dense"):
        return True
    return torch.float16 not in dtypes and onednn_has_bfloat16_lstm()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("name", "layout"), AUTOCAST)
def test_autocast_keeps_torchs_dtypes_and_the_error_budget(name, layout, dtype):
    """If torch's layer cannot run with oneDNN on this processor, the test turns oneDNN off."""
    kind, packed = VARIANTS[name], layout == "packed"
    wanted = result_dtypes(name, layout, dtype, torch.float32)
    comparable = can_compare_dtypes(name, layout, dtype)
    budget = ErrorBudget(dtype)
    for _ in range(4):
        modules = kind.twins(3, 40, **STACK)
        modules += (copy.deepcopy(modules[1]).double(),)
        x = torch.randn(5, 3, 3)
        results = []
        for module in modules:
            converted = x.to(module.weight_ih_l0.dtype, copy=True).requires_grad_()
            with (
                torch.backends.mkldnn.flags(enabled=comparable),
                torch.autocast("cpu", dtype, enabled=module is not modules[2]),
            ):
                output, *last = run(module, converted, packed)
            if module is modules[0] or (module is modules[1] and comparable):
                assert [result.dtype for result in (output, *last)] == wanted
            last_loss = sum(state.double().square().sum() for state in last)
            (output.double().sum() + last_loss).backward()
            gradients = {name: p.grad for name, p in module.named_parameters()}
            outputs = {"output": output, **named_states("{}_n", last)}
            results.append({**outputs, "input": converted.grad, **gradients})
        for result, exact in results[2].items():
            budget.add(result, results[0][result], results[1][result], exact.detach().numpy())
    budget.check()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*AUTOCAST, ("gru", "lengths"), *itertools.product(["lstm"], ["lengths", "jagged"])],
)
@pytest.mark.parametrize("state", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("input", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", DTYPES[1:], ids=str)
def test_autocast_result_dtypes_follow_torchs_rules(name, layout, autocast, input, state):
    kind, x = VARIANTS[name], torch.randn(5, 3, 3, dtype=input)
    hx = None if state is None else kind.states(torch.randn, 1, 3, 4, dtype=state)
    lengths = {"lengths": LENGTHS} if layout == "lengths" else {}
    if layout == "packed":
        x = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    elif layout == "jagged":
        sequences = [x[:length, b] for b, length in enumerate(LENGTHS)]
        x = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    wanted = result_dtypes(name, layout, autocast, input, state)
    ours, theirs = kind.twins(3, 4)
    both = layout in ("dense", "packed") and can_compare_dtypes(name, layout, autocast, input)
    for module in [ours, theirs] if both else [ours]:
        with torch.autocast("cpu", autocast):
            _, *last = results = tensors_of(module(x, hx, **lengths))
        assert [result.dtype for result in results] == wanted
        sum(state.sum() for state in last).backward()
    kernel = ops.cpu_kernel() if name == "projected" else ops.cpu_kernel(wanted[-1])
    with torch.autocast("cpu", autocast):
        assert explain(ours, x, hx, **lengths).path == f"cpu {kernel}"


def test_c_determines_the_result_dtype_under_autocast():
    """For an LSTM, autocast casts the matrix products but not c, so c determines the dtype."""
    hx = torch.randn(1, 3, 4), torch.randn(1, 3, 4, dtype=torch.bfloat16)
    x = pack_padded_sequence(torch.randn(5, 3, 3), LENGTHS, enforce_sorted=False)
    for module in KINDS["lstm"].twins(3, 4):
        for states, wanted in ((hx, torch.bfloat16), (hx[::-1], torch.float32)):
            with torch.autocast("cpu", torch.bfloat16):
                results = tensors_of(module(x, states))
            assert {result.dtype for result in results} == {wanted}


@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hx_dtype", DTYPES, ids=str)
def test_hx_may_differ_in_dtype_from_the_input(kind, input_dtype, hx_dtype):
    """hx is converted to the input's dtype, but the gradient of hx keeps the dtype of hx."""
    module = kind.layer(3, 4, dtype=input_dtype)
    x = torch.randn(5, 2, 3, dtype=input_dtype)
    hx = kind.states(torch.randn, 1, 2, 4, dtype=hx_dtype, requires_grad=True)
    converted = map_states(hx, lambda state: state.detach().to(input_dtype).requires_grad_())
    results, wanted = flat(module(x, hx)), flat(module(x, converted))
    assert all(map(torch.equal, results, wanted))
    results[0].sum().backward()
    wanted[0].sum().backward()
    for leaf, like in zip(tensors_in(hx), tensors_in(converted), strict=True):
        assert (leaf.grad.dtype, like.grad.dtype) == (leaf.dtype, like.dtype)
        assert torch.equal(leaf.grad, like.grad.to(hx_dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_sums_accumulate_in_float32(dtype):
    """The test adds 1024 terms of 2**-10. The sum is 1; in bfloat16 it would stall at 1/4."""
    size, small = 1024, 2.0**-10
    module = FusedRNN(size, size, nonlinearity="relu", bias=False, dtype=dtype)
    for p in module.parameters():
        torch.nn.init.constant_(p, small)
    x = torch.ones(1, size, size, dtype=dtype, requires_grad=True)
    hx = torch.ones(1, size, size, dtype=dtype, requires_grad=True)
    output, _ = module(x, hx)
    assert (output == 2).all()
    output.backward(torch.full_like(output, small))
    for wanted, tensors in ((small, (x, hx)), (1, module.parameters())):
        assert all((tensor.grad == wanted).all() for tensor in tensors)


def test_long_call_is_bit_identical_to_short_calls(kind):
    """A call of 200,000 steps is bit-identical to a series of calls of 1000 steps."""
    seq_len = 200_000
    module = kind.layer(3, 8)
    x = torch.randn(seq_len, 1, 3)
    results = []
    for steps in (seq_len, 1000):
        leaf, hx, outputs = x.clone().requires_grad_(), None, []
        for part in leaf.split(steps):
            output, hx = module(part, hx)
            outputs.append(output)
        output = torch.cat(outputs)
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        results.append((output, *tensors_in(hx), gradient))
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_outputs_may_have_more_than_2_31_elements():
    """In a 4 GiB output, the first and last sequences are bit-identical to a batch of four."""
    module = FusedRNN(1, 32, dtype=torch.float16)
    x = torch.randn(33_000, 2048, 1, dtype=torch.float16, requires_grad=True)
    ends = [0, 1, -2, -1]
    x_ends = x.detach()[:, ends].requires_grad_()
    wanted, last = module(x_ends)
    output, h_n = module(x)
    assert output.numel() > 2**31
    assert torch.equal(output[:, ends], wanted)
    assert torch.equal(h_n[:, ends], last)
    (gradient,) = torch.autograd.grad(h_n.sum(), x)
    (wanted_gradient,) = torch.autograd.grad(last.sum(), x_ends)
    assert wanted_gradient[-1].all()
    assert torch.equal(gradient[:, ends], wanted_gradient)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_give_bit_identical_results(kind, packed, dtype):
    module = kind.layer(3, 40, dropout=0.5, dtype=dtype, **STACK)
    x = torch.randn(5, 3, 3, dtype=dtype, requires_grad=True)
    results = []
    for deterministic in (True, True, False, False):
        torch.use_deterministic_algorithms(deterministic)
        torch.manual_seed(0)
        outputs = run(module, x, packed)
        loss = sum(output.sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, (x, *module.parameters()))))
    assert all(all(map(torch.equal, results[0], result)) for result in results[1:])
