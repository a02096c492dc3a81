import contextlib
import gc
import getpass
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from covering import redundant
from hypothesis import HealthCheck, settings
from kinds import EVERY, KINDS, SLOW_KINDS, TRIED_EQUATIONS

from benchmarks.harness.precision import precision_of_products
from namernn_fast.machine import availability
from namernn_fast.nn.base.step_module import FusedCell

# The path of a Unix socket is limited to 107 characters. If the path of the temporary folder is too
# long, a DataLoader's worker processes cannot create their sockets, and the DataLoader hangs.
if len(tempfile.gettempdir()) > 40 and os.access("/tmp", os.W_OK):
    os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"

# Use a separate Inductor cache for each instruction set. A shared cache may hold code for wider
# vectors, which fails to compile or returns NaN.
if level := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = f"torchinductor_{getpass.getuser()}_{level}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

# The tests in gpu/interpreted must run in a process in which Triton interprets its kernels.
# gpu/test_triton.py starts that process.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu/interpreted"]

# Makes pytest show values in failed assertions of drawn.py, as it does in test files.
pytest.register_assert_rewrite("drawn")

# With a deadline, hypothesis would fail examples that a busy machine slows down.
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", max_examples=16, derandomize=True, **TIMELESS)
settings.register_profile("fuzz", max_examples=2500, print_blob=True, **TIMELESS)


STRENGTH_OF_ALL = 3
"""The minimum strength of the covering arrays that `make test-all` runs."""


def pytest_addoption(parser):
    what = "use this strength for all covering arrays, and ignore the marks of tests"
    parser.addoption("--strength", type=int, help=what)
    what = "disable oneDNN, which does not support every processor"
    parser.addoption("--without-onednn", action="store_true", help=what)


def pytest_collectstart(collector):
    """Selects the profile before each module is imported, because torch's tests load their own."""
    settings.load_profile(collector.config.getoption("--hypothesis-profile") or "test")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Stops the garbage collector meanwhile. Later it ignores the tests, which stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_configure(config):
    if config.option.without_onednn:
        torch.backends.mkldnn.enabled = False


def pytest_generate_tests(metafunc):
    """Parametrizes tests that take `kind`, with all kinds unless a mark selects some of them."""
    test = metafunc.definition
    given = any("kind" in mark.args[0] for mark in test.iter_markers("parametrize"))
    if "kind" not in metafunc.fixturenames or given:
        return
    named, drop_in = map(test.get_closest_marker, ("kinds", "drop_in"))
    kinds = {name: EVERY[name] for name in (named.args if named else (*KINDS, *TRIED_EQUATIONS))}
    if drop_in:
        kinds = {name: kind for name, kind in kinds.items() if kind.cell.torch is not None}
    metafunc.parametrize("kind", kinds.values(), ids=kinds)


@pytest.hookimpl(tryfirst=True)  # add markers before `-m` selects by markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        named = item.callspec.params if hasattr(item, "callspec") else {}
        is_slow = not SLOW_KINDS.isdisjoint(str(n).partition("-")[0] for n in named.values())
        if is_slow or getattr(named.get("kind"), "name", None) in TRIED_EQUATIONS:
            item.add_marker(pytest.mark.slow)
    if config.option.strength is None:
        # Slow calls are in no array of `make test`, which would otherwise lack what only they have.
        quick = [item for item in items if item.get_closest_marker("slow") is None]
        slow = redundant(quick)
        for item in slow:
            item.add_marker(pytest.mark.slow)
        chosen = {*quick}.difference(slow)
        left_out = set(redundant(items, least=STRENGTH_OF_ALL)) - chosen
    else:
        left_out = set(redundant(items, config.option.strength))
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes torch fill uninitialized memory with NaN, which exposes results that no code writes."""
    # Calling torch.use_deterministic_algorithms would import the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    # For each device without a driver, torch.manual_seed would format the stack: 3 ms a test.
    torch.default_generator.manual_seed(0)
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Runs a test with the C++ kernel, and again with ATen operators."""
    if request.param == "reference":
        monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    elif not availability.HAS_EXTENSION:
        pytest.skip("the C++ extension was not built")
    return request.param


def _run_steps_fused(monkeypatch, are_fused=True):
    monkeypatch.setattr(FusedCell, "_is_faster", lambda self, input: are_fused)


@pytest.fixture
def fused_steps(monkeypatch):
    """Makes step modules of gated cells run the fused operator for all sizes."""
    _run_steps_fused(monkeypatch)


@pytest.fixture(params=["fused", "torch"])
def steps(request, monkeypatch):
    """Runs a test with gated step modules on the fused operator, and again on torch's cell."""
    _run_steps_fused(monkeypatch, request.param == "fused")
    return request.param


@pytest.fixture
def run_tests(pytestconfig):
    """Provides a function that runs tests in a new process.

    The function passes positional arguments to pytest. `slow` includes tests marked slow.
    `strength` overrides the strength of all covering arrays.
    """

    def run(*arguments, environment, slow=False, strength=None):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        command += ["-m", "" if slow else "not slow"]
        command += [] if strength is None else [f"--strength={strength}"]
        root = pytestconfig.rootpath
        ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        print(ran.stdout)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    return run


@pytest.fixture
def run_program():
    """Provides a function that runs Python in the folder `cwd` and returns the printed output."""

    def run(*arguments, cwd, **environment):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # unlike kill(), lets the program stop its child processes
            raise
        assert process.returncode == 0, err
        return out

    return run


@pytest.fixture
def cpu_precision():
    """Provides a function that sets the precision of float32 products on a CPU, for all layers.

    The function takes the same names as `torch.set_float32_matmul_precision`. The previous
    settings are restored after the test.
    """
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(precision_of_products(name))


@pytest.fixture
def threads():
    """Provides `torch.set_num_threads`, and restores the number of threads after the test."""
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)
