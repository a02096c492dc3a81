"""Tests calls with tensor subclasses, and with tensors whose memory does not hold their values.

These tensors are called disguised. Torch's dispatcher converts them to plain tensors or calls their
class, so a call returns the same results as with plain tensors, or raises an error.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, needs_extension
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import namernn_fast
from namernn_fast.machine import availability

T, B, D, V = 3, 2, 4, 5
SIZES = (
    (1, 1),
    (2, 6),
)  # (layers, units); with one unit, a lazily negated state is not copied


class Subclass(Tensor):
    """A tensor class that holds its values in memory, like torchvision's classes."""


DISGUISES = {
    "Parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "Subclass": lambda tensor: tensor.as_subclass(Subclass),
    "negated": lambda tensor: tensor if tensor.dtype == torch.bool else torch._neg_view(-tensor),
    "ZeroTensor": lambda tensor: torch._efficientzerotensor(*tensor.shape, dtype=tensor.dtype),
}
WRAPPERS = {
    "TwoTensor": lambda tensor: TwoTensor(tensor, tensor.clone()),
    "LoggingTensor": LoggingTensor,
    "FakeTensor": FakeTensorMode().from_tensor,
}
if torch.distributed.is_available():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    DISGUISES["AsyncCollectiveTensor"] = AsyncCollectiveTensor  # a copy of it is a plain tensor
DISGUISES |= WRAPPERS


def value_of(tensor):
    """Returns a result as a plain tensor, or None for a FakeTensor, which has no values."""
    tensor = tensor.detach()
    if isinstance(tensor, FakeTensor):
        return None
    if isinstance(tensor, TwoTensor):
        first, second = value_of(tensor.a), value_of(tensor.b)
        assert first is None or torch.equal(first, second)
        return first
    if hasattr(tensor, "elem"):
        return value_of(tensor.elem)
    return tensor.resolve_neg().as_subclass(Tensor)


def assert_equal(found, wanted):
    for result, expected in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        value = value_of(result)
        if value is not None:
            torch.testing.assert_close(value, expected.detach())


class Calls:
    """The public calls of one kind of layer, each with its function and its tensor arguments.

    The states in hx are named h and c; those in reset_to are named reset_to_h and reset_to_c.
    """

    def __init__(self, kind, layers, size):
        torch.manual_seed(1)
        self.names = "hc"[: len(kind.cell.states)]
        layer, tokens = kind.layer(D, size, layers), kind.tokens(V, D, size, layers)
        cell = kind.step_module(D, size)
        for module in (layer, tokens, cell):
            module.requires_grad_(False)
        self.weights = {f"weight{i}": weight.data for i, weight in enumerate(layer.parameters())}
        last_state = functools.partial(namernn_fast.last_state, cell=kind.passed)

        def with_noise(arguments, features, rows=(T, B)):
            has_noise = bool(kind.cell.inputs)
            return arguments | ({"noise": torch.randn(*rows, features)} if has_noise else {})

        states = {name: torch.randn(layers, B, size) for name in self.names}
        x, ids = torch.randn(T, B, D), torch.randint(V, (T, B))
        dense = with_noise({"input": x, **states}, layers * size)
        resets = {"reset": torch.tensor([[True, False]] * T), "lengths": torch.tensor([T, 2])}
        resets |= {f"reset_to_{name}": torch.randn(T, *states["h"].shape) for name in self.names}
        packed = {"data": torch.randn(5, D), "batch_sizes": torch.tensor([2, 2, 1]), **states}
        step = {"input": x[0], **{name: state[0] for name, state in states.items()}}
        step = with_noise(step, size, (B,))
        frame = with_noise({"frame": x[0], **states}, layers * size, (B,))
        frame |= {"rows": torch.tensor([1, 0]), "out": torch.zeros(B, size)}
        self.calls = {
            "layer": (layer, dense),
            "layer with resets": (layer, dense | resets),
            "layer on packed": (layer, packed),
            "layer on ids": (layer, {"input": ids, "embedding": torch.randn(V, D), **states}),
            "last_state of layer": (layer.last_state, dense),
            "function": (kind.run, dense | self.weights),
            "function last_state": (last_state, dense | self.weights),
            "token layer": (tokens, with_noise({"ids": ids, **states}, layers * size)),
            "prepared": (layer.prepare(), dense),
            "prepared with resets": (layer.prepare(), dense | resets),
            "prepared int8": (layer.prepare(torch.int8), dense),
            "prepared token layer": (tokens.prepare(), {"input": ids, **states}),
            "step module": (cell, step),
            "prepared step module": (cell.prepare(), step),
            "stream": (layer.prepare(), frame),
            "stream of tokens": (tokens.prepare(), {"frame": ids[0], **states}),
        }

    def run(self, name, arguments):
        """Runs a call, and returns its result tensors."""
        run, _ = self.calls[name]
        given = {key: value for key, value in arguments.items() if key not in self.weights}
        for key, prefix in (("hx", ""), ("reset_to", "reset_to_")):
            states = [given.pop(prefix + of) for of in self.names if prefix + of in given]
            if states:
                given[key] = tuple(states) if len(states) > 1 else states[0]
        if "batch_sizes" in given:
            given["input"] = PackedSequence(given.pop("data"), given.pop("batch_sizes"))
        if name.startswith("function"):
            given["weights"] = [arguments[key] for key in self.weights]
        if name.startswith("stream"):
            stream = run.stream(B)
            stream.states = given.pop("hx")
            return [stream(**given).clone(), *tree_leaves(stream.states)]
        results = []
        for result in tree_leaves(run(**given)):
            results += [result.data] if isinstance(result, PackedSequence) else [result]
        return [result for result in results if result is not None]


