"""How kernels are launched, and what a call consists of: without a GPU, and not interpreted."""

import contextlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.gpu import resources as gpu_report  # noqa: E402
from namernn_fast import rnn, transfers  # noqa: E402
from namernn_fast.gpu import launching, products  # noqa: E402
from namernn_fast.gpu.kernels import product_kernel, upload_kernel  # noqa: E402

DEVICES = {device.arch: device for device in gpu_report.DEVICES}


# ---- CUDA graphs, with a fake of the capture ----


class FakeCuda:
    """What `torch.cuda` says of two GPUs, of which number 1 captures its current stream."""

    def __init__(self, monkeypatch):
        self.current = 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", self.enter)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == 1)

    @contextlib.contextmanager
    def enter(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_the_device_of_the_input_is_asked(monkeypatch):
    FakeCuda(monkeypatch)
    assert not transfers.is_capturing(torch.device("cuda", 0))
    assert transfers.is_capturing(torch.device("cuda", 1))
    assert not transfers.is_capturing(torch.device("cpu"))


@pytest.mark.parametrize("lengths", [[5, 2], torch.tensor([5, 2], dtype=torch.int32)], ids=type)
def test_lengths_of_the_cpu_while_a_graph_is_captured(lengths, monkeypatch):
    FakeCuda(monkeypatch)
    sizes = ((6, 4), (6, 6), (6,), (6,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, *weights = (torch.empty(size, device="cuda:1") for size in ((5, 2, 4), *sizes))
        with pytest.raises(
            RuntimeError, match=r"lengths must be a tensor on cuda:1 while .*\.to\("
        ):
            rnn(x, None, weights, lengths=lengths)


def test_numbers_that_come_as_arguments_compile_once(monkeypatch):
    """Triton makes a constant of an argument that is 1 and compiles anew for multiples of 16."""
    launched = []
    monkeypatch.setattr(launching, "run", lambda kernel, grid, given, _: launched.append(given))
    launching.upload([0, 1, 2, 7, 8, 15, 16, 2**30 - 2], torch.device("meta"))
    values = launched.pop()["values"]
    assert len(values) == launching._UPLOADED
    assert all(v != 1 and v % 16 and v < 2**31 for v in values)
    types = {"out": "*i64", "values": ("i32",) * len(values)}
    compiled = triton.compile(
        ASTSource(upload_kernel, types, {}, {}),
        target=GPUTarget("cuda", 80, 32),
        options=launching.UPLOAD_SETTINGS,
    )
    assert "st.global" in compiled.asm["ptx"]


# ---- Products, compiled ahead of time ----

# By name, the strides that are one: of a projection, of the gradient of input, of those of weights.
PRODUCTS = {
    "x w^T": {"left_stride_k", "right_stride_k"},
    "dz w": {"left_stride_k", "right_stride_n"},
    "dz^T x": {"left_stride_m", "right_stride_n"},
}
POINTERS = {"left", "right", "out"}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def compile_product(device, plan, contiguous):
    """Compiles a product whose other strides, and whose sizes, are divisible by 16."""
    constants = {**plan.constants(), "plus": None, **dict.fromkeys(contiguous, 1)}
    types = {
        name: "constexpr" if name in constants else "*fp32" if name in POINTERS else "i32"
        for name in product_kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(types.values())
        if kind != "constexpr"
    }
    return triton.compile(
        ASTSource(product_kernel, types, constants, aligned),
        target=GPUTarget("cuda", int(device.arch.removeprefix("sm_")), device.lanes),
        options=plan.settings(),
    )


def local_memory(compiled, tmp_path):
    """Returns the bytes of local memory of a thread, into which registers are spilled."""
    cubin = tmp_path / "product.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.backends.__file__).parent / "nvidia/bin/cuobjdump"
    shown = subprocess.run(
        [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    )
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", shown.stdout))


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("layout", PRODUCTS)
def test_a_product_compiles_to(arch, precision, layout, tmp_path):
    device = DEVICES[arch]
    for tiles in {products._SMALL[precision], products._LARGE[precision]}:
        plan = products.ProductPlan(tiles, 512, 1, precision)
        compiled = compile_product(device, plan, PRODUCTS[layout])
        ptx = compiled.asm["ptx"]
        assert local_memory(compiled, tmp_path) == 0
        assert compiled.metadata.shared <= device.shared
        assert "cp.async" in ptx  # blocks are on their way while others are multiplied
        assert (TENSOR_CORES[arch] in ptx) == (precision == "tf32")
        values = (tiles.block_m + tiles.block_n) * tiles.block_k
        rounded = len(re.findall(r"and\.b32 .*, -8192;", ptx))
        if precision == "tf32":
            assert rounded * tiles.warps * 32 >= values
        else:
            assert rounded == 0
