"""Runs every kind of call in forked processes, for test_reliability.py.

    python forked_calls.py KIND

Prints each call that hangs in the child, or has other results there than in the parent, and then
the number of calls. Torch runs operators on 32,768 elements or more on its thread pool, so inputs,
states, weights and results are larger.
"""

import copy
import io
import os
import pickle
import signal
import sys
from functools import partial

import torch
from kinds import KINDS
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from namernn_fast.machine import availability

T, B, D, H, V = 3, 300, 120, 128, 400
MANY = 10**6
SECONDS = int(os.environ.get("SECONDS", 60))
"""The time after which a child that hangs is killed."""
BF16 = torch.bfloat16


def trained(call, *inputs, **options):
    """Returns the results of a call, and the gradients of the inputs and of a module's weights."""
    features = [input.clone().requires_grad_() for input in inputs if input.is_floating_point()]
    given = features or inputs
    leaves = [*features, *(call.parameters() if isinstance(call, torch.nn.Module) else ())]
    results = [*filter(torch.is_floating_point, tree_leaves(call(*given, **options)))]
    sums = [result.sum() for result in results]
    return *results, *torch.autograd.grad(sums, leaves, materialize_grads=True, allow_unused=True)


@torch.no_grad()
def inferred(call, *arguments, **options):
    return call(*arguments, **options)


def under_autocast(run, *arguments, **options):
    with torch.autocast("cpu", BF16):
        return run(*arguments, **options)


def by_aten(run, *arguments, **options):
    """Runs a call without the extension."""
    availability.HAS_EXTENSION = False
    try:
        return run(*arguments, **options)
    finally:
        availability.HAS_EXTENSION = True


