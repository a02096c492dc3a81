"""Runs other libraries' tests of recurrent layers with torch's layers and with the fused layers.

Installs the libraries of `suites.py` in a separate environment, `build/third-party/venv`. Fetches
test files from a library's repository if its package lacks them. Runs every suite with torch's
layers, and again with the fused layers under the same names. Writes both outcomes to
`build/third-party/results.md`. Exits with status 1 if a suite cannot run, or if a test fails only
with the fused layers. If a repository is unreachable, set git's `url.<base>.insteadOf` to a mirror.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from report import LAYERS, Result, text_of
from suites import SUITES, Checkout, Suite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "third-party"
VENV = FOLDER / "venv"
PYTHON = VENV / "bin" / "python"


def python(*arguments: str) -> str:
    """Runs the environment's Python, and returns its output."""
    return subprocess.run(
        [PYTHON, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def install(suites: list[Suite]) -> Path:
    """Installs the libraries, and makes this checkout importable in the environment.

    Returns:
        The environment's site-packages folder.
    """
    if not PYTHON.exists():
        venv.create(VENV, symlinks=True, with_pip=True)
    wanted = sorted({requirement for suite in suites for requirement in suite.requirements})
    print(f"Installing {', '.join(wanted)}", flush=True)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    python(*pip, "torch>=2.10")
    python(*pip, "pytest>=8", *wanted)
    site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    link = site / "namernn_fast"
    if not link.is_symlink():
        link.symlink_to(ROOT / "namernn_fast")
    mend_torchaudio(site)
    return site


def mend_torchaudio(site: Path) -> None:
    """Removes torchaudio's compiled libraries if they cannot be loaded.

    Speechbrain imports torchaudio, but a torchaudio built for GPUs cannot be loaded with a torch
    built for CPUs. After these libraries are removed, torchaudio can be imported.
    """
    libraries = site / "torchaudio" / "lib"
    imports = [PYTHON, "-c", "import torchaudio"]
    if libraries.exists() and subprocess.run(imports, capture_output=True).returncode:
        shutil.rmtree(libraries)


def fetch(checkout: Checkout, site: Path) -> Path:
    """Downloads the test files of a checkout, and returns their folder."""
    name = checkout.repository.rpartition("/")[2]
    folder = FOLDER / "sources" / f"{name}-{checkout.tag}"
    if not folder.exists():
        clone = FOLDER / "sources" / f"{name}.git"
        shutil.rmtree(clone, ignore_errors=True)
        url = f"https://github.com/{checkout.repository}"
        options = ["--bare", "--quiet", "--depth=1", "--filter=blob:none"]
        subprocess.run(["git", "clone", *options, "-b", checkout.tag, url, clone], check=True)
        folder.mkdir()
        files = ["checkout", "--quiet", checkout.tag, "--", *checkout.paths]
        subprocess.run(["git", "--git-dir", clone, "--work-tree", folder, *files], check=True)
        shutil.rmtree(clone)
    if checkout.package:
        shutil.copytree(folder / checkout.paths[0], site / checkout.package, dirs_exist_ok=True)
    return folder


def run_suite(suite: Suite, site: Path) -> Result:
    """Runs the tests of a suite with torch's layers, then with the fused layers."""
    try:
        sources = fetch(suite.checkout, site) if suite.checkout else FOLDER
    except subprocess.CalledProcessError:
        return Result(suite, {}, "its test files could not be fetched")
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    environment |= {name: value.format(site=site) for name, value in suite.environment.items()}
    work = FOLDER / "work"  # where tests leave their files
    results = FOLDER / "results"
    for folder in (work, results):
        folder.mkdir(exist_ok=True)
    outcomes = {}
    for layer in LAYERS:
        print(f"{suite.library}, {layer}", flush=True)
        written = results / f"{suite.library}-{layer}.json"
        written.unlink(missing_ok=True)
        command = [PYTHON, "-m", "pytest", "-p", "layer_plugin", "-p", "no:cacheprovider"]
        # Ignore the configuration and the conftest.py of this project's tests.
        command += ["-c", FOLDER / "pytest.ini", "--rootdir", ROOT, "--confcutdir", HERE]
        command += ["--layers", layer, "--outcomes", written]
        if outcomes:
            command += ["--only-tests-of", results / f"{suite.library}-{LAYERS[0]}.json"]
        command += [argument.format(sources=sources) for argument in suite.tests]
        with open(written.with_suffix(".log"), "w") as log:
            code = subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=log)
        # Status 0: all tests passed. Status 1: some failed. Otherwise there is nothing to compare.
        if code.returncode not in (0, 1) or not written.exists():
            return Result(suite, {}, f"pytest ended with status {code.returncode}")
        outcomes[layer] = json.loads(written.read_text())
    return Result(suite, outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted({suite.library for suite in SUITES}))
    parser.add_argument(
        "--record", action="store_true", help="also replace the section of docs/differences.md"
    )
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record needs every library: leave out --only")
    suites = [suite for suite in SUITES if options.only in (None, suite.library)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "sources").mkdir(exist_ok=True)
    (FOLDER / "pytest.ini").write_text("[pytest]\n")
    site = install(suites)
    results = [run_suite(suite, site) for suite in suites]
    text = text_of(results, python("-c", "import torch; print(torch.__version__)"))
    (FOLDER / "results.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten: build/third-party/results.md")
    if options.record:
        from benchmarks.harness.pages import write_section

        write_section(ROOT / "docs" / "differences.md", "third-party", text)
    return int(any(result.trouble or result.failing_here_alone() for result in results))


if __name__ == "__main__":
    sys.exit(main())
