"""Tests GRUs and LSTMs without a fused kernel, on torch's own operator and on reference.py.

The CPU has no kernel if the C++ extension is missing, and the meta device never has a kernel.
Reading a value of a meta tensor is an error, so a call that works on meta tensors does not wait
for a device.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from kinds import VARIANTS, flat, tensors_in
from layouts import gradients
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from namernn_fast import reference, torch_operators
from namernn_fast.machine import availability

D, H, T, B = 3, 4, 6, 5
LENGTHS = (4, 0, 6, 1, 4)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WITH_GATES = [name for name, kind in VARIANTS.items() if kind.without_kernel == "torch"]
pytestmark = pytest.mark.kinds(*WITH_GATES)
OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"bidirectional": True, "bias": False},
)
DROPOUT = {"num_layers": 3, "dropout": 0.5, "bidirectional": True}


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch):
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)


@pytest.fixture
def paths(monkeypatch):
    """Records the path of every call: "torch" for torch's own operator, or "reference"."""
    taken = []
    for name, module in (("torch", torch_operators), ("reference", reference)):

        def run(call, name=name, original=module.run_stack):
            taken.append(name)
            return original(call)

        monkeypatch.setattr(module, "run_stack", run)
    return taken


@pytest.fixture
def operator_calls(monkeypatch):
    """Records the tensors and the settings of every call to torch's operator."""
    calls = []
    original = torch_operators._operator

    def record(*tensors, **settings):
        calls.append((tensors, settings))
        return original(*tensors, **settings)

    monkeypatch.setattr(torch_operators, "_operator", record)
    return calls


def twins(kind, **options):
    return kind.twins(D, H, dtype=torch.float64, **options)


def inputs(kind, layer, with_hx=True):
    """Returns padded input, and initial states or None. All tensors require gradients."""
    shape = (B, T, D) if layer.batch_first else (T, B, D)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = kind.states(torch.randn, states, B, H, dtype=torch.float64, requires_grad=True)
    return x, hx if with_hx else None


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", ["dense", "packed", "packed unsorted"])
@pytest.mark.parametrize("options", [*OPTIONS, DROPOUT], ids=str)
@pytest.mark.parametrize(("batch_first", "with_hx"), [(False, True), (True, False)])
def test_dense_and_packed_calls_are_bit_identical_to_torch(
    kind, paths, layout, options, batch_first, with_hx
):
    """Torch's layer computes bit-identical results, gradients and second derivatives."""
    results = []
    for module in twins(kind, batch_first=batch_first, **options):
        torch.manual_seed(0)
        x, hx = inputs(kind, module, with_hx)
        input = x
        if layout != "dense":
            lengths = (6, 4, 4, 3, 1) if layout == "packed" else (4, 3, 6, 1, 4)
            sorts = {"batch_first": batch_first, "enforce_sorted": layout == "packed"}
            input = pack_padded_sequence(x, torch.tensor(lengths), **sorts)
        output, *last = flat(module(input, hx))
        output = output.data if layout != "dense" else output
        leaves = [x, *tensors_in(hx), *module.parameters()]
        loss = (output * output).sum() + sum(state.sum() for state in last)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        results.append((output, *last, *first, *second))
    assert paths == ["torch"]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_operator_gets_the_flat_weights_of_a_whole_stack(kind, layout, dropout, operator_calls):
    """Given any other tensors, cuDNN would copy all weights in every call."""
    module, _ = twins(kind, num_layers=3, bidirectional=True, dropout=dropout)
    x, hx = inputs(kind, module)
    module(pack_padded_sequence(x, [6, 4, 4, 3, 1]) if layout == "packed" else x, hx)
    (((*_, weights), _),) = operator_calls
    addresses = [weight.data_ptr() for weight in module._flat_weights]
    assert [weight.data_ptr() for weight in weights] == addresses


