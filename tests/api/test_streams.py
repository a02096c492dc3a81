"""Tests that streams match torch's layers, also after resets, forks and refreshes."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kinds import (
    KINDS,
    flat,
    for_variants,
    map_states,
    needs_extension,
    tensors_in,
)
from layouts import check_same

from namernn_fast import batch_invariant, explain, prepared_ops
from namernn_fast.machine import availability
from namernn_fast.nn.inference import direct
from namernn_fast.nn.inference import stream as stream_module
from namernn_fast.testing import assert_within_budget

pytestmark = [needs_extension, pytest.mark.covering(1)]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=["direct", "operator", "reference"])
def way(request, monkeypatch):
    """Runs a test without torch's dispatcher, through the dispatcher, and without a kernel."""
    if request.param == "operator":
        monkeypatch.setattr(direct, "step_directly", lambda *_: False)
    if request.param == "reference":
        monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    return request.param


with_kernel = pytest.mark.parametrize("way", ["direct", "operator"], indirect=True)
"""Runs a test with the kernel, bypassing torch's dispatcher and through it."""


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def make(kind, *sizes, dtype=torch.float32, batch=4, **options):
    """Returns a layer and its stream. If dtype is int8, only the weights are in 8 bits."""
    torch.manual_seed(1)
    in_8_bits = dtype == torch.int8
    layer = kind.layer(*sizes, **options).to(torch.float32 if in_8_bits else dtype)
    return layer, layer.prepare(torch.int8 if in_8_bits else None).stream(batch)


def draw_states(kind, stream):
    """Sets the states of a stream to random values, and returns them."""
    states = map_states(stream.states, torch.randn_like)
    stream.states = states
    return states


@for_variants
@with_kernel
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_single_steps_are_bit_identical_to_a_whole_sequence(kind, way, dtype, layers, bias):
    """Bit-identical steps require batch invariance. 16-bit streams keep their states in float32."""
    layer, stream = make(kind, 7, 20, layers, bias=bias, dtype=dtype, batch_invariant=True)
    dtype = layer.weight_hh_l0.dtype
    x = torch.randn(9, 4, 7).to(dtype)
    output, last = stream._prepared(x)
    assert torch.equal(torch.stack([stream(frame) for frame in x]), output)
    for state, wanted in zip(tensors_in(stream.states), tensors_in(last), strict=True):
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(state.to(dtype), wanted)
    with torch.inference_mode():
        other = stream.fork()
        other(x[0])
    other.reset()
    assert torch.equal(other(x), output), "several steps at once"
    x = torch.randn(20, 3, 7).to(dtype)
    y = other.fork()(x, rows=[3, 0, 2])
    assert torch.equal(torch.stack([other(frame, rows=[3, 0, 2]) for frame in x]), y)


@for_variants
@pytest.mark.parametrize("sizes", [(1, 1), (3, 130), (70, 64), (300, 8)])
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 65])
def test_steps_of_any_size_keep_the_error_budget(kind, way, sizes, batch):
    layer, stream = make(kind, *sizes, batch=batch)
    hx, x = draw_states(kind, stream), torch.randn(batch, sizes[0])
    theirs = kind.nn_layer(*sizes)
    theirs.load_state_dict(layer.state_dict())
    results = [(stream(x)[None], stream.states), theirs(x[None], hx)]
    results.append(theirs.double()(x[None].double(), map_states(hx, torch.Tensor.double)))
    check_budget(map(flat, results))


def check_budget(results):
    """Checks the error budget of our results, given torch's results and torch's in float64."""
    assert_within_budget(*(dict(enumerate(tensors)) for tensors in results))


@for_variants
@pytest.mark.parametrize(
    "rows", [[0, 3], (3, 0), torch.tensor([2]), torch.tensor([3, 1]).numpy(), [], [1, 2, 3, 0]]
)
def test_only_the_requested_rows_of_a_stream_advance(kind, way, rows):
    layer, stream = make(kind, 5, 20, 2, batch_invariant=way != "reference")
    with torch.inference_mode():
        stream(torch.randn(4, 5))
    before, x = draw_states(kind, stream), torch.randn(len(rows), 5)
    alone = layer.prepare().stream(len(rows))
    alone.states = map_states(before, lambda state: state[:, rows])
    assert torch.equal(stream(x, rows=rows), alone(x))
    wanted = map_states(before, torch.Tensor.clone)
    for state, new in zip(tensors_in(wanted), tensors_in(alone.states), strict=True):
        state[:, rows] = new
    for state, expected in zip(tensors_in(stream.states), tensors_in(wanted), strict=True):
        assert torch.equal(state, expected)


