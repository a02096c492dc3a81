"""Tests that every callable takes the same arguments, by the same names, in the same order."""

import inspect

import pytest
import torch
from kinds import KINDS

import namernn_fast
from namernn_fast import cells, explain, last_state, prepare_rnn, replace_rnn
from namernn_fast.nn import PreparedLayer

ORDER = ["lengths", "reset", "reset_to", "embedding", "padding_idx"]
"""The arguments after input and hx."""
OPTIONS = {"last_state", "share_prefixes"}
STEPS, BATCH, FEATURES, HIDDEN, VOCABULARY = 6, 3, 5, 8, 7
METHODS = {
    f"{cls.__name__}.{method}": getattr(cls, method)
    for cls in [PreparedLayer, *(c for kind in KINDS.values() for c in kind.classes[::2])]
    for method in ("forward", "last_state")
}
FUNCTIONS = {name: getattr(namernn_fast, name) for name in (*KINDS, "last_state")}


@pytest.mark.parametrize("function", (METHODS | FUNCTIONS | {"explain": explain}).values())
def test_all_callables_take_arguments_in_the_same_order(function):
    """If `lengths` may be positional, all arguments after it are keyword-only."""
    parameters = inspect.signature(function).parameters
    keyword_only = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = [name for name in parameters if name in ORDER]
    is_token_layer = "ids" in parameters
    assert names == (ORDER[:3] if is_token_layer else ORDER)
    if "lengths" not in keyword_only:
        assert set(keyword_only) - OPTIONS == set(names) - {"lengths"}


def draw(kind):
    """Returns a unidirectional layer and every argument that its calls accept."""
    layer = kind.layer(FEATURES, HIDDEN, num_layers=2).eval()
    arguments = {
        "hx": kind.states(torch.randn, 2, BATCH, HIDDEN),
        "lengths": torch.tensor([4, 6, 0]),
        "reset": torch.rand(STEPS, BATCH) < 0.3,
        "reset_to": kind.states(torch.randn, STEPS, 2, BATCH, HIDDEN),
        "embedding": torch.randn(VOCABULARY, FEATURES),
        "padding_idx": 2,
    }
    for name in kind.cell.input_names:
        arguments[name] = torch.randn(STEPS, BATCH, 2 * HIDDEN)
    return layer, arguments


def input_for(arguments):
    if "embedding" in arguments:
        return torch.randint(VOCABULARY, (STEPS, BATCH))
    return torch.randn(STEPS, BATCH, FEATURES)


class Model(torch.nn.Module):
    """A user's model that passes every argument to its layer."""

    def __init__(self, layer):
        super().__init__()
        self.rnn = layer

    def forward(self, input, **arguments):
        return self.rnn(input, **arguments), self.rnn.last_state(input, **arguments)


def choices(arguments):
    """Yields each argument with the arguments that it requires, then all arguments together."""
    for name in arguments:
        needs = {"reset_to": "reset", "padding_idx": "embedding"}.get(name)
        yield {key: arguments[key] for key in (needs, name) if key}
    yield arguments


@torch.no_grad()
def test_replaced_and_prepared_models_accept_every_argument(kind):
    """Replaced and prepared models handle each argument as the original layer does."""
    layer, arguments = draw(kind)
    theirs = kind.nn_layer(FEATURES, HIDDEN, num_layers=2)
    theirs.load_state_dict(layer.state_dict())
    swapped = replace_rnn(Model(theirs.eval())) if kind.cell.torch else Model(layer)
    prepared = prepare_rnn(Model(layer))
    assert isinstance(prepared.rnn, PreparedLayer)
    weights = [weight for _, weight in layer.named_parameters()]
    for chosen in choices(arguments):
        input = input_for(chosen)
        output, states = layer(input, **chosen)
        for model in (swapped, prepared):
            (other, others), last = model(input, **chosen)
            torch.testing.assert_close((other, others, last), (output, states, states))
            path = explain(model.rnn, input, **chosen).path
            assert path == explain(layer, input, **chosen).path
        named = {"hx": None, **chosen}
        hx = named.pop("hx")
        torch.testing.assert_close(kind.run(input, hx, weights, **named), (output, states))
        last = last_state(input, hx, weights, cell=kind.passed, **named)
        torch.testing.assert_close(last, states)


