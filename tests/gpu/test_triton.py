"""GPUs, without one: the kernels interpreted and compiled, the plan, and what is refused."""

import ast
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from namernn_fast import FusedRNN, availability, explain, fp32_precision, ops

triton = pytest.importorskip("triton")

from benchmarks.gpu import resources as gpu_report  # noqa: E402
from benchmarks.harness.paths import GPU_REPORT  # noqa: E402
from namernn_fast import gpu  # noqa: E402
from namernn_fast.gpu import kernels, launching, plan, problem, stack, stepwise, sums  # noqa: E402
from namernn_fast.gpu.plan import choose  # noqa: E402

DEVICES = {device.arch: device for device in gpu_report.DEVICES}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_is_known_of_a_gpu():
    ops.gpu_backend.cache_clear()
    yield
    ops.gpu_backend.cache_clear()


def test_interpreted_kernels():
    """The tests in tests/gpu/interpreted pass, in a process whose Triton interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- The plan ----


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", availability.TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_every_hidden_unit_is_computed_and_every_program_fits(arch, dtype, tf32):
    device = DEVICES[arch]
    for hidden_size in (*range(1, 600), 1000, 1024, 1500, 2048, 3333, 4096, 5000, 8192):
        for batch, directions in ((1, 1), (1, 2), (7, 2), (64, 1), (300, 1), (5000, 2)):
            config = choose(hidden_size, batch, dtype, device, directions=directions, tf32=tf32)
            assert config.members * config.tiles * config.block_n >= hidden_size
            blocks = -(-batch // config.block_b) * directions
            if config.members > 1:  # they wait for each other
                assert config.members * blocks <= device.meeting
            if config.kind != "streamed":
                assert config.tiles == 1
                assert config.block_k >= hidden_size
            assert config.block_k % config.parts == 0
            assert config.warps * device.lanes <= 1024


@pytest.mark.parametrize("arch", DEVICES)
def test_every_grid_can_be_launched(arch, monkeypatch):
    """CUDA takes 2**31 - 1 programs on the first axis of a grid, and 65,535 on the others."""
    monkeypatch.setattr("namernn_fast.gpu.device.find_device", lambda index: DEVICES[arch])
    monkeypatch.setattr(stepwise, "suits", lambda *_: False)  # kernels alone have grids here
    grids = []
    monkeypatch.setattr(launching, "run", lambda kernel, grid, *_: grids.append(grid))
    sizes = itertools.product((1, 64, 128, 129, 1024, 4096), (1, 3, 65_535, 65_536, 2**20))
    for (hidden_size, batch), directions, dtype in itertools.product(
        sizes, (1, 2), (torch.float32, torch.bfloat16)
    ):
        with FakeTensorMode():
            weights = [torch.empty(hidden_size, n, dtype=dtype) for n in (2, hidden_size)]
            x = torch.empty(1, batch, 2, dtype=dtype)
            options = ops.BIDIRECTIONAL if directions == 2 else 0
            call = (x, None, weights * directions, None, None, options)
            output, h_n, _ = gpu.rnn_forward(*call)
            gpu.rnn_backward(output, h_n, *call[:3], output, [], *call[3:], True, False, [0])
            rows, ids = torch.empty(batch, hidden_size), torch.empty(batch, dtype=torch.int64)
            sums.sums_by_token(rows, ids, 2**20)
    assert len(grids) >= 3 * 6 * 5 * 2 * 2  # and products of both passes, where they are kernels
    for grid in grids:
        assert 0 < grid[0] < 2**31
        assert all(0 < programs < 2**16 for programs in grid[1:])


def test_the_kind_of_plan_follows_the_size():
    h100, mi300 = DEVICES["sm_90"], DEVICES["gfx942"]

    def kind(hidden_size, batch, device=h100, dtype=torch.bfloat16, **more):
        return choose(hidden_size, batch, dtype, device, **more).kind

    assert kind(256, 1) == "resident"
    assert kind(256, 5000) == "resident"
    assert kind(256, 1, mi300) == "streamed"  # MI300 has less memory, and no program waits there
    assert kind(1024, 1) == "cooperative"
    assert kind(1024, 5000) == "streamed"  # more programs than the GPU can run at once
    assert kind(4096, 1) == "streamed"
    assert kind(128, 1, dtype=torch.float32) == "resident"
    assert kind(256, 1, dtype=torch.float32) == "cooperative"
    assert kind(256, 1, dtype=torch.float32, tf32=True) == "cooperative"


def test_streamed_tiles_grow_with_the_work():
    h100 = DEVICES["sm_90"]

    def tile(hidden_size, batch, dtype, **more):
        config = choose(hidden_size, batch, dtype, h100, **more)
        assert config.kind == "streamed"
        return config.block_b, config.block_n, config.members, config.tiles

    # As many programs as there are processors, rather than large tiles.
    assert tile(4096, 1, torch.bfloat16) == (16, 32, 128, 1)
    assert tile(1024, 64, torch.float32) == (16, 32, 32, 1)
    # With more work than that, those that read the least, or have the least overhead.
    assert tile(2048, 512, torch.bfloat16) == (64, 128, 16, 1)
    assert tile(2048, 512, torch.float32, tf32=True) == (64, 64, 16, 2)
    assert tile(1024, 4096, torch.float32) == (32, 64, 1, 16)


def test_autotune_keeps_the_fastest(monkeypatch, nothing_tuned):
    monkeypatch.setattr("namernn_fast.gpu.device.find_device", lambda index: DEVICES["sm_90"])
    input = torch.empty(5, 64, 8)
    chosen = plan.plan_of(128, 64, input, 1)
    tried = []

    def measure(call):
        tried.append(plan.plan_of(128, 64, input, 1))
        if len(tried) == 1:
            raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")
        return 1.0 if tried[-1].warps == 16 else 2.0

    best = gpu.autotune(input, 128, measure=measure)
    assert best in tried[1:]
    assert best.warps == 16
    assert len(set(tried)) == len(tried) > 2
    assert plan.plan_of(128, 64, input, 1) == best
    assert plan.plan_of(128, 65, input, 1) == chosen


# ---- Layers at the same time ----


def stretches(num_layers=2, seq_len=1024, batch=16, hidden_size=128, options=ops.BIAS):
    layout = problem.SequenceLayout(
        *(None, None, None, None, seq_len, batch, seq_len * batch, batch, 1)
    )
    layers = problem.Stack(layout, None, [], options, 1, hidden_size)
    return stack._stretches(layers, num_layers, torch.empty(0))


def test_long_layers_that_leave_room_run_at_once(monkeypatch):
    monkeypatch.setattr("namernn_fast.gpu.device.find_device", lambda index: DEVICES["sm_90"])
    found = stretches()
    assert len(found) == 8
    assert [(s.begin, s.end, s.layout.T) for s in found[:2]] == [(0, 2048, 128), (2048, 4096, 128)]
    assert found[-1].end == 1024 * 16
    assert [s.layout.T for s in stretches(seq_len=300)] == [150, 150]
    for alone in (
        {"num_layers": 1},
        {"seq_len": 255},
        {"batch": 2000},  # of which one layer fills the device
        {"batch": 0},
        *({"options": o} for o in (ops.BATCH_FIRST, ops.PACKED, ops.JAGGED, ops.BIDIRECTIONAL)),
    ):
        (whole,) = stretches(**alone)
        assert (whole.begin, whole.end) == (0, whole.layout.N)


class Stream:
    """What a stream is told, in the order of the telling."""

    def __init__(self, name):
        self.name, self.told = name, []

    def wait_stream(self, other):
        self.told.append(("wait", other.name, len(other.told)))

    def wait_event(self, event):
        self.told.append(("wait", *event))

    def record_event(self):
        return self.name, len(self.told)


def test_streams_wait_for_each_other(monkeypatch):
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
        current[-1].told.append(name)

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
    assert below.told == [("wait", "main", 0), "first", "second"]
    assert above.told == [
        *(("wait", "main", 0), ("wait", "below", 2), "first"),
        *(("wait", "below", 3), "second"),
    ]
    assert main.told == [("wait", "below", 3), ("wait", "above", 5)]
    run(lambda: None)
    assert main.told[-1] == "at last"


# ---- Compiled ahead of time ----


def test_no_variable_of_a_loop_begins_as_a_mere_name_of_another():
    """The interpreter, which runs Python, does not show what Triton makes of `before = now`."""
    loops = 0
    files = sorted(Path(kernels.__file__).parent.glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        names = {}  # whether each variable was given the value of another one, or a field
        for node in function.body:
            if isinstance(node, ast.For):
                loops += 1
                changed = {
                    name.id
                    for name in ast.walk(node)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                }
                wrong = {name for name in changed if names.get(name)}
                assert not wrong, f"{function.name}: {wrong}"
            for inner in ast.walk(node):
                if isinstance(inner, ast.Assign):
                    for target in inner.targets:
                        for name, value in assigned(target, inner.value):
                            names[name] = isinstance(value, ast.Name | ast.Attribute)
    assert loops >= 5


def assigned(target, value):
    """Yields each variable that an assignment changes, with what it is assigned."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
        for one, of in zip(target.elts, values, strict=True):
            yield from assigned(one, of)


