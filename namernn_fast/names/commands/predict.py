"""`predict`: predicts the languages of names, given as arguments or in a file of any length."""

from __future__ import annotations

import argparse
import gc
import gzip
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ..answers import answer_rows
from ..files import Used, check_no_overwrite, check_replaceable, is_same_file, replacing
from ..tables import FORMATS, Rows, Table, delimiter_of, format_of, read_table
from ..text import InputError, escaped
from ..writers import WRITERS, CsvWriter, Writer
from ..writers import format_of as output_format_of
from .arguments import COUNT, PROBABILITY, add_model, load_predictor, path, say
from .arguments import add_parser as add_command

_STDIN, _STDOUT = 0, 1  # file descriptors

_EPILOG = """
The output has one row for each name, in order, with the other columns of the input. If a name
cannot be read, its row contains an error, and standard error reports the number of such names. The
exit code is 2 if there are names, but none could be read. In tables and CSV, characters that are
not printable are written as escapes such as \\x1b, and so is the first character of a CSV cell that
a spreadsheet would treat as a formula; numbers stay as they are.
"""


def add_parser(commands: Any) -> None:
    """Adds the command `predict` to the command line."""
    parser = add_command(commands, "predict", run, "predict the languages of names")
    parser.epilog = _EPILOG
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "names",
        nargs="*",
        default=[],
        metavar="NAME",
        help="a name, or - for standard input, which is the default unless it is a terminal",
    )
    source.add_argument(
        "--input", type=path, metavar="FILE", help="a file of names, or - for standard input"
    )
    add_model(parser)
    parser.add_argument("--top", type=COUNT, default=3, help="how many languages to report")
    parser.add_argument(
        "--min-probability",
        type=PROBABILITY,
        default=0.0,
        metavar="P",
        help="omit languages below this probability; a name without any language is unknown",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input-format",
        choices=FORMATS,
        help="text: one name per line; jsonl: one string or object per line (default: the format "
        "that the file's suffix stands for, else text)",
    )
    group.add_argument(
        "--column",
        help="the column of the names in CSV, by title or number from 1, or the key of the names "
        "in JSON objects (default: the only column or key, else 'name')",
    )
    group.add_argument(
        "--delimiter",
        type=_delimiter,
        metavar="SIGN",
        help="the sign between the cells of CSV, or 'tab' (default: the sign in a first line such "
        "as sep=; or else a comma; a tab in .tsv files)",
    )
    group.add_argument(
        "--no-header", action="store_true", help="the first row of CSV is data, not a header"
    )
    group.add_argument(
        "--encoding",
        type=_encoding,
        default="utf-8",
        help="the encoding of the input, such as cp1252 or utf-16",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=path, metavar="FILE", help="the file to write (default: standard output)"
    )
    group.add_argument(
        "--format",
        choices=[*WRITERS],
        help="the format to write (default: what the suffix of --output stands for, else table)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Predicts the languages of the names, and writes the answers."""
    if not arguments.names and arguments.input is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("there are no names: pass some, --input FILE, or - for standard input")
        arguments.names = ["-"]
    if arguments.names == ["-"]:
        arguments.input = Path("-")
    output = _output(arguments)
    format = arguments.format or "table"
    # Check the path first, so that a bad path fails before the predictions, not after them.
    if output is not None and not _is_stream(output):
        format = arguments.format or output_format_of(output)
        if not output.resolve().parent.is_dir():
            raise InputError(f"{output}: there is no folder {output.parent}")
        check_replaceable(output)
    with _table(arguments) as table:
        predictor = load_predictor(arguments)
        top = min(arguments.top, len(predictor.languages))
        delimiter = "," if output is None else delimiter_of(output)
        weak = predictor.checkpoint.weak_languages()
        writer = WRITERS[format](top, table.titles, delimiter, weak)
        count = failed = 0
        head = writer.head()
        with _target(output, format) as write, _frozen():
            for rows in table.rows:
                answers = answer_rows(predictor, rows, top, arguments.min_probability)
                # Write the head only after the first chunk has been read, because reading can fail.
                write(head + writer.body(answers))
                head = ""
                count += len(answers)
                failed += len(answers.rows.errors)
            write(head)
    _report(writer, count, failed, output)


def _report(writer: Writer, count: int, failed: int, output: Path | None) -> None:
    """Reports how many rows were written, and how many names could not be read.

    Raises:
        InputError: no name could be read.
    """
    if output is not None:
        say(f"wrote {count:,} {'row' if count == 1 else 'rows'} to {output}")
    if isinstance(writer, CsvWriter) and writer.left_out:
        say(
            f"{writer.left_out:,} of {count:,} rows have keys that the first JSON object lacks; "
            "CSV leaves them out, JSON lines keep them"
        )
    if failed == count > 0:
        # Flush, so that on a terminal the answers appear before the error.
        if sys.stdout is not None:
            sys.stdout.flush()
        raise InputError(
            "the name could not be read" if count == 1 else f"none of {count:,} names could be read"
        )
    if failed:
        say(f"{failed:,} of {count:,} names could not be read")


def _encoding(text: str) -> str:
    """Parses the name of a text encoding for argparse."""
    try:
        "a".encode(text)
    except LookupError as error:
        reason = f"'{escaped(text)}' is not an encoding that Python knows, such as cp1252"
        raise argparse.ArgumentTypeError(reason) from error
    return text


def _delimiter(text: str) -> str:
    """Parses the CSV delimiter for argparse."""
    sign = "\t" if text == "tab" else text
    if len(sign) != 1 or sign in '"\r\n\0' or not sign.isascii():
        raise argparse.ArgumentTypeError(f"'{escaped(text)}' is not a single character or 'tab'")
    return sign


def _output(arguments: argparse.Namespace) -> Path | None:
    """Returns the file to write, or None for standard output.

    Raises:
        InputError: the output would overwrite an input.
    """
    output: Path | None = arguments.output
    # /dev/stdout may be a regular file with other content, which must not be replaced.
    if output == Path("-") or (output is not None and is_same_file(output, _STDOUT)):
        output = None
    inputs: list[Used] = [("--checkpoint", arguments.checkpoint)]
    if arguments.input == Path("-"):
        inputs.append(("standard input", _STDIN))
    elif arguments.input is not None:
        inputs.append(("--input", arguments.input))
    written: Used = ("standard output", _STDOUT) if output is None else ("--output", output)
    check_no_overwrite([written], inputs)
    return output


def _is_stream(path: Path) -> bool:
    """Returns whether to write to `path` directly, because it is a device or a named pipe."""
    return path.is_char_device() or path.is_fifo()


@contextmanager
def _table(arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the input table; its rows are read lazily."""
    path: Path | None = arguments.input
    if path is None:
        for name in arguments.names:
            if Path(name).suffix and os.path.isfile(name):
                say(f"{name} is read as a name; --input {shlex.quote(name)} reads the file")
        yield Table(["name"], [Rows(arguments.names)])
        return
    if path == Path("-"):
        if sys.stdin is None:
            raise InputError("standard input is closed")
        file: AbstractContextManager[BinaryIO] = nullcontext(sys.stdin.buffer)
    else:
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise InputError(f"{path}: there is no such file") from error
        except IsADirectoryError as error:
            raise InputError(f"{path}: a folder, but --input takes a file") from error
    with file as opened:
        is_packed = path.suffix.lower() == ".gz"
        source: Any = gzip.GzipFile(fileobj=opened) if is_packed else opened
        try:
            yield read_table(
                source,
                arguments.input_format or format_of(_named(path)),
                arguments.column,
                delimiter=arguments.delimiter,
                default_delimiter=delimiter_of(_named(path)),
                header=not arguments.no_header,
                encoding=arguments.encoding,
            )
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: damaged, or not a gzip file ({error})") from error


def _named(path: str | Path) -> Path:
    """Returns the path without .gz, so that its suffix says what a compressed file contains."""
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


@contextmanager
def _frozen() -> Iterator[None]:
    """Hides existing objects from the garbage collector.

    Otherwise the collector keeps traversing PyTorch's objects, which takes about 10 % of the run
    time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _target(output: Path | None, format: str) -> Iterator[Callable[[str], object]]:
    """Yields a function that writes text to `output`, or to standard output if `output` is None."""
    if output is None:
        if sys.stdout is None:
            raise InputError("standard output is closed")
        if format == "jsonl":  # JSON is always UTF-8
            sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        yield sys.stdout.write
        return
    with output.open("wb") if _is_stream(output) else replacing(output) as file:
        yield lambda text: file.write(text.encode())