@for_variants
def test_the_output_is_written_to_out(kind, way):
    """`out` may have any strides, and may be the frame itself."""
    _, stream = make(kind, 5, 20)
    x = torch.randn(4, 5)
    wanted = stream.fork()(x)
    for out in (torch.empty(wanted.shape), torch.empty(wanted.T.shape).T):
        version = out._version
        assert stream.fork()(x, out=out) is out
        assert out._version > version
        assert torch.equal(out, wanted)
    x = wanted
    _, stream = make(kind, x.shape[1], 20)
    wanted = stream.fork()(x)
    assert torch.equal(stream(x, out=x), wanted)


def test_outputs_and_returned_states_are_copies(kind, way):
    _, stream = make(kind, 5, 20)
    outputs = [stream(torch.randn(4, 5)) for _ in range(2)]
    kept = map_states(stream.states, torch.Tensor.clone)
    for tensor in (*outputs, *tensors_in(stream.states), *tensors_in(stream.fork().states)):
        tensor.fill_(9)
    given = map_states(kept, torch.Tensor.clone)
    stream.states = given
    map_states(given, lambda state: state.fill_(9))
    assert all(map(torch.equal, tensors_in(stream.states), tensors_in(kept)))


def test_frames_may_have_any_strides(kind, way):
    _, stream = make(kind, 5, 20)
    for x in (torch.randn(5, 4).t(), torch.randn(4, 9)[:, ::2], torch.randn(8, 5)[::2]):
        check_same(stream.fork()(x), stream.fork()(x.contiguous()))
    negated = torch.randn(4, 5, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert torch.equal(stream.fork()(negated), stream(negated.clone()))


def test_frames_may_be_batch_first(kind, way):
    _, stream = make(kind, 5, 20, 2, batch_first=True)
    x = torch.randn(4, 6, 5)
    y = stream.fork()(x)
    assert y.shape == (4, 6, 20)
    check_same(torch.stack([stream(frame) for frame in x.unbind(1)], 1), y)


@pytest.mark.parametrize("large", [False, True])
def test_streams_accept_token_ids(kind, way, large, monkeypatch):
    """Tests ids with a table, and with an embedding that is too large for a table."""
    if large:
        monkeypatch.setattr("namernn_fast.nn.inference.prepared.MOST_TABLE_BYTES", 1)
    torch.manual_seed(1)
    layer = kind.tokens(9, 5, 20)
    stream = layer.prepare().stream(4)
    ids = torch.randint(9, (6, 4))
    y = torch.stack([stream.fork()(ids[0]), *(stream(step) for step in ids)])[1:]
    torch.testing.assert_close(y, layer(ids)[0])
    stream.reset()
    torch.testing.assert_close(stream(ids.int()), y)
    with pytest.raises((RuntimeError, TypeError), match="token ids"):
        stream(ids[0].float())
    before = stream.states
    with pytest.raises((RuntimeError, IndexError)):
        stream(torch.tensor([0, 1, 2, 9]))
    assert all(map(torch.equal, tensors_in(stream.states), tensors_in(before)))


def test_step_modules_have_streams(kind, way):
    module = kind.step_module(5, 20)
    stream = module.prepare().stream(4)
    x, hx = torch.randn(3, 4, 5), None
    for frame, output in zip(x, stream.fork()(x), strict=True):
        hx = module(frame, hx)
        wanted = tensors_in(hx)[0]
        torch.testing.assert_close([stream(frame), output], [wanted, wanted])
    torch.testing.assert_close(stream.states, hx)


BAD_CALLS = {
    "a repeated row": ({"rows": [1, 1, 0, 2]}, RuntimeError, "distinct"),
    "a negative row": ({"rows": [0, 1, 2, -1]}, RuntimeError, "between 0 and 3"),
    "a row out of range": ({"rows": [0, 1, 2, 4]}, RuntimeError, "between 0 and 3"),
    "another mask": ({"rows": torch.tensor([True, False, True])}, ValueError, r"\(4,\).*\(3,\)"),
    "a mask of 3": ({"rows": [True, False, True, True]}, RuntimeError, r"\(3, 5\), got \(4, 5\)"),
    "tensors of a bool": ({"rows": [*torch.tensor([True, False] * 2)]}, TypeError, "integers"),
    "a row": ({"rows": torch.tensor(1)}, TypeError, "a sequence of integers, got 1"),
    "a huge row": ({"rows": [0, 1, 2, 2**70]}, RuntimeError, "between 0 and 3"),
    "rows in float": ({"rows": [0.0, 1.0, 2.0, 3.0]}, TypeError, "integers"),
    "too few rows": ({"rows": [0, 1]}, RuntimeError, r"\(2, 5\), got \(4, 5\)"),
    "another shape of out": ({"out": torch.zeros(4, 21)}, RuntimeError, r"out.*\(4, 20\).*21\)"),
    "another dtype of out": ({"out": torch.zeros(4, 20).double()}, RuntimeError, "out.*dtype"),
    "an empty out": ({"out": torch.zeros(0)}, RuntimeError, r"out.*\(4, 20\)"),
    "overlapping rows": ({"out": torch.zeros(1, 20).expand(4, 20)}, RuntimeError, "memory"),
    "a list as out": ({"out": [0.0]}, TypeError, "out"),
    "too many features": ({"frame": torch.zeros(4, 6)}, RuntimeError, r"\(4, 5\), got \(4, 6\)"),
    "too few sequences": ({"frame": torch.zeros(3, 5)}, RuntimeError, r"\(4, 5\), got \(3, 5\)"),
    "no steps": ({"frame": torch.zeros(0, 4, 5)}, RuntimeError, "at least one step"),
    "too few dimensions": ({"frame": torch.zeros(5)}, RuntimeError, "dimensions"),
    "another dtype": ({"frame": torch.zeros(4, 5).double()}, RuntimeError, "frame.*dtype"),
    "token ids": ({"frame": torch.zeros(4, 5).long()}, RuntimeError, "frame.*dtype"),
    "an array": ({"frame": torch.zeros(4, 5).numpy()}, TypeError, "frame must be a Tensor"),
    "another device": ({"frame": torch.zeros(4, 5, device="meta")}, RuntimeError, ""),
}


@with_kernel
@pytest.mark.parametrize("case", BAD_CALLS)
def test_an_invalid_call_leaves_the_states_unchanged(kind, way, case):
    changed, error, message = BAD_CALLS[case]
    _, stream = make(kind, 5, 20, 2)
    before = draw_states(kind, stream)
    with pytest.raises(error, match=message):
        stream(**{"frame": torch.randn(4, 5), **changed})
    assert all(map(torch.equal, tensors_in(stream.states), tensors_in(before)))


BAD_ROWS = {
    "in float": torch.tensor([0.0, 1.0]),
    "a matrix": torch.tensor([[0], [1]]),
    "a number": torch.tensor(1),
    "repeated": torch.tensor([1, 1]),
    "negative": torch.tensor([0, -1]),
    "excessive": torch.tensor([0, 4]),
    "uint8": torch.tensor([0, 1, 0, 0], dtype=torch.uint8),
}
INTEGERS = np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64
for_backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)