@pytest.mark.parametrize(
    ("kernel", "name", "size"),
    [
        ("forward", "place_before", (4096, 64)),  # streamed
        ("forward", "place_before", (1024, 64)),  # cooperative
        ("backward", "row_before", (256, 64)),  # resident
        ("backward", "row_before", (1024, 64)),
    ],
)
def test_the_loop_over_time_carries_the_place_before(kernel, name, size, monkeypatch):
    text = compiled_text(kernel, *size, torch.bfloat16, monkeypatch, "ttir")
    (over_time,) = re.findall(r"scf.for %s(?:_\d+)? = .* iter_args\((.*?)\)", text)
    assert f"%{name} = " in over_time


def test_one_thread_polls_at_the_barrier(monkeypatch):
    """The thread that polls has the others wait at a barrier, and hands the count to them."""
    ptx = compiled_text("forward", 1024, 1, torch.float32, monkeypatch, "ptx")
    by_one = r"@%p\d+ red\.global\.gpu\.release\.add.*?bar\.sync.*?@%p\d+ ld\.global\.gpu\.acquire"
    assert re.search(by_one + r".*?st\.shared.*?bar\.sync.*?ld\.shared", ptx, re.DOTALL)
    assert "ld.volatile" not in ptx


@pytest.mark.parametrize("kernel", gpu_report.KERNELS)
@pytest.mark.parametrize("size", [(128, 64), (256, 4), (512, 1)], ids=str)
def test_one_sequence_is_summed_within_threads(kernel, size, monkeypatch):
    """With all threads along the units that are summed over, each sum takes shuffles of its own."""
    ptx = compiled_text(kernel, *size, torch.float32, monkeypatch, "ptx")
    assert 0 < len(re.findall(r"shfl\.sync", ptx)) <= 16


