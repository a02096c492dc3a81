"""Installs and tests the wheel in `dist/` in new environments without a compiler.

`make compatibility ONLY=wheel` runs this program. Each environment has one version of Python and
one of torch, which pip downloads (7 GB on disk with GPU libraries). Each environment is deleted
before the next one is created, and its PATH contains only its own programs. The program writes
the results to `build/wheel-test/` and, with `--record`, also to docs/install.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import DOCS, ROOT

FOLDER = ROOT / "build" / "wheel-test"
HERE = Path(__file__).parent
COMPILERS = ("c++", "cc", "clang", "clang++", "cl", "g++", "gcc", "nvcc")
# Versions of Python and torch. `torch` alone means the newest release for that Python. The list
# covers every torch release, and all pairs of the oldest and newest Python and torch.
MATRIX = (
    ("3.10", "torch==2.10.*"),
    ("3.10", "torch"),
    ("3.11", "torch==2.13.*"),
    ("3.12", "torch==2.11.*"),
    ("3.12", "torch==2.12.*"),
    ("3.13", "torch==2.10.*"),
    ("3.13", "torch"),
)
COUNTS = ("passed", "failed", "skipped")


def find_python(version: str) -> str | None:
    """Finds this version of Python on the PATH or in pyenv. Returns its path, or None."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(root.glob(f"versions/{version}.*/bin/python{version}"))
    for python in (shutil.which(f"python{version}"), *map(str, reversed(found))):
        # pyenv puts a `python3.x` on the PATH that fails if this version is not selected.
        if python and not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return python
    return None


def test(python: str, torch: str, wheel: Path, folder: Path) -> dict:
    """Creates an environment, installs the wheel with pip, and runs `test_installed.py` in it.

    Returns:
        The versions of Python and torch, the kernel's name, and a list of tests per outcome.

    Raises:
        subprocess.CalledProcessError: creating the environment or installing the wheel failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "PATH": str(programs), "NAMERNN_FAST_INSTALLED_IN": str(folder)}
    if seen := [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]:
        raise SystemExit(f"the environment has a compiler: {', '.join(seen)}")

    def run(*arguments, **options):
        command = [programs / "python", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, text=True, **options)

    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
    pip += ("--no-compile", "--only-binary", ":all:")
    run(*pip, torch, f"{wheel}[names,onnx]", "pytest>=8", check=True)
    printed = run(
        "-c",
        "import platform, torch, namernn_fast as n\n"
        "print(platform.python_version(), torch.__version__, n.ops.cpu_kernel())",
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    for name in ("test_installed.py", "pytest.ini"):
        shutil.copy(HERE / name, folder)
    run("-m", "pytest", "-c", "pytest.ini", "--junitxml", "results.xml", "test_installed.py")
    suite = ElementTree.parse(folder / "results.xml").getroot()
    outcomes: dict[str, list[str]] = {name: [] for name in COUNTS}
    for case in suite.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped"
        outcomes[outcome if kinds else "passed"].append(case.attrib["name"])
    return dict(zip(("python", "torch", "kernel"), printed.split(), strict=True)) | outcomes


def audit(wheel: Path) -> list[str]:
    """Runs auditwheel and abi3audit on the wheel, and returns their findings, one per line."""
    programs = Path(sys.executable).parent

    def report(*command):
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ran.stdout)

    symbols = report(programs / "auditwheel", "show", "--json", wheel)
    abi3 = report(programs / "abi3audit", "--strict", "--report", wheel)
    (found,) = next(iter(abi3["specs"].values()))["wheel"]
    needed = ", ".join(
        f"{max(versions, key=version_key)} of {library}"
        for library, versions in sorted(symbols["versioned_symbols"].items())
    )
    return [
        f"- name: `{wheel.name}`, {wheel.stat().st_size:,} bytes",
        f"- auditwheel: its symbols allow `{symbols['sym_tag']}`; the newest are {needed}; "
        f"it links {', '.join(symbols['external_libs'])}, which torch brings",
        f"- abi3audit: Python's stable ABI of {found['result']['baseline']}, and "
        f"{len(found['result']['non_abi3_symbols'])} symbols outside it",
    ]


def version_key(version: str) -> list[int]:
    """Returns the numbers in a version such as `GLIBC_2.34` or `2.13.0+cpu`, as a sort key."""
    return [int(part) for part in version.rpartition("_")[2].partition("+")[0].split(".")]


def table(found: list[dict]) -> str:
    """Returns a Markdown table of the environments, and a list of failed and skipped tests."""
    lines = ["| Python | torch | kernel | passed | failed | skipped |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: |"]
    for it in found:
        counts = [str(len(it[name])) for name in COUNTS]
        lines.append(f"| {' | '.join([it['python'], it['torch'], it['kernel'], *counts])} |")
    lines.append("")
    for outcome in ("failed", "skipped"):
        for it in found:
            names = [f"`{name}`" for name in it[outcome]]
            if names:
                lines.append(f"- {outcome} on {it['python']}, {it['torch']}: {', '.join(names)}")
    return "\n".join(lines).rstrip()


def main() -> int:
    """Tests the wheel in every requested environment. Returns 1 if any test failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="test only this version, such as 3.12")
    parser.add_argument("--torch", default="torch", help="torch requirement for pip, with --python")
    parser.add_argument("--record", action="store_true", help="write results to docs/install.md")
    options = parser.parse_args()
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit("dist/ must hold exactly one wheel: run make wheel")
    (wheel,) = wheels
    matrix = ((options.python, options.torch),) if options.python else MATRIX
    FOLDER.mkdir(parents=True, exist_ok=True)
    stored, digest = FOLDER / "results.json", hashlib.sha256(wheel.read_bytes()).hexdigest()
    results = json.loads(stored.read_text()) if stored.exists() else {}
    if results.get("wheel") != digest:
        results = {"wheel": digest, "environments": {}}
    found, left_out = results["environments"], []
    for version, torch in matrix:
        python = find_python(version)
        if not python:
            left_out.append(f"- not run: Python {version} with {torch}, which is not installed")
            print(left_out[-1], flush=True)
            continue
        print(f"Python {version}, {torch}", flush=True)
        folder = FOLDER / "environment"
        found[f"{version} {torch}"] = test(python, torch, wheel, folder)
        stored.write_text(json.dumps(results))
        shutil.rmtree(folder)
    ordered = sorted(
        found.values(), key=lambda it: [version_key(it[k]) for k in ("python", "torch")]
    )
    text = "\n\n".join([table(ordered), *(["\n".join(left_out)] if left_out else [])])
    facts = "\n".join(audit(wheel))
    print(f"\n{facts}\n\n{text}")
    if options.record:
        write_section(DOCS / "install.md", "wheel", facts)
        write_section(DOCS / "install.md", "environments", text)
    return any(it["failed"] for it in found.values())


if __name__ == "__main__":
    sys.exit(main())
