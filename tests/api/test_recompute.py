"""Tests of `recompute=`, which keeps few states and computes the rest again."""

import copy

import pytest
import torch
from kinds import tensors_in
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map_only

from namernn_fast import (
    FusedGRU,
    FusedLayerNormLSTM,
    FusedLeakyRNN,
    FusedLSTM,
    FusedRNN,
    FusedSLSTM,
    TokenGRU,
    dispatch,
)
from namernn_fast.testing import assert_within_budget

T, B, D, H, STEPS = 19, 4, 5, 16, 4
LENGTHS = [19, 3, 0, 8]
MODULES = {
    "rnn": lambda **options: FusedRNN(D, H, num_layers=2, **options),
    "gru": lambda **options: FusedGRU(D, H, num_layers=2, **options),
    "projected": lambda **options: FusedLSTM(D, H, proj_size=6, num_layers=2, **options),
    "leaky": lambda **options: FusedLeakyRNN(D, H, train_rate=True, num_layers=2, **options),
    "norms": lambda **options: FusedLayerNormLSTM(D, H, **options),
    "heads": lambda **options: FusedSLSTM(D, H, heads=4, **options),
    "tokens": lambda **options: TokenGRU(7, D, H, num_layers=2, **options),
}


def states_of(layer, *dimensions):
    """Returns drawn states, one for each of the layer's."""
    rnn = getattr(layer, "rnn", layer)
    sizes = rnn._cell.state_sizes(rnn.proj_size or H, H)
    found = tuple(torch.rand(*dimensions, size) + 1 for size in sizes)
    return found if len(found) > 1 else found[0]


def arguments_of(layer, layout):
    """Returns the arguments of a call in a layout."""
    rnn = getattr(layer, "rnn", layer)
    x = torch.randn(T, B, D) if rnn is layer else torch.randint(7, (T, B))
    noise = {"noise": 0.1 * torch.randn(T, B, 2 * H)} if rnn._cell.inputs else {}
    if layout == "dense":
        return (x, states_of(layer, rnn.num_layers, B)), noise
    if layout == "unbatched":
        return (x[:, 0],), {name: values[:, 0] for name, values in noise.items()}
    if layout == "lengths":
        return (x, states_of(layer, rnn.num_layers, B), LENGTHS), noise
    if layout == "packed":
        lengths = [max(length, 1) for length in LENGTHS]
        pack = {"lengths": lengths, "enforce_sorted": False}
        noise = {name: pack_padded_sequence(v, **pack) for name, v in noise.items()}
        return (pack_padded_sequence(x, **pack), states_of(layer, rnn.num_layers, B)), noise
    reset = torch.rand(T, B) < 0.2
    reset_to = states_of(layer, T, rnn.num_layers, B)
    return (x,), noise | {"reset": reset, "reset_to": reset_to}


def results(layer, arguments, keywords):
    """Returns the output, the last states, and all gradients."""
    inputs = [t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    for tensor in inputs:
        tensor.requires_grad_()
        tensor.grad = None
    layer.zero_grad()
    output, states = layer(*arguments, **keywords)
    output = getattr(output, "data", output)
    loss = output.square().sum() + sum(s.sum() for s in tensors_in(states))
    loss.backward()
    found = {"output": output.detach()} | {f"input {k}": t.grad for k, t in enumerate(inputs)}
    found |= {f"state {k}": s.detach() for k, s in enumerate(tensors_in(states))}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("layout", ["dense", "unbatched", "lengths", "packed", "resets"])
@pytest.mark.parametrize("name", MODULES)
def test_recomputing_gives_the_same_results(name, layout):
    torch.manual_seed(0)
    layer = MODULES[name]()
    ours = MODULES[name](recompute=STEPS)
    ours.load_state_dict(layer.state_dict())
    arguments, keywords = arguments_of(layer, layout)
    found = results(ours, arguments, keywords)
    theirs = results(layer, arguments, keywords)
    doubled = tree_map_only(torch.Tensor, to_double, (list(arguments), keywords))
    exact = results(copy.deepcopy(layer).double(), *doubled)
    assert found.keys() == theirs.keys()
    assert_within_budget(found, theirs, exact)


def to_double(tensor):
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def test_only_states_between_pieces_are_kept():
    """Counts what autograd's nodes of a call keep, except the input and the parameters."""
    kept = {}
    for recompute in (None, 50):
        layer = FusedLSTM(D, H, recompute=recompute)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = layer(torch.randn(200, B, D))
        kept[recompute] = total
        output.sum().backward()
    assert kept[50] < kept[None] / 4


def test_inference_runs_whole_sequences(monkeypatch):
    layer = FusedGRU(D, H, num_layers=2, recompute=STEPS)
    monkeypatch.setattr(dispatch, "_run_layers", None)  # fails if it is called
    with torch.no_grad():
        output, h_n = layer(torch.randn(T, B, D))
    assert torch.equal(output[-1], h_n[-1])


def test_compiled_programs_recompute():
    layer = FusedGRU(D, H, recompute=STEPS)
    plain = copy.deepcopy(layer)
    plain.recompute = None
    x = torch.randn(T, B, D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run in (compiled, plain):
        run(x)[0].square().sum().backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_double_backward():
    layer = FusedGRU(D, H, recompute=STEPS).double()
    x = torch.randn(6, 2, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_wrong_arguments_are_rejected():
    for value in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="recompute must be a positive number of steps"):
            FusedGRU(D, H, recompute=value)
    with pytest.raises(ValueError, match="recompute supports one direction only"):
        FusedGRU(D, H, bidirectional=True, recompute=STEPS)
    jagged = torch.nested.as_nested_tensor([torch.randn(3, D)], layout=torch.jagged)
    with pytest.raises(ValueError, match="recompute does not support jagged input"):
        FusedGRU(D, H, recompute=STEPS)(jagged)