def test_arguments_after_lengths_are_keyword_only(kind):
    layer, arguments = draw(kind)
    tokens = kind.tokens(VOCABULARY, FEATURES, HIDDEN)
    x, reset = torch.randn(STEPS, BATCH, FEATURES), arguments["reset"]
    ids = torch.randint(VOCABULARY, (STEPS, BATCH))
    for module, input in ((layer, x), (layer.prepare(), x), (tokens, ids)):
        for call in (module, module.last_state):
            with pytest.raises(TypeError, match="positional argument"):
                call(input, None, None, reset)
    with pytest.raises(TypeError, match="positional argument"):
        explain(layer, x, None, None, reset)
    with pytest.raises(TypeError, match="positional argument"):
        kind.step_module(FEATURES, HIDDEN)(x[0], None, x[0])
    for module in (
        kind.step_module(FEATURES, HIDDEN),
        kind.step_module(FEATURES, HIDDEN).prepare(),
    ):
        for name in ORDER:
            with pytest.raises(TypeError, match=f"a step module takes no {name}"), torch.no_grad():
                module(x[0], None, **{name: [1] * BATCH})


def test_an_unknown_argument_raises_an_error(kind):
    layer, _ = draw(kind)
    tokens, step_module = kind.tokens(VOCABULARY, FEATURES, HIDDEN), kind.step_module(5, 8)
    x, ids = torch.randn(STEPS, BATCH, FEATURES), torch.randint(VOCABULARY, (STEPS, BATCH))
    stream = layer.prepare().stream(BATCH)
    calls = [(layer, x), (layer.prepare(), x), (step_module, x[0]), (tokens, ids), (stream, x[0])]
    for module, input in calls:
        with pytest.raises(TypeError, match="takes no argument 'lenghts'"):
            module(input, lenghts=x)
    with pytest.raises(TypeError, match="takes no argument 'lenghts'"):
        explain(layer, x, lenghts=x)
    for name in {name for cell in cells.NUMBERED for name in cell.input_names}:
        assert layer(x, **{name: None})[0].shape == (STEPS, BATCH, HIDDEN)
        if name not in kind.cell.input_names:
            with pytest.raises(ValueError, match=f"{name} must be None for a {kind.cell.layer}"):
                layer(x, **{name: x})


def test_explain_accepts_exactly_the_arguments_of_the_call(kind):
    x, reset = torch.randn(STEPS, BATCH, FEATURES), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    step_module = kind.step_module(FEATURES, HIDDEN)
    tokens = kind.tokens(VOCABULARY, FEATURES, HIDDEN)
    ids = torch.randint(VOCABULARY, (STEPS, BATCH))
    noise = {name: torch.randn(STEPS, BATCH, HIDDEN) for name in kind.cell.input_names}
    lengths = [STEPS] * BATCH
    explained = explain(tokens, ids, lengths=lengths, reset=reset, **noise)
    assert explained.path == explain(tokens.rnn, x, lengths=lengths, reset=reset, **noise).path
    with pytest.raises(TypeError, match="Cell takes no reset"):
        explain(step_module, x[0], reset=reset)
    with pytest.raises(TypeError, match="Stream takes no lengths"):
        explain(step_module.prepare().stream(BATCH), x[0], lengths=[1] * BATCH)
    for module in (tokens, tokens.prepare()):
        with pytest.raises(TypeError, match="takes no embedding"):
            explain(module, ids, embedding=torch.randn(VOCABULARY, FEATURES))