MASKS = {
    "tensor": torch.tensor([True, False, True, False]),
    "array": np.array([True, False, True, False]),
    "list": [True, False, True, False],
    "nothing": torch.zeros(4, dtype=torch.bool),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("resets", [True, False], ids=["reset", "step"])
def test_rows_may_be_a_mask(kind, way, case, resets):
    _, stream = make(kind, 5, 20, 2)
    draw_states(kind, stream)
    other, compiled, mask = stream.fork(), stream.fork(), MASKS[case]
    rows = [row for row, is_chosen in enumerate(mask) if is_chosen]
    x = torch.randn(len(rows), 5)

    def act(stream, rows):
        return stream.reset(rows) if resets else stream(x, rows=rows)

    def check(output, states):
        results = [*tensors_in(output), *tensors_in(states)]
        for pair in zip(results, [*tensors_in(wanted), *tensors_in(other.states)], strict=True):
            check_same(*pair)

    wanted = act(other, rows)
    check(act(stream, mask), stream.states)
    with pytest.raises(ValueError, match=r"a mask of shape \(4,\), got a mask of shape \(3,\)"):
        act(stream, mask[:3])
    if case == "tensor":
        torch._dynamo.reset()
        run = torch.compile(act, fullgraph=True, backend="aot_eager")
        check(run(compiled, mask), compiled.states)
        if not resets:
            with pytest.raises(RuntimeError, match="a mask with 2 True"):
                run(compiled, torch.ones(4, dtype=torch.bool))


@for_backends
@pytest.mark.parametrize("case", BAD_ROWS)
def test_compiled_calls_reject_invalid_rows(kind, case, backend):
    _, stream = make(kind, 5, 20, 2)
    x, rows, before = torch.randn(2, 5), BAD_ROWS[case], draw_states(kind, stream)
    with pytest.raises((RuntimeError, TypeError)) as wanted:
        stream.reset(rows)
    for call in (lambda rows: stream.reset(rows), lambda rows: stream(x, rows=rows)):
        torch._dynamo.reset()
        with pytest.raises(wanted.type) as raised:
            torch.compile(call, fullgraph=True, backend=backend)(rows)
        assert str(raised.value) == str(wanted.value)
        assert all(map(torch.equal, tensors_in(stream.states), tensors_in(before)))


@pytest.mark.parametrize("rows", [[True, False], [0.0, 1.0], [1, 1], [0, -1], [0, 4]])
def test_compiled_calls_reject_invalid_lists_of_rows(kind, rows):
    """Some calls fail during compilation. The compiler's error then repeats our message."""
    _, stream = make(kind, 5, 20)
    before = draw_states(kind, stream)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="rows must be"):
        torch.compile(lambda: stream.reset(rows), fullgraph=True, backend="aot_eager")()
    assert all(map(torch.equal, tensors_in(stream.states), tensors_in(before)))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_rows_may_be_an_array_of_any_integers(kind, dtype):
    _, stream = make(kind, 5, 20)
    other, x = stream.fork(), torch.randn(2, 5)
    rows = np.array([3, 1], dtype)
    assert torch.equal(stream(x, rows=rows), other(x, rows=[3, 1]))
    stream.reset(rows)
    other.reset([3, 1])
    assert all(map(torch.equal, tensors_in(stream.states), tensors_in(other.states)))