def test_calls_unsupported_by_torch_run_step_by_step(kind, paths):
    """Calls with resets, transforms or forward-mode AD run step by step. Other calls do not."""
    module, _ = twins(kind, num_layers=2)
    x = torch.randn(T, B, D, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    ids, embedding = torch.zeros(T, B, dtype=torch.int64), torch.zeros(9, D, dtype=torch.float64)
    wanted = module(x)
    runs = {
        "torch": [
            lambda: module(x),
            lambda: tensors_in(module.last_state(x)),
            lambda: module(x, lengths=[T] * B),
            lambda: module(ids, embedding=embedding),
        ],
        "reference": [
            lambda: module(x, reset=reset),
            lambda: torch.func.jvp(module, (x,), (x,))[0],
            lambda: torch.func.vmap(module)(x[None]),
            lambda: torch.func.vjp(module, x)[0],
        ],
    }
    for path, calls in runs.items():
        for call in calls:
            del paths[:]
            results = call()
            assert paths == [path]
            if results[0].shape == wanted[0].shape and call is not calls[-1]:
                torch.testing.assert_close(results, wanted, **EXACT)
    del paths[:]
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))
    assert paths == ["reference"]


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed", "lengths"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_calls_do_not_synchronize_with_the_device(kind, paths, layout, options, batch_first):
    """Neither the forward nor the backward pass reads a value from the input's device.

    LSTM calls with lengths are an exception, because they pack the sequences. On the meta device,
    which has no values, they run step by step instead.
    """
    ours, theirs = (m.to("meta") for m in twins(kind, batch_first=batch_first, **options))
    results = []
    for module in (ours, theirs):
        x, *states = (t.detach().to("meta").requires_grad_() for t in flat(inputs(kind, module)))
        hx = tuple(states) if kind.has_cell_state else states[0]
        input, more = x, {}
        if layout == "packed":
            input = PackedSequence(x.flatten(0, 1), torch.tensor([5] * 6))
        elif layout == "lengths" and module is ours:
            more["lengths"] = torch.tensor(LENGTHS, device="meta")
        output, *last = flat(module(input, hx, **more))
        output = output.data if layout == "packed" else output
        loss = output.sum() + sum(state.sum() for state in last)
        grads = torch.autograd.grad(loss, [x, *states, *module.parameters()])
        results.append([(t.shape, t.dtype, t.device) for t in (output, *last, *grads)])
        if module is ours:
            alone = tensors_in(module.last_state(input, hx, **more))
            assert [state.shape for state in alone] == [state.shape for state in last]
    assert results[0] == results[1]
    by_steps = kind.has_cell_state and layout == "lengths"
    assert paths == ["reference" if by_steps else "torch"] * 2


def test_token_ids_work_on_the_meta_device(kind):
    model = kind.tokens(9, D, H, num_layers=2, device="meta")
    ids = torch.zeros(T, B, dtype=torch.int64, device="meta")
    for lengths in (None, torch.tensor(LENGTHS, device="meta")):
        assert model(ids, lengths=lengths)[0].shape == (T, B, model.rnn.proj_size or H)


def test_the_operator_runs_in_training_mode_only_if_needed(kind, operator_calls):
    """cuDNN has no backward pass unless its forward pass ran in training mode."""
    module, x = kind.layer(D, H).eval(), torch.randn(T, B, D)
    for run in (lambda x: module(x), lambda x: module(x, lengths=LENGTHS)):
        run(x)
        with torch.no_grad():
            run(x)
        module.requires_grad_(False)
        run(x)
        run(x.clone().requires_grad_())
        module.requires_grad_(True)
        trains = [settings["train"] for _, settings in operator_calls]
        assert trains == [True, False, False, True]
        operator_calls.clear()


@pytest.mark.parametrize("more", ["reset", "lengths", "projections", "float64"])
def test_gpu_kernels_run_what_torchs_layers_cannot(kind, more, monkeypatch):
    monkeypatch.setattr(availability, "why_not_triton", lambda device: None)
    dtype = torch.float64 if more == "float64" else torch.float32
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, dtype=dtype, device="cuda")
    call = SimpleNamespace(projects=more == "projections", beyond_torch=True)
    expected = {
        "projections": "the GPU kernels do not support proj_size",
        "float64": "the GPU kernels take 16- and 32-bit floating-point types, not torch.float64",
    }
    assert availability.why_not_kernel(on_gpu, kind.cell, call) == expected.get(more)
    if more not in expected:
        dense = SimpleNamespace(projects=False, beyond_torch=False)
        text = f"torch's own {kind.name.upper()} operator runs on a GPU, with cuDNN or MIOpen"
        assert availability.why_not_kernel(on_gpu, kind.cell, dense) == text
        with availability.gpu_path("kernel"):
            assert availability.why_not_kernel(on_gpu, kind.cell, dense) is None
        assert availability.why_not_kernel(on_gpu) is None  # the vanilla cell


