"""Tests the kernels, plans and errors of the GPU backend. No GPU is needed."""

import os
import re
import sys
import types

import operators
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from namernn_fast import FusedRNN, explain, ops
from namernn_fast.cells import NUMBERED, VANILLA
from namernn_fast.machine import availability

triton = pytest.importorskip("triton")

from benchmarks.gpu.dry_run import H100, on_cuda  # noqa: E402
from namernn_fast import gpu, gpu_backend  # noqa: E402
from namernn_fast.gpu.device import Device  # noqa: E402
from namernn_fast.gpu.plan import Size, choose  # noqa: E402

# The shared memory of one program and the number of processors are from the manufacturers' manuals.
DEVICES = {
    "sm_80": Device("cuda", "sm_80", 163 * 1024, 108),
    "sm_90": H100,
    "sm_100": Device("cuda", "sm_100", 227 * 1024, 148),
    "gfx942": Device("hip", "gfx942", 64 * 1024, 304),
}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget_gpus():
    gpu_backend.implementation.cache_clear()
    yield
    gpu_backend.implementation.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interpreted_kernels_pass_their_tests(slow, run_tests):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    strength = None if slow else 0
    run_tests("tests/gpu/interpreted", environment=environment, slow=slow, strength=strength)


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", availability.TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_plans_cover_all_hidden_units_and_fit_on_the_gpu(arch, dtype, tf32):
    device = DEVICES[arch]
    for hidden_size in (*range(1, 600), 1000, 1024, 1500, 2048, 3333, 4096, 5000, 8192):
        for batch, directions in ((1, 1), (1, 2), (7, 2), (64, 1), (300, 1), (5000, 2)):
            config = choose(Size(hidden_size, batch, dtype, device, directions, tf32))
            assert config.members * config.tiles * config.block_n >= hidden_size
            blocks = -(-batch // config.block_b) * directions
            if config.members > 1:  # members wait for each other, so all must run at once
                assert config.members * blocks <= device.meeting
            if config.kind != "streamed":
                assert config.tiles == 1
                assert config.block_k >= hidden_size
            assert config.block_k % config.parts == 0
            assert config.warps * device.lanes <= 1024


def test_the_kind_of_plan_depends_on_sizes_dtype_and_gpu():
    h100, mi300 = DEVICES["sm_90"], DEVICES["gfx942"]

    def kind(hidden_size, batch, device=h100, dtype=torch.bfloat16, **more):
        return choose(Size(hidden_size, batch, dtype, device, **more)).kind

    assert kind(256, 1) == "resident"
    assert kind(256, 5000) == "resident"
    # An MI300 has less shared memory, and no cooperative plans.
    assert kind(256, 1, mi300) == "streamed"
    assert kind(1024, 1) == "cooperative"
    assert kind(1024, 5000) == "streamed"  # more programs than the GPU can run at once
    assert kind(4096, 1) == "streamed"
    assert kind(128, 1, dtype=torch.float32) == "resident"
    assert kind(256, 1, dtype=torch.float32) == "cooperative"
    assert kind(256, 1, dtype=torch.float32, tf32=True) == "cooperative"


def test_tiles_of_streamed_plans_grow_with_the_work_per_step():
    h100 = DEVICES["sm_90"]

    def tile(hidden_size, batch, dtype, **more):
        config = choose(Size(hidden_size, batch, dtype, h100, **more))
        assert config.kind == "streamed"
        return config.block_b, config.block_n, config.members, config.tiles

    # With little work per step, tiles are so small that every processor gets about one program.
    assert tile(4096, 1, torch.bfloat16) == (16, 32, 128, 1)
    assert tile(1024, 64, torch.float32) == (16, 32, 32, 1)
    # With more work per step, the plan chooses tiles with the least memory traffic or overhead.
    assert tile(2048, 512, torch.bfloat16) == (64, 128, 16, 1)
    assert tile(2048, 512, torch.float32, tf32=True) == (64, 64, 16, 2)
    assert tile(1024, 4096, torch.float32) == (32, 64, 1, 16)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "needs Triton, which cannot be imported .*pip install"),
        (types.SimpleNamespace(__version__="3.1.0"), "needs Triton 3.6 or newer, found 3.1.0: pip"),
    ],
)
def test_a_missing_or_old_triton_raises_an_error(found, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", found)
    with pytest.raises(RuntimeError, match=text):
        gpu_backend.implementation(GPU)


def test_a_gpu_that_is_too_old_raises_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"capability 8.0 .*, cuda:0 has 7.5: use"):
        gpu_backend.implementation(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert gpu_backend.implementation(GPU) is gpu


X, WEIGHTS = torch.zeros(5, 2, 4), [torch.zeros(size) for size in ((6, 4), (6, 6), (6,), (6,))]
HX, OUTPUT = torch.zeros(1, 2, 6), torch.zeros(5, 2, 6)
CALL = {
    **{"cell": VANILLA.number, "input": X, "states": [HX], "weights": WEIGHTS},
    **{"sequence_layout": None, "reset": None, "options": ops.BIAS, "trees": 0},
}
RESULTS = {
    **{"output": OUTPUT, "saved": [], "grad_output": OUTPUT, "grad_last_states": [HX]},
    **{"wanted": [True, True], "want_layers": [0]},
}
IDS, TABLE, WEIGHT_HH = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(7, 6), torch.zeros(6, 6)
OF_TABLE = [TABLE, WEIGHT_HH]
UNEQUAL = [*OF_TABLE, TABLE[1:], WEIGHT_HH]
ON_META = [WEIGHTS[0], WEIGHTS[1].to("meta"), *WEIGHTS[2:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ON_META}, "weight_hh must be .*on the device of input"),
        ({"states": [HX.to("meta")]}, "hx must be .*on the device of input"),
        (
            {"sequence_layout": torch.tensor([5, 2], device="meta")},
            "lengths must be .*on the device of input",
        ),
        (
            {"reset": torch.zeros(5, 2, dtype=torch.bool, device="meta")},
            "reset must be .*on the device of input",
        ),
        ({"options": ops.BIAS | ops.BATCH_INVARIANT}, "batch_invariant is not supported on a GPU"),
    ],
)
def test_invalid_forward_calls_are_rejected(changes, message):
    with pytest.raises(RuntimeError, match=message):
        gpu.forward(ops.ForwardArguments(*operators.arguments(**CALL | changes)))