def calls_of_layers(make, beside, **options):
    """Yields (name, function) for each kind of call of layers that read features."""
    layer, x = make(D, H, **options), torch.randn(T, B, D)
    lengths, reset = torch.arange(B) % (T + 1), torch.rand(T, B) < 0.3
    with torch.no_grad():
        beside = {**beside, "hx": layer(x, **beside)[1]}
    reset_to = [torch.randn(T, *state.shape) for state in tree_leaves(beside["hx"])]

    def resets(dtype):
        states = tuple(state.to(dtype) for state in reset_to)
        return {"reset": reset, "reset_to": states if len(states) > 1 else states[0]}

    def packed(lengths, **more):
        values = pack_padded_sequence(x, lengths, enforce_sorted=False)
        inputs = {
            name: pack_padded_sequence(value, lengths, enforce_sorted=False)
            for name, value in beside.items()
            if name != "hx"
        }
        return layer(values, beside["hx"], **inputs, **more)

    def jagged():
        sequences = [x[: max(length, 1), b] for b, length in enumerate(lengths)]
        input = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        output, states = layer(input, beside["hx"])
        return output.values(), states

    def differentiated_twice():
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf)[0].square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)

    def optimized():
        trainee = copy.deepcopy(layer)
        optimizer = torch.optim.Adam(trainee.parameters())
        for _ in range(2):
            trainee(x)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return [*trainee.parameters()]

    yield "training", partial(trained, layer, x, **beside)
    yield "transposed", partial(trained, layer, x.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    yield "expanded", lambda: trained(lambda x: layer(x)[0].mean(), x)
    yield "no rows", partial(trained, layer, x, lengths=[0] * B)
    yield "bidirectional", partial(trained, make(D, H, bidirectional=True), x)
    yield "dropout", lambda: make(D, H, num_layers=2, dropout=1.0)(x)
    yield "recompute", partial(trained, make(D, H, recompute=2), x)
    yield "float64", partial(trained, make(D, H).double(), x.double())
    yield "lengths", partial(trained, layer, x, lengths=lengths, **beside)
    yield "packed", partial(packed, lengths.clamp(min=1))
    if set(beside) == {"hx"}:
        yield "jagged", jagged
        yield "vmap", partial(torch.vmap(lambda x: layer(x)[0]), torch.stack([x, -x]))
    yield "resets", partial(trained, layer, x, **resets(torch.float32), **beside)
    yield "other reset_to", partial(trained, layer, x, **resets(BF16), **beside)
    yield "autocast", partial(under_autocast, trained, layer, x, **beside)
    yield (
        "autocast resets",
        partial(under_autocast, trained, layer, x, **resets(torch.float32), **beside),
    )
    yield "autocast packed", partial(under_autocast, packed, lengths.clamp(min=1))
    yield "by ATen", partial(by_aten, trained, layer, x, **beside)
    yield "by ATen with lengths", partial(by_aten, trained, layer, x, lengths=lengths, **beside)
    yield "last_state", partial(layer.last_state, x, lengths=lengths.clamp(min=1))
    yield "double backward", differentiated_twice
    yield "optimizer", optimized


def calls_of_modules(make, make_step_module):
    """Yields the calls that copy, convert, save or load modules, and those of step modules."""
    layer, x = make(D, H), torch.randn(T, B, D)
    cell = make_step_module(D, H)

    def saved(module):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        return torch.load(file)

    def loop():
        state = None
        for frame in x:
            state = cell(frame, state)
        return state

    def unrolled(x):
        with cell.unrolled():
            return loop()

    yield "prepare", lambda: inferred(layer.prepare(), x)
    yield "deepcopy", lambda: inferred(copy.deepcopy(layer.prepare()), x)
    yield "pickle", lambda: inferred(pickle.loads(pickle.dumps(layer.prepare())), x)
    yield "restore", lambda: [*layer.prepare().restore().parameters()]
    yield "refresh", lambda: inferred(layer.prepare().refresh, layer)
    yield "state_dict", lambda: saved(layer)
    yield "prepared state_dict", lambda: saved(layer.prepare())
    yield "load", lambda: [*make(D, H).load_state_dict(layer.state_dict())]
    yield "to bfloat16", lambda: inferred(copy.deepcopy(layer).to(BF16), x.to(BF16))
    yield "prepared to float64", lambda: inferred(layer.prepare().to(torch.float64), x.double())
    yield "step module", partial(inferred, loop)
    yield "trained step module", lambda: trained(lambda x: loop(), x)
    yield "unrolled", partial(trained, unrolled, x)
    yield "prepared step module", partial(inferred, cell.prepare(), x[0])


def calls_of_tokens(make, make_layer):
    """Yields the calls of a token layer, and of a layer with an embedding."""
    tokens, layer, ids = make(V, D, H, padding_idx=0), make_layer(D, H), torch.randint(V, (T, B))
    lengths, embedding = torch.arange(B) % T + 1, torch.randn(V, D)
    many = torch.randint(V, (T, 20 * B))  # more than the vocabulary, so the layer makes a table
    packed = pack_padded_sequence(ids, lengths, enforce_sorted=False)
    yield "ids", partial(trained, tokens, ids)
    yield "table", partial(trained, tokens, many)
    yield "inferred ids", partial(inferred, tokens, ids)
    yield "inferred table", partial(inferred, tokens, many)
    yield "packed ids", partial(tokens, packed)
    yield "ids with lengths", partial(trained, tokens, ids, lengths=lengths)
    yield "ids under autocast", partial(under_autocast, trained, tokens, ids)
    yield "ids by ATen", partial(by_aten, trained, tokens, ids)
    yield "last_state of ids", partial(tokens.last_state, ids, lengths=lengths)
    yield "prefixes", partial(inferred, tokens.last_state, many)
    yield "embedding", lambda: trained(lambda e: layer(ids, embedding=e, padding_idx=1), embedding)
    yield "prepared ids", lambda: inferred(tokens.prepare(), ids)
    yield "ids in 8 bits", lambda: inferred(tokens.prepare(torch.int8), ids)
    yield "token stream", lambda: inferred(tokens.prepare().stream(B), ids)
    yield "deepcopy of tokens", lambda: inferred(copy.deepcopy(tokens.prepare()), ids)


def calls_of_streams(prepared, beside):
    """Yields the calls of prepared layers and of their streams."""
    x = torch.randn(T, B, D)
    frame, stream = x[0], prepared.stream(B)
    step = {name: value[0] for name, value in beside.items()}
    inferred(stream, frame, **step)

    def streamed(act):
        other = stream.fork()
        return inferred(act, other), inferred(lambda: other.states)

    def assign(other):
        other.states = prepared(x)[1]

    lengths, mask = torch.arange(B) % (T + 1), torch.arange(B) % 4 != 0
    some = {name: value[mask] for name, value in step.items()}
    yield "prepared", partial(inferred, prepared, x, **beside)
    yield "prepared with lengths", partial(inferred, prepared, x, lengths=lengths, **beside)
    yield "prepared under autocast", partial(under_autocast, inferred, prepared, x)
    yield "new stream", lambda: inferred(prepared.stream(B), frame)
    yield "step", lambda: streamed(lambda other: other(frame, **step))
    yield "steps", lambda: streamed(lambda other: other(x, **beside))
    yield "transposed frame", lambda: streamed(lambda other: other(frame.T.contiguous().T))
    yield "mask", lambda: streamed(lambda other: other(frame[mask], rows=mask, **some))
    yield "out", lambda: streamed(lambda other: other(frame, out=torch.empty(H, B).T))
    yield "assigned states", lambda: streamed(assign)
    yield "reset", lambda: streamed(lambda other: other.reset())
    yield "reset of rows", lambda: streamed(lambda other: other.reset(range(0, B, 2)))
    yield "reset by mask", lambda: streamed(lambda other: other.reset(mask))
    yield "pickled stream", lambda: inferred(pickle.loads(pickle.dumps(stream)), frame)


def calls_of(name):
    """Yields the calls of a kind of layers."""
    kind = KINDS[name]
    beside = {input: torch.randn(T, B, H) for input in kind.cell.input_names}
    other = {input: rows.double() for input, rows in beside.items()}
    yield from calls_of_layers(kind.layer, other)
    yield from calls_of_modules(kind.layer, kind.step_module)
    yield from calls_of_tokens(kind.tokens, kind.layer)
    yield from calls_of_streams(kind.layer(D, H).prepare(), other)
    if kind.cell.can_project:
        yield from calls_of_layers(kind.layer, {}, proj_size=H - 1)
    x, prepared = torch.randn(T, B, D), kind.layer(D, H).prepare(torch.int8)
    yield "8 bits", partial(inferred, prepared, x)


def matches(call, wanted):
    """Returns whether a call has the given results, bit for bit, and runs on several threads."""
    pairs = zip(tree_leaves(call()), wanted, strict=True)
    same = [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]
    torch.ones(MANY).sum()
    return all(same) and len(os.listdir("/proc/self/task")) > 1


def main():
    torch.set_num_threads(2)
    number = 0
    for number, (name, call) in enumerate(calls_of(sys.argv[1]), start=1):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        wanted = tree_leaves(call())
        torch.ones(MANY).sum()  # starts the threads of the pool
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            torch.set_rng_state(state)
            os._exit(0 if matches(call, wanted) else 1)
        status = os.waitpid(child, 0)[1]
        if status:
            print(name, "hangs" if os.WIFSIGNALED(status) else "differs", flush=True)
    print(number)


if __name__ == "__main__":
    main()
