"""Tests launches, streams and autotune without running kernels."""

import contextlib
import functools

import operators
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from namernn_fast import gpu, ops, rnn  # noqa: E402
from namernn_fast.cells import VANILLA  # noqa: E402
from namernn_fast.gpu import (  # noqa: E402
    device,
    launching,
    plan,
    problem,
    stack,
    tuning,
)
from namernn_fast.machine import transfers  # noqa: E402

pytestmark = pytest.mark.usefixtures("h100")


class FakeCuda:
    """Replaces `torch.cuda` by a fake with two GPUs. GPU 1 is capturing its current stream."""

    def __init__(self, monkeypatch):
        self.current = 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.enter)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == 1)

    @contextlib.contextmanager
    def enter(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_graph_capture_is_detected_for_each_gpu_separately(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert not transfers.is_capturing(torch.device("cuda"))
    assert not transfers.is_capturing(torch.device("cuda", 0))
    assert transfers.is_capturing(torch.device("cuda", 1))
    assert not transfers.is_capturing(torch.device("cpu"))
    cuda.current = 1
    assert transfers.is_capturing(torch.device("cuda"))
    assert not transfers.is_capturing(torch.device("cuda", 0))


@pytest.mark.parametrize("lengths", [[5, 2], torch.tensor([5, 2], dtype=torch.int32)], ids=type)
def test_lengths_on_the_cpu_are_rejected_during_graph_capture(lengths, monkeypatch):
    FakeCuda(monkeypatch)
    sizes = ((6, 4), (6, 6), (6,), (6,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, *weights = (torch.empty(size, device="cuda:1") for size in ((5, 2, 4), *sizes))
        with pytest.raises(
            RuntimeError, match=r"lengths must be a tensor on cuda:1 while .*\.to\("
        ):
            rnn(x, None, weights, lengths=lengths)


TOO_LARGE = "Triton Error [CUDA]: too many blocks in cooperative launch"
NOT_SUPPORTED = "Triton Error [CUDA]: operation not supported"


class Launches(list):
    """Records how many programs cooperate in each launch. `error` makes such launches fail."""

    def __init__(self, monkeypatch, error=None):
        self.error = error
        monkeypatch.setattr(launching, "run", self.run)

    def run(self, kernel, grid, arguments, settings):
        if "FORM" in arguments:
            self.append(arguments["FORM"].MEMBERS)
            if self.error and settings["launch_cooperative_grid"]:
                raise RuntimeError(self.error)


def train(calls=1):
    """Runs forward and backward passes on fake tensors, with a cooperative plan for an H100."""
    with FakeTensorMode():
        sizes = ((3, 1, 4), (1024, 4), (1024, 1024))
        x, *weights = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        for _ in range(calls):
            call = (VANILLA.number, x, (), weights, None, None, 0, 0)
            output, last_states, saved = gpu.forward(
                ops.ForwardArguments(*operators.arguments(*call))
            )
            results = output, saved, output, last_states
            gpu.backward(
                ops.BackwardArguments(*operators.backward_arguments(*call, *results, [True], [0]))
            )


@pytest.mark.parametrize("error", [TOO_LARGE, NOT_SUPPORTED])
def test_a_rejected_cooperative_launch_is_repeated_with_another_plan(error, monkeypatch):
    launches = Launches(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=f"refused a cooperative .*{error[-20:]}") as warned:
        train(calls=2)
    assert len(warned) == 1
    assert launches[0] > 1
    assert launches[1:] == [1] * 4


def test_launch_errors_other_than_rejections_are_raised(monkeypatch):
    Launches(monkeypatch, "Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train()
    assert device.device_of(torch.empty(0)).cooperative


class Stream:
    """A fake CUDA stream, which records its commands in order."""

    def __init__(self, name):
        self.name, self.commands = name, []

    def wait_event(self, event):
        self.commands.append(f"wait for {event.at}")

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def record_event(self):
        event = Event()
        event.record(self)
        return event


class Event:
    """A fake CUDA event, which stores the stream and the position at which it was recorded."""

    def record(self, stream):
        self.at = f"{stream.name} {len(stream.commands)}"


@pytest.fixture
def on(monkeypatch):
    """Provides a function that launches a cooperative kernel on a fake stream."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(launching, "is_capturing", lambda device: False)
    monkeypatch.setattr(launching, "_last", {})

    def launch(stream, index=0):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        with launching.turn(torch.device("cuda", index)):
            stream.commands.append("kernel")

    return launch


def test_cooperative_kernels_of_two_streams_take_turns(on):
    first, second = Stream("first"), Stream("second")
    for stream in (first, first, second, second, first):
        on(stream)
    assert first.commands == ["kernel", "kernel", "wait for second 3", "kernel"]
    assert second.commands == ["wait for first 2", "kernel", "kernel"]
    on(second, index=1)
    assert second.commands[-2:] == ["kernel", "kernel"]  # turns are per device


def test_streams_that_share_a_turn_do_not_wait_for_each_other(on):
    main, below, above, other = (Stream(name) for name in ("main", "below", "above", "other"))
    on(other)
    launching.share_turn(torch.device("cuda", 0), main, [below, above])
    for stream in (below, above, below, main, other):
        on(stream)
    assert main.commands == ["wait for other 1", "kernel"]
    assert (below.commands, above.commands) == (["kernel", "kernel"], ["kernel"])
    assert other.commands[1:-1] == ["wait for main 2", "wait for below 2", "wait for above 1"]


def test_cooperative_kernels_do_not_wait_during_graph_capture(on, monkeypatch):
    first, second = Stream("first"), Stream("second")
    on(first)
    monkeypatch.setattr(launching, "is_capturing", lambda device: True)
    on(second)
    assert second.commands == ["kernel"]
    assert launching._last[torch.device("cuda", 0)].keys() == {first}


def stack_of(seq_len=1024, batch=16, hidden_size=128, options=ops.BIAS):
    layout = problem.SequenceLayout(seq_len, batch, seq_len * batch, batch, 1)
    return problem.Stack(layout, None, [], options, 1, hidden_size)


def test_layers_of_long_sequences_run_concurrently_if_all_programs_fit():
    def stretches(num_layers=2, **sizes):
        return stack._stretches(stack_of(**sizes), num_layers, torch.empty(0))

    found = stretches()
    assert len(found) == 8
    assert [(s.begin, s.end, s.layout.T) for s in found[:2]] == [(0, 2048, 128), (2048, 4096, 128)]
    assert found[-1].end == 1024 * 16
    assert [s.layout.T for s in stretches(seq_len=300)] == [150, 150]
    for sizes in (
        {"num_layers": 1},
        {"seq_len": 255},
        {"batch": 2000},  # one layer alone fills the device
        {"batch": 0},
        *({"options": o} for o in (ops.BATCH_FIRST, ops.PACKED, ops.JAGGED, ops.BIDIRECTIONAL)),
    ):
        (whole,) = stretches(**sizes)
        assert (whole.begin, whole.end) == (0, whole.layout.N)


def test_the_stream_of_a_layer_waits_for_the_layer_below(monkeypatch):
    main, below, above = streams = [Stream(name) for name in ("main", "below", "above")]
    current = [main]

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(stack, "_streams", lambda device, count: streams[1:])

    def task(name):
        current[-1].commands.append(name)

    def run(then):
        with stack._AtOnce(torch.empty(0), 2, cooperative=False) as schedule:
            for stretch in ("first", "second"):
                schedule.run(0, None, functools.partial(task, stretch))
                schedule.run(1, 0, functools.partial(task, stretch))
            schedule.finish(functools.partial(task, "at last"))
            then()

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail)
    assert below.commands == ["wait for main 0", "first", "second"]
    assert above.commands == [
        *("wait for main 0", "wait for below 2", "first"),
        *("wait for below 3", "second"),
    ]
    assert main.commands == ["wait for below 3", "wait for above 5"]
    run(lambda: None)
    assert main.commands[-1] == "at last"


def test_concurrent_cooperative_layers_share_a_turn(monkeypatch):
    shared = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(stack, "_streams", lambda device, count: [])
    monkeypatch.setattr(launching, "share_turn", lambda *args: shared.append(args))
    like = torch.empty(0, dtype=torch.bfloat16)
    for hidden_size, cooperative in ((128, False), (1024, True)):
        layers = stack_of(512, 1, hidden_size)
        parts = stack._stretches(layers, 2, like)
        assert len(parts) > 1
        with stack._schedule(layers, parts, 2, like):
            assert len(shared) == cooperative


def autotune(hidden_size, **more):
    return gpu.autotune(torch.empty(5, 1, 8, dtype=torch.bfloat16), hidden_size, **more)


def test_autotune_keeps_the_fastest_plan_that_fits(monkeypatch):
    launches = Launches(monkeypatch)
    like = torch.empty(0, dtype=torch.bfloat16)
    other = plan.plan_of(128, 2, like, 1)
    tried = []

    def measure(call):
        tried.append(plan.plan_of(128, 1, like, 2))
        call()
        assert len(launches) == 2 * len(tried)  # both passes
        if len(tried) == 1:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")
        return 1.0 if len(tried) == 3 else 2.0

    best = autotune(128, bidirectional=True, measure=measure)
    assert tried == tuning._candidates(plan.size_of(128, 1, like, 2))
    assert best == tried[2] == plan.plan_of(128, 1, like, 2)
    assert plan.plan_of(128, 2, like, 1) == other


def test_autotune_times_without_graphs_if_one_cannot_be_captured(monkeypatch):
    """Autotune then warns, and times all plans without graphs to make the times comparable."""
    graphs, calls = [], []

    def capture(call):
        graphs.append(call)
        if len(graphs) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 0.0

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", capture)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call: calls.append(call) or len(calls))
    with pytest.warns(RuntimeWarning, match=r"could not capture a CUDA graph \(operation not perm"):
        best = autotune(128)
    candidates = tuning._candidates(plan.size_of(128, 1, torch.empty(0).bfloat16(), 1))
    assert len(calls) == len(candidates)
    assert best == candidates[0]


def test_autotune_restarts_after_a_rejected_launch(monkeypatch):
    launches = Launches(monkeypatch, TOO_LARGE)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda call: call() or 1.0)
    with pytest.warns(RuntimeWarning, match="refused a cooperative launch"):
        best = autotune(1024)
    assert launches[0] > 1
    assert best.members == 1
    assert {found.members for found in plan.tuned.values()} == {1}