@pytest.mark.parametrize(
    ("input", "weights", "options", "message"),
    [
        (IDS, OF_TABLE, ops.SHARE_PREFIXES, "share_prefixes needs a CPU"),
        (IDS, OF_TABLE, ops.LAST_STATE | ops.WANT_SAVED, "both LAST_STATE and WANT_SAVED"),
        (IDS[0], OF_TABLE, 0, r"input must have 2 dimension\(s\), got 1"),
        (IDS.int(), OF_TABLE, 0, r"input must have one of .*int64.*, got torch.int32"),
        (IDS, [TABLE[:, 1:], WEIGHT_HH], 0, r"must have shape \(7, 6\), got \(7, 5\)"),
        (IDS, [TABLE[:0], WEIGHT_HH], 0, r"the table .* at least one row, got shape \(0, 6\)"),
        (IDS, [TABLE.half(), WEIGHT_HH], 0, "must have the dtype of weight_hh .*float16"),
        (IDS, [w.double() for w in OF_TABLE], 0, r"weights must have one of .*float64"),
        (IDS, UNEQUAL, ops.BIDIRECTIONAL, r"must have shape \(7, 6\), got \(6, 6\)"),
    ],
)
def test_invalid_token_ids_and_tables_are_rejected(input, weights, options, message):
    changes = {"input": input, "states": (), "weights": weights, "options": options}
    with pytest.raises(RuntimeError, match=message):
        gpu.forward(ops.ForwardArguments(*operators.arguments(**CALL | changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ops.BIAS | ops.LAST_STATE}, "backward does not support LAST_STATE"),
        ({"options": ops.BIAS | ops.SHARE_PREFIXES}, "share_prefixes needs a CPU"),
        (
            {"input": IDS, "states": (), "weights": OF_TABLE, "options": 0, "wanted": [True]},
            "wanted must not ask for the gradient of token ids",
        ),
        (
            {"wanted": [True]},
            "wanted must say whether input and each of 1 states need a gradient, got 1 values",
        ),
        ({"wanted": [True] * 3}, "wanted must say .* each of 1 states .*, got 3 values"),
        ({"states": ()}, "wanted must say .* each of 0 states .*, got 2 values"),
        ({"grad_last_states": []}, "grad_last_states must hold 1 gradient, got 0"),
        ({"grad_last_states": [HX, HX]}, "grad_last_states must hold 1 gradient, got 2"),
        ({"grad_last_states": [HX[0]]}, r"grad_h_n must have shape \(1, 2, 6\), got \(2, 6\)"),
        ({"grad_output": OUTPUT[1:]}, r"grad_output must have shape \(5, 2, 6\), got \(4, 2, 6\)"),
        ({"output": OUTPUT.half()}, "output must have the dtype of input, torch.float32, got"),
        ({"saved": [OUTPUT]}, r"saved must hold 0 tensor\(s\), got 1"),
        ({"want_layers": [1]}, "want_layers must be between 0 and 0, got 1"),
        ({"want_layers": [-1]}, "want_layers must be between 0 and 0, got -1"),
    ],
)
def test_invalid_backward_calls_are_rejected(changes, message):
    call = operators.backward_arguments(**CALL | RESULTS | changes)
    with pytest.raises(RuntimeError, match=message):
        gpu.backward(ops.BackwardArguments(*call))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((c.number, availability.why_not_gpu_kernel(c)) for c in NUMBERED if not c.has_gpu_kernel),
        (-1, f"cell must be between 0 and {len(NUMBERED) - 1}, got -1"),
        (len(NUMBERED), f"cell must be between 0 and {len(NUMBERED) - 1}, got {len(NUMBERED)}"),
    ],
)
def test_operators_reject_unknown_cells_and_cells_without_a_kernel(number, text):
    call = CALL | {"cell": number}
    of = {"forward": operators.arguments, "backward": operators.backward_arguments}
    for name, arguments in (("forward", call), ("backward", call | RESULTS)):
        with pytest.raises(RuntimeError, match=f"^namernn_fast: {re.escape(text)}$"):
            on_cuda(name)(*of[name](*arguments.values()))


@pytest.mark.usefixtures("h100")
def test_explain_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def on_gpu(dtype):
        """Returns a layer on a fake GPU, without `layer.to`, which would call cuDNN."""
        layer = FusedRNN(4, 6)
        for name, parameter in [*layer.named_parameters()]:
            fake = torch.empty(parameter.shape, device="cuda", dtype=dtype)
            layer._parameters[name] = torch.nn.Parameter(fake)
        return layer

    with FakeTensorMode():
        x = torch.empty(5, 2, 4, device="cuda")
        assert explain(on_gpu(x.dtype), x).path == "triton sm_90"
        choice = explain(on_gpu(torch.float64), x.double())
    assert choice.path == "reference"
    assert "floating-point types, not torch.float64" in choice.why_not["triton"]