calls_of = functools.cache(Calls)


def results_of(calls, name, arguments, train, disguise=None):
    """Returns the results of a call and, if `train`, the gradients of its arguments.

    `disguise` changes the gradients that the backward pass receives.
    """
    arguments = {
        key: tensor.detach().requires_grad_(train and tensor.is_floating_point())
        for key, tensor in arguments.items()
    }
    with torch.set_grad_enabled(train):
        results = calls.run(name, arguments)
    if not train:
        return results
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(result.shape, generator=generator) for result in results]
    grads = grads if disguise is None else [*map(disguise, grads)]
    leaves = [tensor for tensor in arguments.values() if tensor.requires_grad]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


@st.composite
def drawn_disguises(draw):
    """Draws a call, whether to train, and disguises for some arguments and incoming gradients."""
    kind, sizes = draw(st.sampled_from([*KINDS])), draw(st.sampled_from(SIZES))
    calls = calls_of(KINDS[kind], *sizes)
    name = draw(st.sampled_from([*calls.calls]))
    # Torch's own cells add to a plain tensor in place. Given a TwoTensor, they would add twice.
    known = [key for key in DISGUISES if name != "step module" or key != "TwoTensor"]
    some = st.sampled_from(draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)))
    names = [*calls.calls[name][1], "grads"]
    changed = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    return calls, name, draw(st.booleans()), {key: draw(some) for key in changed}


@needs_extension  # torch's own operators have other limits
@given(drawn_disguises())
def test_disguised_arguments_give_equal_results_or_an_error(drawn):
    """A call that accepts plain tensors may reject only torch's test classes and ZeroTensors."""
    calls, name, train, disguises = drawn
    train = train and not name.startswith(("prepared", "stream"))
    used = {*disguises.values()}

    def zeroed(key, tensor):
        return torch.zeros_like(tensor) if disguises.get(key) == "ZeroTensor" else tensor

    plain = {key: zeroed(key, tensor) for key, tensor in calls.calls[name][1].items()}
    changed = {
        key: DISGUISES[disguises[key]](tensor) if key in disguises else tensor
        for key, tensor in plain.items()
    }
    try:
        wanted = results_of(calls, name, plain, train, lambda grad: zeroed("grads", grad))
    except RuntimeError:  # for example, batch_sizes of zeros are invalid
        with pytest.raises((RuntimeError, *([AssertionError] if "FakeTensor" in used else []))):
            results_of(calls, name, changed, train)
        return
    try:
        found = results_of(calls, name, changed, train, DISGUISES.get(disguises.get("grads")))
    except (RuntimeError, TypeError):
        assert used & {*WRAPPERS, "ZeroTensor"}
    except AssertionError:
        assert "FakeTensor" in used
    else:
        assert_equal(found, wanted)


