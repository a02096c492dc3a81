"""Compiles the kernels for 64-bit ARM, and runs their native tests in an emulator.

`make compatibility ONLY=arm` runs this program. It needs a cross-compiler and qemu, but no ARM
machine. The tests show whether the kernels are correct on ARM, not how fast they are. The program
also checks that multiply-adds in the machine code use whole NEON registers (16 bytes), and that no
instruction uses SVE, which some processors lack. `--record` writes the results to docs/install.md.
"""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "arm"
COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
EMULATOR = "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", OBJDUMP: "g++-aarch64-linux-gnu"}
PACKAGES[EMULATOR] = "qemu-user"
# The compiler flags that setup.py uses for the kernels.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-Icsrc", "-Wall", "-Wextra")
FLAGS += ("-DNAMERNN_FAST_TEST_CELLS", "-Itests/native")


def output_of(*command) -> str:
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"{command[0]} ended with status {ran.returncode}")
    return ran.stdout


def check_vectors(kernels: Path) -> str:
    """Checks the registers that the machine code uses, and returns a one-line summary."""
    code = output_of(OBJDUMP, "--disassemble", "--no-show-raw-insn", kernels)
    found = {lanes: len(re.findall(rf"\tfmla\tv\d+\.{lanes},", code)) for lanes in ("4s", "2d")}
    if not all(found.values()):
        raise SystemExit(f"multiply-adds do not use whole NEON registers: {found}")
    if wider := re.search(r"^.*\tz\d+\.[bhsd],.*$", code, re.MULTILINE):
        raise SystemExit(f"the kernels use an SVE register: {wider[0]}")
    return (
        f"machine code: {found['4s']} multiply-adds of four floats and {found['2d']} of two "
        "doubles, in registers of 16 bytes; no register of SVE"
    )


def main() -> None:
    """Compiles the kernels, checks the machine code, runs the tests, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write results to docs/install.md")
    options = parser.parse_args()
    if missing := {PACKAGES[tool] for tool in PACKAGES if not shutil.which(tool)}:
        raise SystemExit(f"packages are missing: apt-get install {' '.join(sorted(missing))}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    kernels, tests = FOLDER / "baseline.o", FOLDER / "kernels"
    output_of(COMPILER, *FLAGS, "-Werror", "-c", "csrc/isa/baseline.cpp", "-o", kernels)
    vectors = check_vectors(kernels)
    print(vectors, flush=True)
    native = sorted((ROOT / "tests" / "native").glob("*.cpp"))
    output_of(COMPILER, *FLAGS, "-Wno-psabi", *native, kernels, "-static", "-pthread", "-o", tests)
    ran = output_of(EMULATOR, tests, "baseline")
    print(ran)
    if options.record:
        from benchmarks.harness.pages import write_section
        from benchmarks.harness.paths import DOCS

        tools = [output_of(tool, "--version").splitlines()[0] for tool in (COMPILER, EMULATOR)]
        lines = [*tools, vectors, *ran.splitlines()]
        write_section(DOCS / "install.md", "arm", "\n".join(f"- {line}" for line in lines))


if __name__ == "__main__":
    main()
