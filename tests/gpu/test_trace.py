"""Tests which kernels, operators and copies a call launches on a GPU. No GPU is needed.

GPU tensors are fake: they have a device but no values. A call that reads a value, and so would
wait for a real GPU, raises an error here.
"""

import contextlib
import itertools
import textwrap

import operators
import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

pytest.importorskip("triton")

from torch.nn.utils.rnn import PackedSequence

from benchmarks.gpu.dry_run import on_cuda
from namernn_fast import gpu, gpu_backend, last_state, ops, rnn
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import device, launching
from tools.gpu.resources import H100

GPU = torch.device("cuda", 0)
# Operators that launch nothing, because they only allocate memory or create views.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "device", "_unsafe_view"}


class Trace(TorchDispatchMode):
    """Records all operators, copies and kernels that run on the GPU.

    Raises:
        AssertionError: a copy from the CPU reads pageable memory, or blocks until it has finished.
    """

    def __init__(self):
        super().__init__()
        self.device = GPU  # the device of fake tensors
        self.noted, self.pinned, self.capturing = [], [], False
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_pinned = kwargs.pop("pin_memory", False)
        flat = tree_flatten((args, kwargs))[0]
        if not any(isinstance(x, FakeTensor) or x == self.device for x in flat):
            result = operator(*args, **kwargs)
            if is_pinned:
                self.pinned.append(result)
            return result
        with self.fake:
            result = operator(*args, **kwargs)
        name = operator.__name__.split(".")[0]
        assert name not in {"_local_scalar_dense", "item", "nonzero", "_unique2"}, name
        if name == "_to_copy" and not isinstance(args[0], FakeTensor):
            assert args[0] in self, "a copy from pageable memory waits for the stream"
            assert kwargs["non_blocking"], "a blocking copy waits for the device"
            self.noted.append("copy from the CPU")
        elif not operator.is_view and name not in FREE:
            self.noted.append(name)
        return result

    def take(self):
        """Returns the recorded names, and clears the record."""
        noted, self.noted = self.noted, []
        return noted

    def __contains__(self, tensor):
        return any(tensor.data_ptr() == pinned.data_ptr() for pinned in self.pinned)

    def launch(self, kernel, *_):
        self.noted.append(kernel.__name__)