def test_all_sequences_of_a_jagged_batch_may_be_empty(kind):
    module = kind.layer(D, H, num_layers=2, bidirectional=True)
    nobody = torch.nested.nested_tensor([torch.zeros(0, D)] * 2, layout=torch.jagged)
    output, *last = flat(module(nobody, kind.states(torch.ones, 4, 2, H)))
    assert output.values().shape == (0, 2 * last[0].shape[-1])
    assert all((state == 1).all() for state in last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_full_lengths_do_not_change_results(kind, dtype):
    """If no sequence is padded, results have the same dtype and bits as without lengths."""
    module = kind.layer(D, H, dtype=dtype)
    x = torch.randn(T, B, D, dtype=dtype)
    got = flat(module(x, lengths=[T] * B))
    wanted = flat(module(x))
    assert {t.dtype for t in (*got, *wanted)} == {dtype}
    assert all(map(torch.equal, got, wanted))


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(VARIANTS[name], layout, id=f"{name}-{layout}")
        for name, layout in itertools.product(WITH_GATES, ("dense", "lengths", "packed"))
        # An LSTM with lengths becomes one graph, without torch's operator.
        if not (VARIANTS[name].has_cell_state and layout == "lengths")
    ],
)
def test_graph_sizes_do_not_depend_on_the_sequence_length(kind, layout):
    """Torch's operator runs outside the compiled graphs, so they contain no loop over steps."""
    module, _ = twins(kind, num_layers=2, bidirectional=True)
    sizes = []
    for steps in (4, 12):
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        x = torch.randn(steps, B, D, dtype=torch.float64, requires_grad=True)
        more = {"lengths": torch.tensor([4, 0, 3, 1, 4])} if layout == "lengths" else {}

        def run(x, more=more, steps=steps):
            x = x * 2
            if layout == "packed":
                x = PackedSequence(x.flatten(0, 1), torch.tensor([B] * steps))
            output, last = module(x, **more)
            return (output.data if layout == "packed" else output) + 1, last

        results = [call(x) for call in (torch.compile(run, backend=backend), run)]
        torch.testing.assert_close(*results, **EXACT)
        leaves = [x, *module.parameters()]
        torch.testing.assert_close(*(gradients(result, leaves) for result in results), **EXACT)
        sizes.append([len(graph.graph.nodes) for graph in backend.graphs])
    assert sizes[0] == sizes[1]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="would become the operators of every"):
        torch.compile(module, fullgraph=True, backend="eager")(x)


def test_lstm_with_lengths_compiles_to_one_graph():
    """Torch's operator is not used, because it needs lengths that are unknown at compile time."""
    module, _ = twins(VARIANTS["lstm"])
    x, hx = inputs(VARIANTS["lstm"], module)
    lengths = torch.tensor(LENGTHS)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    got, wanted = (run(x, hx, lengths=lengths) for run in (compiled, module))
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.covering(0)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_calls_torchs_operator(kind, strict):
    """Only the batch size may vary in such a program; the sequence length is fixed."""
    module, _ = twins(kind, num_layers=2)
    dims = ({1: torch.export.Dim("batch")},)
    x, _ = inputs(kind, module, with_hx=False)
    program = torch.export.export(module, (x.detach(),), dynamic_shapes=dims, strict=strict)
    assert [str(n.target) for n in program.graph.nodes].count(f"aten.{kind.name}.input") == 1
    for batch in (2, 7):
        x = torch.randn(T, batch, D, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), module(x), **EXACT)