def test_invalid_states_and_repeated_rows_raise_an_error(kind, way):
    _, stream = make(kind, 5, 20, 2)
    for states in (None, torch.zeros(2, 3, 20), (torch.zeros(2, 4, 20),) * 3, 1):
        with pytest.raises(RuntimeError, match="states must have"):
            stream.states = states
    for call in (stream.reset, lambda rows: stream(torch.randn(2, 5), rows=rows)):
        with pytest.raises(RuntimeError, match="distinct"):
            call([0, 0])


def test_unsupported_uses_of_streams_raise_errors(kind):
    layer, stream = make(kind, 5, 20)
    x = torch.randn(4, 5)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="no gradients"):
            stream(x.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="no gradients"):
            stream(x, out=torch.zeros(4, 20).requires_grad_())
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(stream)(x[None])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.jvp(lambda x: stream(x), (x,), (x,))
    with pytest.raises(RuntimeError, match="exported"):
        torch.jit.trace(lambda x: stream(x), (x,))
    with pytest.raises(ValueError, match="one direction"):
        kind.layer(5, 20, bidirectional=True).prepare().stream(4)
    for batch in (-1, 1.0, None, True):
        with pytest.raises(ValueError, match="batch"):
            layer.prepare().stream(batch)
    projecting = KINDS["lstm"].layer(5, 20, proj_size=3).prepare().stream(4)
    for other in (stream, projecting):
        other._prepared.double()
        with pytest.raises(RuntimeError, match="converted"):
            other(x.double())


@pytest.mark.drop_in
@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("group", [tuple, list])
def test_step_modules_reject_the_same_states_on_both_paths(kind, group, count):
    """The inference fast path accepts the same states as the path for training."""
    module, x = kind.step_module(5, 20), torch.randn(4, 5)
    hx = group(torch.zeros(4, 20) for _ in range(count))
    if kind.name == "lstm" and count == 2:
        torch.testing.assert_close(module(x, hx), module(x))
        return
    with torch.enable_grad(), pytest.raises((RuntimeError, TypeError)) as wanted:
        module(x, hx)
    for each in (module, module.prepare()):
        with pytest.raises(wanted.type) as raised:
            each(x, hx)
        assert str(raised.value) == str(wanted.value)


def test_step_modules_accept_strided_states_and_negated_weights(kind):
    module, x = kind.step_module(5, 20), torch.randn(4, 5)
    hx = kind.states(torch.randn, 4, 50)
    hx = map_states(hx, lambda state: state[:, 7:27])
    dense = map_states(hx, torch.Tensor.contiguous)
    torch.testing.assert_close(module(x, hx), module(x, dense), rtol=0, atol=0)
    prepared = module.prepare()
    torch.testing.assert_close(prepared(x, hx), prepared(x, dense), rtol=0, atol=0)
    negated = torch.randn(*module.weight_hh.shape, dtype=torch.complex64).conj().imag
    module.weight_hh = torch.nn.Parameter(negated, requires_grad=False)
    theirs = kind.nn_step_module(5, 20)
    theirs.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    torch.testing.assert_close(module(x, dense), theirs(x, dense))


