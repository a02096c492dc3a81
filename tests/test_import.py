"""Tests the import of the package with an old torch or a missing or broken C++ extension.

The warning about a missing extension must point to the line of the user's import statement.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.pyfunctorch
import torch.utils._python_dispatch

import namernn_fast
from namernn_fast.integrations import deferred
from namernn_fast.machine import availability, requirements, torch_private

PACKAGE = Path(namernn_fast.__file__).parent

# Removes the hooks of editable installs, which would import the built package, not the copy.
PLAIN_IMPORTS = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"


def copy_without_extension(folder):
    """Copies the package, without its C++ extension, to a folder. Returns the copy's path."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    return Path(shutil.copytree(PACKAGE, folder / "namernn_fast", ignore=ignored))


def run(*arguments, folder):
    """Runs Python in a folder. If the folder has a copy of the package, Python can import it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize(
    "line",
    [
        "from namernn_fast.names import text",
        "namernn_fast = importlib.import_module('namernn_fast')",
    ],
    ids=["submodule", "importlib"],
)
def test_the_warning_about_a_missing_extension_points_to_the_import(line, tmp_path):
    copy_without_extension(tmp_path)
    script = tmp_path / "namernn_fast_user.py"  # must not be mistaken for the package
    script.write_text(f"import importlib, sys\n{PLAIN_IMPORTS}{line}\n{line}\n")
    ran = run(script, folder=tmp_path)
    warning = "UserWarning: namernn_fast was built without its C++ extension"
    assert f"{script}:3: {warning}" in ran.stderr
    assert ran.stderr.count(warning) == 1


@pytest.mark.slow
def test_the_warning_says_that_a_checkout_without_an_extension_is_imported(tmp_path):
    """In the folder of a checkout, Python imports the sources instead of the installed package."""
    copy_without_extension(tmp_path)
    (tmp_path / "csrc").mkdir()
    ran = run("-c", f"import sys\n{PLAIN_IMPORTS}import namernn_fast", folder=tmp_path)
    assert f"namernn_fast is imported from its sources in {tmp_path}, where no C++" in ran.stderr
    assert "run Python in another folder if the package is installed" in ran.stderr


def test_the_package_works_without_its_extension(tmp_path):
    copy_without_extension(tmp_path)
    program = f"""
import sys
{PLAIN_IMPORTS}
import copy, torch, namernn_fast
x = torch.randn(5, 2, 3)
packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (4, 2)])
for kind in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM):
    theirs = kind(3, 4, num_layers=2, bidirectional=True)
    ours = namernn_fast.replace_rnn(copy.deepcopy(theirs))
    print(namernn_fast.explain(ours, x))
    for value in (x, packed):
        results = []
        for module in (ours, theirs):
            output, last = module(value)
            loss = torch.cat([*last]).sum()
            results.append([last, torch.autograd.grad(loss, [*module.parameters()])])
        torch.testing.assert_close(*results)
namernn_fast.FusedRNNCell(3, 4)(x[0]), namernn_fast.FusedGRUCell(3, 4)(x[0])
"""
    ran = run("-c", program, folder=tmp_path)
    assert not ran.returncode, ran.stderr
    first, *others = ran.stdout.splitlines()
    assert first.endswith("step by step (not cpu: the C++ extension was not built)")
    assert others == ["torch (not cpu: the C++ extension was not built)"] * 2


@pytest.mark.parametrize("found", ["2.9.0+cu130", "1.13.1", "2.9.0a0+git1234"])
def test_an_old_torch_is_rejected(found):
    wanted = f"namernn_fast needs torch 2.10 or newer, found {found}: pip install --upgrade "
    with pytest.raises(ImportError, match=f"^{re.escape(wanted)}"):
        requirements.check_torch(found)


@pytest.mark.parametrize("found", ["2.10.0a0+git1234", "2.13.0+cpu", "3.0", "unknown"])
def test_a_new_torch_is_accepted(found):
    requirements.check_torch(found)


def test_the_metadata_requires_the_oldest_accepted_torch():
    assert "torch>=" + ".".join(map(str, requirements.TORCH_MINIMUM)) in requires("namernn_fast")


def test_the_version_of_torch_is_checked_before_names_are_imported():
    """Otherwise, an old torch would cause an error about a missing name, not about its version."""
    program = (
        "import sys, types\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "sys.modules['torch'].__version__ = '2.9.1'\n"
        "import namernn_fast.names.text\n"
    )
    ran = run("-c", program, folder=PACKAGE.parent)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ImportError: namernn_fast needs torch 2.10 or newer, found 2.9.1: pip")


def test_a_damaged_extension_is_reported(tmp_path):
    """The ImportError contains the message of the system's loader."""
    extension = copy_without_extension(tmp_path) / "_C.abi3.so"
    extension.write_bytes(b"no library at all")
    program = f"""
import sys
{PLAIN_IMPORTS}
try:
    import namernn_fast
except ImportError as error:
    print(error, error.path, type(error.__cause__).__name__, error.__cause__, sep="\\n")
"""
    ran = run("-c", program, folder=tmp_path)
    message, path, kind, cause = ran.stdout.splitlines()
    assert message.startswith(f"namernn_fast: the C++ extension {extension} cannot be loaded with")
    assert f": {cause}. It was built for another system or another torch" in message
    assert message.endswith("--no-build-isolation)")
    assert (path, kind) == (str(extension), "ImportError")


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_an_extension_that_cannot_be_loaded_raises_an_import_error(error, monkeypatch):
    """The ImportError quotes the loader's error, chains it as the cause and says what to do."""
    cause = error("undefined symbol: aoti_torch_of_tomorrow")

    def fail(name):
        raise cause

    spec = SimpleNamespace(origin="_C.abi3.so")
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(availability.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"of_tomorrow\. .*: reinstall it") as failed:
        availability._load_extension()
    assert failed.value.__cause__ is cause