@needs_extension
@pytest.mark.parametrize("disguise", [key for key in DISGUISES if key != "FakeTensor"])
@pytest.mark.parametrize("sizes", SIZES)
def test_any_state_may_be_a_disguised_tensor(kind, sizes, disguise):
    calls = calls_of(kind, *sizes)
    for name, (_, arguments) in calls.calls.items():
        if name == "step module" and disguise in ("ZeroTensor", "TwoTensor"):
            continue  # torch's own cells reject some of them
        states = [key for key in arguments if key in calls.names or key.startswith("reset_to")]
        for key in states:
            plain = dict(arguments)
            if disguise == "ZeroTensor":
                plain[key] = torch.zeros_like(plain[key])
            disguised = plain | {key: DISGUISES[disguise](plain[key])}
            wanted = results_of(calls, name, plain, False)
            assert_equal(results_of(calls, name, disguised, False), wanted)


@pytest.mark.parametrize("disguise", ["negated", "TwoTensor", "LoggingTensor"])
def test_the_reference_path_writes_only_to_plain_tensors_in_place(disguise, monkeypatch):
    """In inference the reference path overwrites the product of input and weight_ih with states."""
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    layer, x, hx = namernn_fast.FusedRNN(D, 3), torch.randn(T, B, D), torch.randn(1, B, 3)
    weights = [weight.data for weight in layer.parameters()]
    changed = [weights[0], DISGUISES[disguise](weights[1]), *weights[2:]]
    with torch.no_grad():
        assert_equal(layer(x, DISGUISES[disguise](hx)), layer(x, hx))
        assert_equal(namernn_fast.rnn(x, hx, changed), layer(x, hx))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("disguise", ["negated", "TwoTensor", "AsyncCollectiveTensor"])
def test_compiled_calls_accept_disguised_states(disguise, backend):
    if disguise not in DISGUISES:
        pytest.skip("needs torch.distributed")
    torch._dynamo.reset()
    layer = namernn_fast.FusedRNN(D, 1)
    x, hx = torch.randn(T, B, D), torch.randn(1, B, 1)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert_equal(compiled(x, DISGUISES[disguise](hx)), layer(x, hx))


def test_vmap_accepts_lazily_negated_states():
    layer = namernn_fast.FusedLSTM(D, 1)
    x, hx = torch.randn(4, T, B, D), torch.randn(2, 4, 1, B, 1)
    mapped = torch.vmap(lambda x, h, c: layer(x, (h, c)))
    assert_equal(mapped(x, torch._neg_view(-hx[0]), hx[1]), mapped(x, *hx))


@needs_extension
def test_streams_reject_tensors_that_would_run_a_step_twice():
    layer, frame = namernn_fast.FusedRNN(D, 3), torch.randn(B, D)
    stream = layer.prepare().stream(B)
    layer.weight_hh_l0 = torch.nn.Parameter(TwoTensor(*[torch.zeros(3, 3)] * 2))
    text = "frames and weights must be plain tensors, got a TwoTensor"
    with pytest.raises(TypeError, match=text):
        stream(TwoTensor(frame, frame))
    assert not stream.states.any()
    with pytest.raises(TypeError, match=text):
        layer.prepare().stream(B)(frame)
