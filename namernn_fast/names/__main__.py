"""The command line: `python -m namernn_fast.names COMMAND …`.

Exit codes: 0 for success; 1 for a failure at run time (network, disk, memory, a missing package);
2 for invalid input (options, data, checkpoints, names); 130 when interrupted. Each failure is
reported in one line on standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from namernn_fast import __version__

from .commands import data, evaluate, predict, train
from .commands.arguments import PROGRAM
from .text import InputError, escaped

_COMMANDS = (data, train, evaluate, predict)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        argv: the command-line arguments; `sys.argv[1:]` if None.

    Raises:
        SystemExit: an option is invalid (code 2), or --help or --version was given (code 0).
    """
    try:
        with _warnings_escaped():
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
    except InputError as error:
        return _failed(error, 2)
    except BrokenPipeError:
        # The process that read the output has exited. Without this redirection, Python's flush at
        # exit would report the broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # PyTorch raises RuntimeError when memory runs out or a device lacks an operation.
    except (OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        _report("interrupted")
        return 130
    return 0


def _failed(error: Exception, code: int) -> int:
    _report(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    return code


def _report(text: str) -> None:
    print(f"{PROGRAM}: {escaped(text)}", file=sys.stderr)


class _EscapingFormatter(logging.Formatter):
    """Escapes unprintable characters, which may come from a path or from a server's response."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


@contextmanager
def _warnings_escaped() -> Iterator[None]:
    """Shows this package's warnings on standard error, one line each, while the block runs."""
    logger = logging.getLogger(__package__)
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Parser(argparse.ArgumentParser):
    """Reports an invalid option in one line, with unprintable characters escaped."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {escaped(message)} (--help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="Predict the language of a surname from its characters."
    )
    parser.add_argument("--version", action="version", version=f"namernn_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if the parent process closed the stream
            # A name may contain characters that the terminal's encoding cannot represent.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