def test_importing_a_module_runs_its_deferred_action_once(tmp_path, monkeypatch):
    """Neither finding the module's spec nor a failed import runs the action."""
    module = tmp_path / "namernn_fast_imported.py"
    module.write_text("import namernn_fast_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    deferred.when_imported(module.stem, calls.append, "test")
    deferred.when_imported(module.stem, calls.append, "test")
    for _ in range(2):
        assert importlib.util.find_spec(module.stem).origin == str(module)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module.stem)
    module.write_text("value = 1\n" * 2)  # another size, so that Python does not use stale bytecode
    assert not calls
    imported = importlib.import_module(module.stem)
    importlib.reload(imported)
    assert calls == [imported] * 2
    deferred.when_imported(module.stem, calls.append, "test")
    assert calls == [imported] * 3
    monkeypatch.delitem(sys.modules, module.stem)


def test_a_failing_deferred_action_does_not_break_the_import(tmp_path, monkeypatch):
    (tmp_path / "namernn_fast_other.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    deferred.when_imported("namernn_fast_other", lambda module: module.moved, "find what moved")
    said = r"cannot find what moved: AttributeError: .*'moved'.* This is torch .* with 2\.10 to"
    with pytest.warns(RuntimeWarning, match=said):
        importlib.import_module("namernn_fast_other")
    monkeypatch.delitem(sys.modules, "namernn_fast_other")


def test_private_names_that_torch_lacks_are_replaced(monkeypatch):
    """Importing succeeds even if a name has no replacement, but using that name raises an error."""
    owners = {
        torch: ["_foreach_copy_"],
        torch._C: ["_get_tracing_state", "_is_any_autocast_enabled", "_get_fp32_precision_getter"],
        torch._C._autograd: ["_profiler_enabled"],
        torch._C._functorch: ["TransformType", "is_legacy_batchedtensor"],
        torch.autograd.forward_ad: ["_current_level"],
        torch.nn.modules.module: ["_has_any_global_hook"],
        torch.utils._python_dispatch: ["_disable_current_modes"],
    }
    spec = importlib.util.spec_from_file_location("without_names", torch_private.__file__)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patches:
        for owner, names in owners.items():
            for name in names:
                patches.delattr(owner, name)
        spec.loader.exec_module(module)
    paths = {f"{owner.__name__}.{name}" for owner, names in owners.items() for name in names}
    assert {*module.absent} == paths
    assert not torch_private.absent
    assert module._get_tracing_state() is None
    assert module._profiler_enabled()
    assert module._has_any_global_hook()
    assert not module._is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert module._is_any_autocast_enabled()
    for operator in ("matmul", "rnn"):
        expected = torch_private._get_fp32_precision_getter("mkldnn", operator)
        assert module._get_fp32_precision_getter("mkldnn", operator) == expected
    targets = [torch.zeros(2), torch.zeros(3)]
    module._foreach_copy_(targets, [torch.ones(2), torch.ones(3)])
    assert all(target.all() for target in targets)
    assert not module.is_legacy_batchedtensor(targets[0])
    said = r"needs \S+{}, which this torch lacks\. This is torch .* with 2\.10 to 2\.15\. Install"
    with pytest.raises(RuntimeError, match=said.format("_disable_current_modes")):
        module._disable_current_modes()
    with pytest.raises(AttributeError, match=said.format("TransformType")):
        _ = module.TransformType.Vmap
    with pytest.raises(AttributeError, match=said.format("_current_level")):
        _ = module.forward_ad._current_level