def test_plain_calls_bypass_torchs_dispatcher(kind, monkeypatch):
    _, stream = make(kind, 5, 20)
    tokens = kind.tokens(9, 5, 20).prepare().stream(4)
    cell = kind.step_module(5, 20).prepare()
    for name in ("step", "forward", "forward_untraced"):
        monkeypatch.setattr(prepared_ops, name, None)
    monkeypatch.setattr(stream_module, "step", None)
    monkeypatch.setattr(direct, "KERNEL", "avx2")
    calls = []
    run = direct.step_directly
    monkeypatch.setattr(
        direct, "step_directly", lambda *each: calls.append(run(*each)) or calls[-1]
    )
    x = torch.randn(4, 5)
    stream(x)
    stream(x[:2], rows=[1, 0], out=torch.empty(2, 20))
    tokens(torch.randint(9, (4,)))
    for module in (cell, kind.step_module(5, 20, bias=False), kind.step_module(5, 20)):
        module(x, module(x))
    assert calls == [True] * 9


def test_dispatch_modes_and_profilers_see_the_operator(kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    _, stream = make(kind, 5, 20)
    x = torch.randn(4, 5)
    with Seen():
        stream(x)
    assert "namernn_fast::step" in Seen.names
    with torch.profiler.profile() as profile:
        stream(x)
    assert "namernn_fast::step" in {event.name for event in profile.events()}


@for_backends
def test_streams_can_be_compiled(kind, backend):
    torch._dynamo.reset()  # Dynamo limits how often it compiles `advance`
    _, stream = make(kind, 5, 20, 2)
    x, out = torch.randn(6, 4, 5), torch.zeros(4, 20)
    other = stream.fork()

    def advance(x):
        stream.reset(torch.tensor([1]))
        stream.reset([])
        return stream(x[0]) + stream(x[1], out=out), stream(x[2, :2], rows=torch.tensor([3, 0]))

    found = torch.compile(advance, fullgraph=True, backend=backend)(x)
    other.reset([1])
    first, second, third = other(x[0]), other(x[1]), other(x[2, :2], rows=[3, 0])
    torch.testing.assert_close(found, (first + second, third))
    torch.testing.assert_close(out, second)
    torch.testing.assert_close(stream.states, other.states)


def test_the_schema_marks_the_states_as_mutable():
    schema = torch.ops.namernn_fast.step.default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert written == ["states"]
    assert all(result.alias_info is None for result in schema.returns)
    panels = KINDS["lstm"].layer(5, 20, proj_size=3).prepare()._panels
    states = [torch.zeros(1, 4, 3), torch.zeros(1, 4, 20)]
    rest = torch.randn(4, 5), torch.arange(4), (), panels.options
    arguments = panels.cell.number, panels.tensor, states, *rest
    torch.library.opcheck(torch.ops.namernn_fast.step.default, arguments)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    torch.library.opcheck(torch.ops.namernn_fast.checked_rows.default, (rows, 4))


def test_the_step_operator_rejects_invalid_tensors():
    panels = KINDS["gru"].layer(5, 20).prepare()._panels
    states, x, options = torch.zeros(1, 4, 20), torch.randn(4, 5), panels.options
    run = torch.ops.namernn_fast.step
    others = torch.zeros(10**5), torch.zeros(2), panels.tensor[:-8], panels.tensor.double()
    for prepared in others:
        with pytest.raises(RuntimeError, match="prepared must come from"):
            run(panels.cell.number, prepared, [states], x, None, (), options)
    transposed = torch.zeros(1, 20, 4).mT
    for wrong in ([], [states[0]], [states.double()], [states] * 2, [states] * 3, [transposed]):
        with pytest.raises(RuntimeError, match=r"states? must"):
            run(panels.cell.number, panels.tensor, wrong, x, None, (), options)


def test_explain_describes_streams(kind, way):
    _, stream = make(kind, 5, 20)
    assert explain(stream, torch.randn(4, 5)) == explain(stream._prepared, torch.randn(1, 4, 5))
    cells = kind.step_module(5, 20).prepare()
    assert explain(cells.stream(4), torch.randn(4, 5)) == explain(cells, torch.randn(4, 5))
    tokens = kind.tokens(9, 5, 20).prepare()
    ids = torch.randint(9, (1, 4))
    assert explain(tokens.stream(4), ids[0]) == explain(tokens, ids)


def test_streams_can_be_copied(kind):
    _, stream = make(kind, 5, 20, 2)
    draw_states(kind, stream)
    x = torch.randn(4, 5)
    copies = [stream.fork(), copy.copy(stream), copy.deepcopy(stream)]
    copies.append(pickle.loads(pickle.dumps(stream)))
    wanted = stream(x)
    for other in copies:
        assert torch.equal(other(x), wanted)
    assert copies[0]._prepared is copies[1]._prepared is stream._prepared


def test_threads_may_use_separate_streams(kind):
    _, stream = make(kind, 64, 64, 2)
    x = torch.randn(200, 4, 64)

    def run(_):
        with torch.no_grad():
            own = stream.fork()
            return torch.stack([own(frame) for frame in x])

    wanted = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(run, range(4)))