def compiled_text(kernel, hidden_size, batch, dtype, monkeypatch, stage):
    """Returns what a stage of Triton's compiler makes of a kernel for an H100."""
    compiled, original = [], triton.compile
    monkeypatch.setattr(
        triton,
        "compile",
        lambda *given, **more: compiled.append(original(*given, **more)) or compiled[0],
    )
    device = DEVICES["sm_90"]
    plan = choose(hidden_size, batch, dtype, device)
    build = gpu_report.Build(device, hidden_size, dtype, plan)
    gpu_report.compile_kernel(gpu_report.KERNELS[kernel], build)
    return compiled[0].asm[stage]


# Every kind of plan, with and without tensor cores: (hidden size, batch, dtype).
SAMPLE = [
    (64, 64, torch.float32),
    (1024, 1, torch.float32),
    (256, 64, torch.bfloat16),
    (1024, 64, torch.bfloat16),
    (4096, 64, torch.float16),
]


def within_limits(device, taken):
    return taken.spilled == 0 and taken.shared <= device.shared


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_nothing_is_spilled(arch, case):
    hidden_size, batch, dtype = case
    device = DEVICES[arch]
    build = gpu_report.Build(device, hidden_size, dtype, choose(hidden_size, batch, dtype, device))
    for kernel in gpu_report.KERNELS.values():
        assert within_limits(device, gpu_report.compile_kernel(kernel, build))
    with_ids = gpu_report.compile_kernel(kernels.forward_kernel, build, rows={"ids"})
    assert within_limits(device, with_ids)