@pytest.fixture
def trace(monkeypatch, h100):
    """Provides a trace, and makes operators on fake tensors call the GPU implementation."""
    found = Trace()
    monkeypatch.setattr(launching, "run", found.launch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(gpu_backend, "implementation", lambda device: gpu)
    monkeypatch.setattr(ops, "forward_untraced", on_cuda("forward"))
    monkeypatch.setattr(ops, "backward_untraced", on_cuda("backward"))
    return found


T, B, D, H, VOCABULARY, N = 5, 3, 4, 6, 2, 9
LENGTHS = torch.tensor([5, 3, 1])
PACKED = torch.tensor([3, 2, 2, 1, 1])
DENSE = (T, B, D)


def on_gpu(trace, *sizes, dtype=torch.float32):
    with trace.fake:
        return [torch.empty(size, dtype=dtype, device=trace.device) for size in sizes]


def weights_of(trace, num_layers=1, directions=1):
    sizes = []
    for k in range(num_layers):
        sizes += [(H, H * directions if k else D), (H, H), (H,), (H,)] * directions
    return on_gpu(trace, *sizes)


def paragraph(title, *passes):
    """Formats the title, then the number and the names of each pass's launches."""
    text = f"{title}\n"
    for noted in passes:
        runs = [(name, len(list(same))) for name, same in itertools.groupby(noted)]
        names = ", ".join(name if count == 1 else f"{count} {name}" for name, count in runs)
        text += textwrap.fill(f"{len(noted)}: {names}", 96, initial_indent="  ") + "\n"
    return text


def test_inference_launches_the_listed_operators(trace):
    dense, packed, h_0, tokens = on_gpu(trace, DENSE, (N, D), (1, B, H), (VOCABULARY, D))
    ids, on_device = on_gpu(trace, (T, B), (B,), dtype=torch.int64)
    (reset,) = on_gpu(trace, (T, B), dtype=torch.bool)
    calls = {
        "dense": ((dense, h_0), {}),
        "lengths on the GPU": ((dense, None), {"lengths": on_device}),
        "lengths on the CPU": ((dense, None), {"lengths": LENGTHS}),
        "packed": ((PackedSequence(packed, PACKED), None), {}),
        "packed while a graph is captured": ((PackedSequence(packed, PACKED), None), {}),
        "reset": ((dense, None), {"reset": reset}),
        "token ids": ((ids, None), {"embedding": tokens}),
    }
    found = ""
    for title, (arguments, options) in calls.items():
        trace.capturing = "captured" in title
        with trace, torch.no_grad():
            rnn(*arguments, weights_of(trace), **options)
        found += paragraph(title, trace.take())
    with trace, torch.no_grad():
        last_state(dense, None, weights_of(trace))
        found += paragraph("last state", trace.take())
        rnn(dense, None, weights_of(trace, 2))
        found += paragraph("two layers", trace.take())
    assert_expected_inline(
        found,
        """\
dense
  2: product_kernel, forward_kernel
lengths on the GPU
  2: product_kernel, forward_kernel
lengths on the CPU
  3: copy from the CPU, product_kernel, forward_kernel
packed
  3: copy from the CPU, product_kernel, forward_kernel
packed while a graph is captured
  10: upload_kernel, cumsum, sub, arange, flip, searchsorted, rsub, cat, product_kernel,
forward_kernel
reset
  2: product_kernel, forward_kernel
token ids
  3: mm, add, forward_kernel
last state
  2: product_kernel, forward_kernel
two layers
  4: product_kernel, forward_kernel, product_kernel, forward_kernel
""",
    )


def test_training_launches_the_listed_operators(trace):
    # Without CUDA, `contiguous()` cannot copy fake GPU tensors. So fake tensors are on "cpu:0",
    # which torch distinguishes from "cpu", the device of real tensors.
    trace.device = torch.device("cpu", 0)
    dense, packed, jagged, tables = on_gpu(trace, DENSE, (N, D), (N, D), (VOCABULARY, H))
    ids, lengths, offsets = on_gpu(trace, (T, B), (B,), (B + 1,), dtype=torch.int64)
    (reset,) = on_gpu(trace, (T, B), dtype=torch.bool)
    calls = {
        "dense": (dense, None, None, 0),
        "lengths": (dense, lengths, None, 0),
        "packed": (packed, PACKED, None, ops.PACKED),
        "jagged": (jagged, offsets, None, ops.JAGGED),
        "reset": (dense, None, reset, 0),
        "token ids": (ids, None, None, 0),
        "two directions": (dense, None, None, ops.BIDIRECTIONAL),
        "two layers": (dense, None, None, 0),
    }
    found = ""
    for title, (input, layout, reset, options) in calls.items():
        num_layers, directions = 1 + (title == "two layers"), ops.directions_of(options)
        weights = weights_of(trace, num_layers, directions)
        with_ids = ops.has_ids(input)
        if with_ids:
            weights[0] = tables
        (hx,) = on_gpu(trace, (num_layers * directions, B, H))
        rows = (layout, reset, options | ops.BIAS | ops.WANT_SAVED, 0)
        with trace:
            call = (VANILLA.number, input, [hx], weights, *rows)
            output, last_states, saved = gpu.forward(
                ops.ForwardArguments(*operators.arguments(*call))
            )
            forward_launches = trace.take()
            results = (output, saved, output, last_states)
            wanted = ([not with_ids, True], list(range(num_layers)))
            gpu.backward(
                ops.BackwardArguments(*operators.backward_arguments(*call, *results, *wanted))
            )
        found += paragraph(title, forward_launches, trace.take())
    assert_expected_inline(
        found,
        """\
dense
  2: product_kernel, forward_kernel
  8: backward_kernel, 5 product_kernel, sum, clone
lengths
  2: product_kernel, forward_kernel
  10: arange, ge, masked_fill, backward_kernel, 4 product_kernel, sum, clone
packed
  2: product_kernel, forward_kernel
  7: backward_kernel, 4 product_kernel, sum, clone
jagged
  2: product_kernel, forward_kernel
  7: backward_kernel, 4 product_kernel, sum, clone
reset
  2: product_kernel, forward_kernel
  7: backward_kernel, 4 product_kernel, sum, clone
token ids
  2: add, forward_kernel
  11: backward_kernel, product_kernel, _to_copy, sort, arange, searchsorted,
sums_by_token_kernel, 2 product_kernel, sum, clone
two directions
  4: 2 cat, product_kernel, forward_kernel
  15: backward_kernel, 2 product_kernel, cat, 4 product_kernel, sum, clone, 3 product_kernel,
sum, clone
two layers
  4: product_kernel, forward_kernel, product_kernel, forward_kernel
  16: backward_kernel, 5 product_kernel, sum, clone, backward_kernel, 5 product_kernel, sum,
clone
""",
    )


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_token_tables_use_the_precision_set_for_rnns(backend, trace, fp32_precision, monkeypatch):
    """Here torch's matmul may use TF32, but RNNs may not. On AMD, RNNs never use TF32."""
    monkeypatch.setattr(device, "find_device", lambda index: H100._replace(backend=backend))
    if backend == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    fp32_precision("tf32" if backend == "hip" else "ieee", "tf32")
    (tokens,) = on_gpu(trace, (VOCABULARY, D))
    (ids,) = on_gpu(trace, (T, B), dtype=torch.int64)
    with trace, torch.no_grad():
        rnn(ids, None, weights_of(trace), embedding=tokens)
    assert trace.take() == ["embedding", "product_kernel", "forward_kernel"]