def test_a_forked_process_can_continue_a_stream(kind):
    _, stream = make(kind, 5, 20)
    x = torch.randn(4, 5)
    stream(x)
    wanted = stream.fork()(x).tolist()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    child = context.Process(target=lambda: sender.send(stream(x).tolist()))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == wanted
    child.join()
    assert stream(x).tolist() == wanted


@with_kernel
def test_streams_can_be_batch_invariant(kind, way):
    _, stream = make(kind, 70, 64, batch=13)
    x = torch.randn(13, 70)
    with batch_invariant():
        whole = stream.fork()(x)
        for row in range(13):
            assert torch.equal(stream(x[row : row + 1], rows=[row])[0], whole[row])


class PlainStream:
    """A stream implemented with torch's layer."""

    def __init__(self, kind, layer, batch, dtype):
        self.dtype = dtype
        self.layer = kind.nn_layer(
            layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias, dtype=dtype
        )
        self.refresh(layer)
        self.states = kind.states(
            torch.zeros, layer.num_layers, batch, layer.hidden_size, dtype=dtype
        )

    def refresh(self, layer):
        self.layer.load_state_dict(layer.state_dict())

    def reset(self, rows):
        for state in tensors_in(self.states):
            state[:, rows] = 0

    def advance(self, frames, rows):
        of_rows = map_states(self.states, lambda state: state[:, rows])
        output, new = self.layer(frames.to(self.dtype), of_rows)
        for state, update in zip(tensors_in(self.states), tensors_in(new), strict=True):
            state[:, rows] = update
        return output


@pytest.mark.covering(0)
@pytest.mark.parametrize("part", range(20))
def test_random_operations_keep_streams_within_the_error_budget(kind, part):
    """Runs random sequences of steps, resets, forks and refreshes: 2,040 in `make test-all`."""
    for seed in range(34 * part, 34 * part + 34):
        run_random_operations(kind, torch.Generator().manual_seed(seed))


def run_random_operations(kind, generator):
    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    size, hidden, layers, batch = 1 + pick(20), 1 + pick(40), 1 + pick(3), 1 + pick(9)
    torch.manual_seed(pick(2**30))
    layer = kind.layer(size, hidden, layers, bias=bool(pick(2)))
    stream = layer.prepare().stream(batch)
    others = [PlainStream(kind, layer, batch, dtype) for dtype in (torch.float32, torch.float64)]

    def check(y, frames, rows):
        check_budget([[y], *([each.advance(frames, rows)] for each in others)])

    for _ in range(10):
        rows = torch.randperm(batch, generator=generator)[: 1 + pick(batch)].tolist()
        match pick(5):
            case 0:
                for each in (stream, *others):
                    each.reset(rows)
            case 1:
                used, stream = stream, stream.fork()
                used(torch.randn(batch, size))
            case 2:
                layer = copy.deepcopy(layer)
                map_states(tuple(layer.parameters()), lambda weight: weight.mul_(0.9))
                stream._prepared.refresh(layer)
                for each in others:
                    each.refresh(layer)
            case 3:
                x = torch.randn(1 + pick(4), len(rows), size)
                check(stream(x, rows=rows), x, rows)
            case 4:
                x = torch.randn(len(rows), size)
                y = stream(x, rows=rows, out=None if pick(2) else torch.empty(len(rows), hidden))
                check(y[None], x[None], rows)
    check_budget(tensors_in(each.states) for each in (stream, *others))