@pytest.mark.parametrize("arch", [arch for arch in DEVICES if arch.startswith("sm_")])
@pytest.mark.parametrize("call", [{}, {"directions": 2, "rows": {"ids", "lengths", "reset"}}])
def test_two_programs_of_one_sequence_share_a_processor(arch, call):
    device = DEVICES[arch]
    plan = choose(128, 4096, torch.float32, device)
    assert (plan.kind, plan.block_b) == ("resident", 1)
    build = gpu_report.Build(device, 128, torch.float32, plan)
    for kernel in gpu_report.KERNELS.values():
        if kernel is kernels.backward_kernel:  # it reads no ids
            call = call | {"rows": {*call.get("rows", ())} - {"ids"}}
        taken = gpu_report.compile_kernel(kernel, build, **call)
        assert within_limits(device, taken)
        assert gpu_report.occupancy(device, plan, taken) >= 2 * plan.warps / 64


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("case", [(9, torch.float32), (256, torch.bfloat16)], ids=str)
def test_sums_by_token_compile(arch, case):
    width, dtype = case
    signature = {"rows": gpu_report.POINTERS[dtype], "order": "*i64", "borders": "*i64"}
    signature |= {"sums": "*fp32", "V": "i32"}
    taken = gpu_report.compile_for(
        *(DEVICES[arch], kernels.sums_by_token_kernel, signature),
        *(sums.sums_constants_of(width), sums.SUMS_SETTINGS),
    )
    assert within_limits(DEVICES[arch], taken)


@pytest.mark.slow
def test_nothing_is_spilled_anywhere():
    for build, _ in gpu_report.builds():
        for kernel in gpu_report.KERNELS.values():
            assert within_limits(build.device, gpu_report.compile_kernel(kernel, build)), build


