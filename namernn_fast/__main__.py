"""The command line: `python -m namernn_fast`, and `python -m namernn_fast bench`.

Without a command, the program prints versions, the processor's capability, the available paths,
and advice on making calls faster. Exit codes: 0 for success; 1 for a failure, such as a failed
check, an unwritable file or a missing package; 2 for invalid options; 130 when interrupted. On
failure, the program prints one line to standard error.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, ops
from .bench import command as bench
from .machine import advice
from .machine.scratch_memory import memory_reserved
from .testing import BudgetError

PROGRAM = "python -m namernn_fast"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the command-line arguments; None for `sys.argv[1:]`.

    Raises:
        SystemExit: an option is invalid (exit code 2), or help or the version was requested.
    """
    try:
        options = _parser().parse_args(argv)
        options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe. Redirect stdout, because Python flushes it at exit and would
        # report the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # PyTorch raises RuntimeError when memory runs out.
    except (BudgetError, OSError, RuntimeError, MemoryError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{PROGRAM}: error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Show what this installation uses, and what would make it faster.",
        epilog=f"The surname classifier has a separate command line: {PROGRAM}.names --help",
    )
    parser.add_argument("--version", action="version", version=f"namernn_fast {__version__}")
    parser.set_defaults(run=_show)
    bench.add_parser(parser.add_subparsers(metavar="COMMAND"))
    return parser


def _show(options: argparse.Namespace) -> None:
    """Prints one line per fact about this installation, and then advice on speed."""
    facts = advice.gather()
    lines = {
        "namernn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "CPU capability (ATen)": torch.backends.cpu.get_cpu_capability(),
        "threads": facts.threads,
        "processors": facts.usable,
        "fused kernel": _cpu() if facts.has_extension else "none (built without a compiler)",
        "scratch memory reserved": _scratch(),
        "fused kernel on GPUs": _triton(),
        "other devices and dtypes": "GRU and LSTM: torch's; others: step by step in ATen operators",
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    paragraphs = advice.advise(facts)
    print("\nFaster:" if paragraphs else "\nFaster: nothing known would make it faster here.")
    for paragraph in paragraphs:
        print(advice.wrapped(paragraph))


def _cpu() -> str:
    """Returns the CPU kernel's instruction set, and those for bfloat16 and int8 if different."""
    usual = ops.cpu_kernel()
    text = f"cpu {usual}"
    for name, dtype in ("bfloat16", torch.bfloat16), ("int8", torch.int8):
        kernel = ops.cpu_kernel(dtype)
        text += f", {name}: cpu {kernel}" if kernel != usual else ""
    return text


def _scratch() -> str:
    """Returns how much scratch memory is reserved, its limit, and the function that frees it."""
    mebi = memory_reserved() / 2**20
    return f"{mebi:.0f} MiB, at most 256 MiB in a process; empty_cache() returns it to the system"


def _triton() -> str:
    """Returns the version of Triton and the cells that use it, or a note that it is missing."""
    try:
        import triton
    except ImportError:
        return "none (Triton is not installed)"
    return f"triton {triton.__version__}, for vanilla RNNs; other cells have no fused kernel there"


def _escape_unsupported_characters() -> None:
    """Makes stdout and stderr escape characters that they cannot encode, such as the × sign."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if the parent process closed the stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


if __name__ == "__main__":
    _escape_unsupported_characters()
    sys.exit(main())
