"""Tests concurrent calls, forked processes, parallel regions, interrupts and memory errors."""

import ctypes
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import CELLS, FUSED, LAYERS
from kinds import KINDS, flat
from layouts import trained

from namernn_fast import FusedRNN

SHAPES = [(16, 300, 30, 1), (16, 128, 20, 60), (64, 64, 8, 4)]  # D, H, T, B


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_concurrent_calls_of_a_layer_are_bit_identical(cell, shape, threads):
    """Concurrent calls return the same bits as calls that run one after another."""
    D, H, T, B = shape  # noqa: N806 - named as in the kernels
    threads(2)
    module = FUSED[cell](D, H, bidirectional=True)
    inputs = [torch.randn(T, B, D) for _ in range(8)]
    alone = [trained(module, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: trained(module, x), inputs * 3))
    torch.testing.assert_close(together, alone * 3, rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_changing_the_number_of_threads_during_a_call_changes_no_bits(cell, threads):
    """Eight Python threads call the layer, and each sets torch's number of threads first."""
    threads(2)
    module = FUSED[cell](16, 300)
    x = torch.randn(30, 2, 16)
    per_sequence = slice(-len([*module.parameters()]))
    wanted = trained(module, x)[per_sequence]

    def call(count):
        torch.set_num_threads(count)
        return trained(module, x)[per_sequence]

    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(call, [1, 2, 3, 4] * 6):
            assert all(map(torch.equal, got, wanted))


@pytest.mark.skipif(sys.platform != "linux", reason="loads torch's library by its Linux name")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_calls_inside_a_parallel_region_match_calls_outside(cell, shape, threads):
    """Inside `at::parallel_for`, a layer runs on one thread, and its results are bit-identical."""
    D, H, T, B = shape  # noqa: N806 - named as in the kernels
    threads(2)
    module = FUSED[cell](D, H)
    inputs = [torch.randn(T, B, D) for _ in range(8)]
    with torch.no_grad():
        wanted = [flat(module(x)) for x in inputs]
    got = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin, end, context):
        with torch.no_grad():
            for i in range(begin, end):
                got[i] = threading.get_ident(), flat(module(inputs[i]))

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    sizes = map(ctypes.c_int64, (0, len(inputs), 1))
    assert library.torch_parallel_for(*sizes, body, None) == 0
    assert len({thread for thread, _ in got.values()}) == 2
    for i, states in enumerate(wanted):
        assert all(map(torch.equal, got[i][1], states))


@pytest.fixture
def run(run_program, tmp_path):
    """Provides a function that runs code in a new process and splits the output into words."""
    return lambda program: run_program("-c", program, cwd=tmp_path).split()


FORK = """
import os, torch
from namernn_fast import FusedRNN

torch.set_num_threads(2)
torch.manual_seed(0)
module = FusedRNN(16, 300, bidirectional=True)
inputs = [torch.randn(30, batch, 16) for batch in (1, 40)]

def results():
    values = []
    for x in inputs:
        x = x.clone().requires_grad_()
        output, h_n = module(x)
        values += [output.detach(), h_n.detach(), *torch.autograd.grad(h_n.sum(), x)]
        lengths = [2] * x.shape[1]  # leaves enough padding to clear it on several threads
        values += [result.detach() for result in module(x, lengths=lengths)]
    # Compare bytes, because torch's operators may hang in a child, which has no pool threads.
    return [value.numpy().tobytes() for value in values]
"""


@pytest.mark.covering(0)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize(
    ("cell", "used"),
    [("rnn", False), ("gru", True), pytest.param("rnn", True, marks=pytest.mark.slow)],
)
def test_a_forked_child_computes_the_same_results_as_its_parent(cell, used, run):
    """A child does not inherit the threads of the parent's pool, so it must not wait for them."""
    program = FORK.replace("FusedRNN", KINDS[cell].cell.layer) + (
        f"wanted = results() if {used} else None\n"
        "pid = os.fork()\n"
        "got = results()\n"  # in the child and in the parent
        "if wanted and got != wanted: print('differs', flush=True)\n"
        "if not pid: print('child', flush=True); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "print('parent')"
    )
    assert run(program) == ["child", "parent"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads of its process from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_runs_in_a_forked_child(kind, run_program, tmp_path):
    """The child runs torch's own operators as well, and on as many threads as the parent."""
    program = Path(__file__).with_name("forked_calls.py")
    path = os.pathsep.join(map(str, program.parents[1:3]))
    *faults, count = run_program(program, kind, cwd=tmp_path, PYTHONPATH=path).splitlines()
    assert not faults
    assert int(count) > 60


def test_an_interrupt_is_raised_after_the_current_call(run):
    """After the KeyboardInterrupt, later calls return the same results as before."""
    program = FORK + (
        "import signal, threading\n"
        # A background job starts with SIGINT ignored, and then Python installs no handler.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "wanted = results()\n"
        "try:\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    while True: module(inputs[1])\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print(results() == wanted)"
    )
    assert run(program) == ["interrupted", "True"]


def test_a_call_releases_the_gil():
    """The switch interval is so long that Python itself does not switch to the other thread."""
    module = FusedRNN(256, 256)
    x = torch.randn(1000, 64, 256)
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=tick)
        thread.start()
        ticks_before = ticks
        with torch.no_grad():
            for _ in range(100):
                module(x)
                if ticks > ticks_before + 2:
                    break
        counted = ticks - ticks_before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert counted > 2


@pytest.mark.parametrize(  # with two features, copying the expanded input already fails
    "shape", [(2**30, 2**20, 1), (2**40, 2**20, 1), (2**30, 2**20, 2)], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_a_tensor_too_big_for_memory_raises_an_error(cell, shape):
    module = FUSED[cell](shape[-1], 4)
    x = torch.randn(3, 2, shape[-1])
    wanted = trained(module, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no memory for a tensor of shape"):
        module(torch.zeros(1).expand(shape))
    assert all(map(torch.equal, trained(module, x), wanted))


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the memory size of its process from /proc"
)
@pytest.mark.parametrize(("cell", "both_at_once"), [("rnn", True), ("rnn", False), ("gru", False)])
def test_failed_scratch_allocations_raise_an_error(cell, both_at_once, run):
    """The calling thread gets the error of any worker thread, and later calls work again."""
    layer = KINDS[cell].cell.layer
    program = FORK.replace("FusedRNN", layer) + (
        "import resource\n"
        "def limit(extra):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))\n"
        f"both_at_once = {both_at_once}\n"
        "sizes = (32, 1600) if both_at_once else (512, 2048)\n"
        f"layer = {layer}(*sizes, bidirectional=both_at_once)\n"
        "x = torch.randn(40, 4, layer.input_size)\n"
        "torch.ones(10**6).sum()\n"  # starts the threads of the pool
        "limit(10 * 2**20)\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        with torch.no_grad(): layer(x)\n"
        "    except (MemoryError, RuntimeError): print('error')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "wanted = type(layer).__bases__[-1].forward(layer, x)\n"
        "torch.testing.assert_close(layer(x), wanted)\n"
    )
    assert run(program) == ["error", "error"]