CALLS = {
    "lengths": {"directions": 2, "rows": {"lengths", "reset"}, "tanh": False},
    "packed": {"rows": {"starts", "lengths", "reset"}, "absent": {"hx", "grad_h_n", "bias"}},
    "jagged": {
        "directions": 2,
        "rows": {"offsets"},
        "absent": {"hx", "grad_output", "previous", "dz_last", "grad_hx", "bias", "bias_reverse"},
    },
    "token ids": {"directions": 2, "rows": {"ids", "lengths", "reset"}},
    "last state of token ids": {"rows": {"ids", "lengths"}, "ring": True},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("case", [(33, 3), (1000, 16), (300, 5000)], ids=str)
def test_whatever_is_given_compiles(call, case):
    """All layouts, in each kind of plan, with sizes that leave remainders."""
    hidden_size, batch = case
    device = DEVICES["sm_90"]
    build = gpu_report.Build(
        device, hidden_size, torch.bfloat16, choose(hidden_size, batch, torch.bfloat16, device)
    )
    for kernel in gpu_report.KERNELS.values():
        if kernel is kernels.backward_kernel and "ids" in call["rows"]:
            continue  # it reads no ids
        assert gpu_report.compile_kernel(kernel, build, **call).shared <= device.shared


def test_the_kept_table_is_of_these_kernels():
    document = json.loads(gpu_report.RAW.read_text(encoding="utf-8"))
    rows = document["rows"]
    assert [
        (row["arch"], row["dtype"], row["hidden_size"], row["batches"], row["plan"]) for row in rows
    ] == [
        (build.device.arch, build.precision, build.hidden_size, batches, build.plan._asdict())
        for build, batches in gpu_report.builds()
    ]
    for row in rows:
        for name in gpu_report.KERNELS:
            assert row[name]["spilled"] == 0
            assert row[name]["shared"] <= DEVICES[row["arch"]].shared
    assert gpu_report.text(document) in GPU_REPORT.read_text(encoding="utf-8")


# ---- What the host does ----


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("layout", ["padded", "lengths", "jagged"])
def test_the_host_reads_no_tensor_of_the_device(layout, with_ids, monkeypatch):
    """Tensors without values, of which none can be read; the results have the promised shapes."""
    monkeypatch.setattr("namernn_fast.gpu.device.find_device", lambda index: DEVICES["sm_90"])
    launched = []
    monkeypatch.setattr(launching, "run", lambda kernel, *_: launched.append(kernel))
    monkeypatch.setattr(fp32_precision, "of_products", lambda: "tf32")  # torch multiplies
    weights = [p.detach() for p in torch.nn.RNN(4, 6, 2, bidirectional=True).parameters()]
    with FakeTensorMode() as mode:
        weights = [mode.from_tensor(w) for w in weights]
        x = torch.empty((9, 4) if layout == "jagged" else (5, 3, 4))
        if with_ids:
            x = x[..., 0].long()
            weights[0], weights[4] = torch.empty(7, 6), torch.empty(7, 6)
        numbers = {"lengths": 3, "jagged": 4}.get(layout)
        rows = None if numbers is None else torch.empty(numbers, dtype=torch.int64)
        reset = None if layout == "jagged" else torch.empty(5, 3, dtype=torch.bool)
        hx = torch.empty(4, 3, 6)
        options = ops.BIAS | ops.BIDIRECTIONAL | ops.WANT_HIDDEN
        given = (rows, reset, options | (ops.JAGGED if layout == "jagged" else 0))
        output, h_n, hidden = results = gpu.rnn_forward(x, hx, weights, *given)
        backward = (output, h_n, x, hx, weights, output, hidden, *given, not with_ids, True, [0, 1])
        grads = gpu.rnn_backward(*backward)
        last = (x, hx, weights, *given[:2], given[2] & ~ops.WANT_HIDDEN | ops.LAST_STATE)
        last_state = gpu.rnn_forward(*last)
        assert shapes(results) == shapes(ops.rnn_forward(x, hx, weights, *given))
        assert shapes(grads) == shapes(ops.rnn_backward(*backward))
        assert shapes(last_state) == shapes(ops.rnn_forward(*last))
    assert output.shape == (*(x.shape if with_ids else x.shape[:-1]), 12)
    forward, backward = [kernels.forward_kernel] * 2, [kernels.backward_kernel] * 2
    of_tokens = [kernels.sums_by_token_kernel] * with_ids
    assert launched == forward + backward + of_tokens + forward


def shapes(results):
    """Returns the shape, dtype and device of every tensor in the results of an operator."""
    flat = [t for result in results for t in (result if isinstance(result, list) else [result])]
    return [(t.shape, t.dtype, t.device) for t in flat]


# ---- What is refused ----


def test_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"needs Triton, which cannot be imported .*pip install"):
        ops.gpu_backend(GPU)


def test_a_triton_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.1.0"))
    with pytest.raises(
        RuntimeError,
        match=r"needs Triton 3.6 or newer, found 3.1.0: pip install --upgrade 'triton>",
    ):
        ops.gpu_backend(GPU)


