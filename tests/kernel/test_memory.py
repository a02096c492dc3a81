"""Tests how CPU calls reserve, reuse and return scratch memory.

Each test runs in a separate process, because all layers of a process share the reserved memory.
"""

import os
import sys

import pytest
from cases import CELLS
from kinds import KINDS, needs_extension

pytestmark = needs_extension
measures_pages = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reports page faults and resident memory this way"
)

PRELUDE = """
import os, resource, signal, threading, torch
from concurrent.futures import ThreadPoolExecutor
from namernn_fast import FusedGRU, FusedLeakyRNN, FusedLSTM, FusedRNN
from namernn_fast import empty_cache, memory_reserved

MEBI, MOST = 2**20, 256 * 2**20
torch.set_num_threads(2)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def infer(layer, x):
    with torch.inference_mode():
        return layer(x)[0]

def lstm(size):  # a call packs the weights, which takes size * size * 16 bytes
    layer, x = FusedLSTM(16, size), torch.randn(2, 64, 16)
    return lambda: infer(layer, x)
"""


@pytest.fixture
def run(run_program, tmp_path):
    return lambda program: run_program("-c", PRELUDE + program, cwd=tmp_path)


@pytest.mark.slow
@measures_pages
@pytest.mark.parametrize(
    "cell",
    [cell if cell == "lstm" else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS],
)
def test_only_the_first_call_causes_page_faults_in_scratch_memory(run, cell):
    """Without reserved memory, each call would fault on 8 to 32 MiB of packed weights per layer.

    Only the call with the fewest faults counts, because new results cause some as well. Huge pages
    are off: each would hide 511 faults.
    """
    run(f"""
import ctypes
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
layer, x = {KINDS[cell].cell.layer}(1024, 1024, num_layers=2), torch.randn(2, 128, 1024)
for _ in range(2): infer(layer, x)
reserved, faults = memory_reserved(), []
for _ in range(8):
    before = page_faults()
    infer(layer, x)
    faults.append(page_faults() - before)
assert reserved >= 8 * MEBI, reserved
assert memory_reserved() == reserved, (memory_reserved(), reserved)
assert min(faults) < reserved / resource.getpagesize() / 2, (faults, reserved)
""")


@pytest.mark.slow
def test_training_reuses_scratch_memory(run):
    run("""
layer, x = FusedLSTM(512, 512, num_layers=2), torch.randn(16, 64, 512)
reserved = []
for _ in range(5):
    torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    reserved.append(memory_reserved())
assert reserved[0] > 0 and len(set(reserved[1:])) == 1, reserved
""")


@measures_pages
def test_empty_cache_returns_reserved_memory(run):
    run("""
call = lstm(1024)
wanted = call()
used, reserved = resident(), memory_reserved()
empty_cache()
assert reserved >= 16 * MEBI and memory_reserved() == 0
assert used - resident() > reserved * 3 / 4, (used, resident(), reserved)
assert torch.equal(call(), wanted)
assert memory_reserved() == reserved
""")


@pytest.mark.slow
def test_reserved_memory_never_exceeds_its_bound(run):
    """Together, these calls need more than twice as much memory as the bound allows."""
    run("""
sizes = range(640, 2048, 64)
reserved = []
for size in sizes:
    lstm(size)()
    reserved.append(memory_reserved())
assert sum(size**2 * 16 for size in sizes) > MOST * 2
assert MOST / 2 < max(reserved) <= MOST, reserved
""")


@pytest.mark.slow
def test_reserved_memory_that_no_call_uses_is_returned(run):
    run("""
large, small = lstm(1024), lstm(300)
large()
reserved = memory_reserved()
for _ in range(100): small()
assert reserved >= 16 * MEBI and 0 < memory_reserved() < 8 * MEBI, (reserved, memory_reserved())
""")


@pytest.mark.slow
def test_threads_share_reserved_memory(run):
    """16 threads that call a layer one after another reserve no more memory than one thread."""
    run("""
call, lock = lstm(512), threading.Lock()
call()
reserved = memory_reserved()
def locked(_):
    with lock: call()
with ThreadPoolExecutor(16) as pool: list(pool.map(locked, range(160)))
assert memory_reserved() == reserved, (memory_reserved(), reserved)
with ThreadPoolExecutor(16) as pool: list(pool.map(lambda _: call(), range(160)))
assert memory_reserved() <= 16 * reserved
""")


@pytest.mark.slow
@measures_pages
def test_freeing_a_result_cancels_its_huge_page_advice(run):
    """Otherwise, each access to a new part of the freed memory could allocate a huge page."""
    run("""
import ctypes
torch.empty(31 * MEBI, dtype=torch.uint8)  # smaller tensors are on malloc's heap from now on
layer = FusedRNN(16, 256)
results = [infer(layer, torch.randn(16, 64, 16)) for _ in range(100)]  # 1 MiB each
results += [infer(layer, torch.randn(16, 2560, 16)) for _ in range(4)]  # 40 MiB each
end = torch.ones(MEBI // 4)  # keeps malloc from returning the heap below it
del results
ctypes.CDLL(None).malloc_trim(0)
before = resident()
sparse = [torch.empty(MEBI, dtype=torch.uint8) for _ in range(100)]
for tensor in sparse: tensor[MEBI // 2] = 1
assert resident() - before < 20 * MEBI, resident() - before
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_child_process_forked_during_a_call_can_run_layers(run):
    """At the fork, other threads of the parent are reserving and returning memory."""
    printed = run("""
call, small, done = lstm(512), lstm(64), threading.Event()
wanted = small().numpy().tobytes()
def repeat():
    while not done.is_set(): call(), empty_cache()
threads = [threading.Thread(target=repeat) for _ in range(3)]
for thread in threads: thread.start()
statuses = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # ends a child that hangs
        call()
        os._exit(small().numpy().tobytes() != wanted)
    statuses.append(os.waitpid(child, 0)[1])
done.set()
for thread in threads: thread.join()
print(statuses)
""")
    assert printed == f"{[0] * 8}\n"
