"""Tests the printed kernels without a GPU: their source, compilation, and errors."""

import os
import re
import stat
import sys
import types

import operators
import pytest
import torch
from kinds import EVERY

from namernn_fast import explain, gpu_backend, ops
from namernn_fast.cells import VANILLA
from namernn_fast.equations import program_of
from namernn_fast.machine import availability
from namernn_fast.nn import explaining

triton = pytest.importorskip("triton")

from gpu_resources import ARCHITECTURES, resources_of  # noqa: E402

from namernn_fast import gpu  # noqa: E402
from namernn_fast.gpu import emit  # noqa: E402

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget_gpus():
    availability.why_not_triton.cache_clear()
    yield
    availability.why_not_triton.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interpreted_kernels_pass_their_tests(slow, run_tests):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run_tests("tests/gpu/interpreted", environment=environment, slow=slow)


@pytest.mark.parametrize("cell", ["gru", "everything"])
def test_the_source_is_readable_by_its_user_only(cell, monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    program = program_of(EVERY[cell].cell, "tanh")
    made = emit.printed.__wrapped__(program, False)
    (path,) = (tmp_path / "namernn_fast").glob("*.py")
    assert made.module.__file__ == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == made.source
    assert f"# The {cell} cell" in made.source
    path.write_text("damaged")
    assert emit.printed.__wrapped__(program, False).source == path.read_text()


def test_every_operation_of_programs_can_be_printed():
    from namernn_fast.equations.program import OPERATIONS

    assert {*emit.OPERATIONS} | {"mean", "accumulate"} == OPERATIONS.keys()


@pytest.mark.parametrize("cell", ["rnn", "gru", "everything"])
def test_explain_shows_the_printed_source(cell, monkeypatch):
    monkeypatch.setattr(explaining, "_named", lambda call, choice: ("triton sm_90", {}))
    layer = EVERY[cell].layer(4, 6)
    explained = explain(layer, torch.empty(3, 2, 4))
    assert f"# The {layer._cell.name} cell, printed from its equation" in explained.source
    assert {"def forward(", "def backward("} <= {*explained.source.split("\n")}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "cell",
    [
        "gru",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rnn", "lstm", "leaky", "layer_norm_lstm", "layer_norm_gru", "slstm")
        ),
    ],
)
def test_kernels_compile_and_fit_on_the_gpu(cell, arch):
    for name in ("forward", "backward"):
        taken = resources_of(cell, name, arch, 64)
        assert taken.registers <= (512 if arch.startswith("gfx") else 255)
        assert taken.spilled <= (0 if name == "forward" else 256)
        assert taken.shared <= ARCHITECTURES[arch]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "needs Triton, which cannot be imported .*pip install"),
        (types.SimpleNamespace(__version__="3.1.0"), "needs Triton 3.6 or newer, found 3.1.0: pip"),
    ],
)
def test_a_missing_or_old_triton_is_reported(found, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", found)
    assert re.search(text, availability.why_not_triton(GPU))
    with pytest.raises(RuntimeError, match=text):
        gpu_backend.implementation(GPU)


def test_a_gpu_that_is_too_old_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or newer, cuda:0 has 7.5" in availability.why_not_triton(GPU)
    availability.why_not_triton.cache_clear()
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
        ({"options": ops.BIAS | ops.SUMS}, "given sums need a CPU"),
        ({"reset_to": [HX[None]]}, "reset_to needs reset"),
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
        (IDS, [w.double() for w in OF_TABLE], 0, r"weights must have one of .*float64"),
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
        (
            {"input": IDS, "states": (), "weights": OF_TABLE, "options": 0, "wanted": [True]},
            "wanted must not ask for the gradient of token ids",
        ),
        ({"wanted": [True]}, "wanted must say .* each of 1 states need a gradient, got 1 values"),
        ({"grad_last_states": []}, "grad_last_states must hold 1 gradient"),
        ({"grad_last_states": [HX[0]]}, r"grad_h_n must have shape \(1, 2, 6\), got \(2, 6\)"),
        ({"grad_output": OUTPUT[1:]}, r"grad_output must have shape \(5, 2, 6\), got \(4, 2, 6\)"),
        ({"output": OUTPUT.half()}, "output must have the dtype of input, torch.float32, got"),
        ({"saved": [OUTPUT]}, r"saved must hold 0 tensor\(s\), got 1"),
        ({"want_layers": [1]}, "want_layers must be between 0 and 0, got 1"),
    ],
)
def test_invalid_backward_calls_are_rejected(changes, message):
    call = operators.backward_arguments(**CALL | RESULTS | changes)
    with pytest.raises(RuntimeError, match=message):
        gpu.backward(ops.BackwardArguments(*call))


@pytest.mark.parametrize("number", [-1, 99])
def test_operators_reject_unknown_cells(number):
    call = ops.ForwardArguments(*operators.arguments(**CALL | {"cell": number}))
    with pytest.raises(RuntimeError, match=f"cell must be between 0 and .*, got {number}"):
        gpu_backend._implementation_of(call)