def test_a_gpu_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        RuntimeError, match=r"compute capability 8.0 or newer, cuda:0 has 7.5: use torch.nn.RNN the"
    ):
        ops.gpu_backend(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ops.gpu_backend(GPU) is gpu


@pytest.mark.parametrize("elsewhere", ["weight_hh", "hx", "lengths", "reset"])
def test_tensors_on_two_devices(elsewhere):
    x, hx = torch.randn(5, 2, 4), torch.zeros(1, 2, 6)
    weights = [p.detach() for p in torch.nn.RNN(4, 6).parameters()]
    lengths, reset = torch.tensor([5, 2]), torch.zeros(5, 2, dtype=torch.bool)
    if elsewhere == "weight_hh":
        weights[1] = weights[1].to("meta")
    hx, lengths, reset = (
        tensor.to("meta") if name == elsewhere else tensor
        for name, tensor in (("hx", hx), ("lengths", lengths), ("reset", reset))
    )
    with pytest.raises(RuntimeError, match=rf"{elsewhere} must be .*on the device of input"):
        gpu.rnn_forward(x, hx, weights, lengths, reset, ops.BIAS)


def test_batch_invariance_is_not_promised():
    x, weights = torch.randn(5, 2, 4), [p.detach() for p in torch.nn.RNN(4, 6).parameters()]
    with pytest.raises(RuntimeError, match="batch_invariant is not promised on a GPU"):
        gpu.rnn_forward(x, None, weights, None, None, ops.BIAS | ops.BATCH_INVARIANT)


IDS, TABLE, WEIGHT_HH = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(7, 6), torch.zeros(6, 6)


@pytest.mark.parametrize(
    ("input", "weights", "options", "message"),
    [
        (IDS, [TABLE, WEIGHT_HH], ops.SHARE_PREFIXES, "share_prefixes needs a CPU"),
        (
            IDS,
            [TABLE, WEIGHT_HH],
            ops.LAST_STATE | ops.WANT_HIDDEN,
            "last state alone and that hidden",
        ),
        (IDS[0], [TABLE, WEIGHT_HH], 0, r"input must have 2 dimension\(s\), got 1"),
        (IDS.int(), [TABLE, WEIGHT_HH], 0, r"input must be of one of .*int64.*, got torch.int32"),
        (
            IDS,
            [TABLE[:, 1:], WEIGHT_HH],
            0,
            r"table of weight_ih must have shape \(7, 6\), got \(7, 5\)",
        ),
        (IDS, [TABLE[:0], WEIGHT_HH], 0, r"the table .* a row at least, got shape \(0, 6\)"),
        (
            IDS,
            [TABLE.half(), WEIGHT_HH],
            0,
            r"weight_ih must have the dtype of weight_hh .*float16",
        ),
        (IDS, [TABLE.double(), WEIGHT_HH.double()], 0, r"weights must be of one of .*float64"),
        (
            *(IDS, [TABLE, WEIGHT_HH, TABLE[1:], WEIGHT_HH], ops.BIDIRECTIONAL),
            r"the table of weight_ih must have shape \(7, 6\), got \(6, 6\)",
        ),
    ],
)
def test_token_ids_that_do_not_fit(input, weights, options, message):
    with pytest.raises(RuntimeError, match=message):
        gpu.rnn_forward(input, None, weights, None, None, options)


@pytest.mark.parametrize(
    ("want_input", "options", "message"),
    [
        (True, 0, "want_input must be false for token ids"),
        (False, ops.LAST_STATE, "the last state alone has no backward pass"),
        (False, ops.SHARE_PREFIXES, "share_prefixes needs a CPU"),
    ],
)
def test_gradients_that_there_are_not(want_input, options, message):
    output, weights = torch.zeros(5, 2, 6), [TABLE, WEIGHT_HH]
    with pytest.raises(RuntimeError, match=message):
        gpu.rnn_backward(
            *(output, None, IDS, None, weights, output, [], None, None, options),
            *(want_input, False, [0]),
        )


def test_explain_tells_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("namernn_fast.gpu.device.find_device", lambda index: DEVICES["sm_90"])
    with FakeTensorMode():
        x = torch.empty(5, 2, 4, device="cuda")
        assert explain(FusedRNN(4, 6), x).path == "triton sm_90"
        whole = explain(FusedRNN(4, 6), x.double())
    assert whole.path == "reference"
    assert "16 and 32 bits, not torch.float64" in whole.why_not["triton"]
