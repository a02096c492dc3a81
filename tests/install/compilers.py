"""Builds the extension with every C++ compiler on this machine, with warnings as errors.

`make compatibility ONLY=compilers` runs this program. `CXX=clang++-19` selects a single compiler.
Warnings in the headers of torch and Python are ignored. `--record` writes the results to
docs/install.md.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch.utils.cpp_extension

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"(g|clang)\+\+(-\d+)?")


def compilers() -> list[str]:
    """Returns one name for each C++ compiler on the PATH."""
    files = {}
    for folder in os.environ["PATH"].split(os.pathsep):
        for file in sorted(Path(folder).glob("*++*"), key=lambda file: len(file.name)):
            if NAME.fullmatch(file.name):
                files.setdefault(file.resolve(), file.name)
    return sorted(files.values())


def build(compiler: str) -> bool:
    """Builds the extension. Returns whether the build succeeds without warnings."""
    headers = [*torch.utils.cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = shlex.join(["-Wall", "-Wextra", "-Werror", *(f"-isystem{path}" for path in headers)])
    # Depending on its version, setuptools reads CFLAGS or CXXFLAGS for C++.
    environment = {**os.environ, "CXX": compiler, "CFLAGS": flags, "CXXFLAGS": flags}
    folder = ROOT / "build" / "warnings" / Path(compiler).name
    command = [sys.executable, "setup.py", "-q", "build", "--force"]
    command += ["--build-lib", folder / "lib", "--build-temp", folder]
    return not subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    """Builds with every compiler. Returns the number of builds that fail or emit warnings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compilers", nargs="*", help="compilers to use instead of all on PATH")
    parser.add_argument("--record", action="store_true", help="write results to docs/install.md")
    options = parser.parse_args()
    lines, failed = [], 0
    for compiler in options.compilers or compilers():
        version = subprocess.run(
            [compiler, "--version"], stdout=subprocess.PIPE, text=True, check=True
        )
        good = build(compiler)
        failed += not good
        outcome = "builds without a warning" if good else "does not build without a warning"
        lines.append(f"- {version.stdout.splitlines()[0]}: {outcome}")
        print(lines[-1], flush=True)
    if options.record:
        from benchmarks.harness.pages import write_section
        from benchmarks.harness.paths import DOCS

        write_section(DOCS / "install.md", "compilers", "\n".join(lines))
    return failed


if __name__ == "__main__":
    sys.exit(main())
