"""Type hints of the public interface: the package declares them, and they hold in a program."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("numpy")
api = pytest.importorskip("mypy.api")

import typed_program  # noqa: E402 - it needs NumPy

ROOT = Path(__file__).parents[2]
PROGRAM = Path(typed_program.__file__)


def check(program, monkeypatch):
    """Returns the errors that mypy, as this project sets it, finds in a program: (line, kind)."""
    monkeypatch.chdir(ROOT)  # with what `make check` has kept of torch in .mypy_cache
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    output, failure, _ = api.run(["--strict", "--no-error-summary", str(program)])
    assert not failure
    found = re.findall(r"^.*?:(\d+): error: .*\[([a-z-]+)\]$", output, re.MULTILINE)
    return [(int(line), kind) for line, kind in dict.fromkeys(found)]


def test_the_package_declares_its_hints():
    """PEP 561: without this file type checkers take no hint from an installed package."""
    assert (files("namernn_fast") / "py.typed").is_file()


def test_a_program_is_checked_strictly(monkeypatch):
    """Every type that the program asserts is right, and every mistake in it is an error."""
    assert check(PROGRAM, monkeypatch) == []


def test_mistakes_are_what_the_check_finds(monkeypatch, tmp_path):
    """Without the comments that expect them, the marked lines alone are errors, of their kind."""
    text = PROGRAM.read_text(encoding="utf-8")
    marked = re.compile(r"  # type: ignore\[([a-z-]+)\]")
    expected = [
        (number, found[1])
        for number, line in enumerate(text.splitlines(), 1)
        if (found := marked.search(line))
    ]
    bare = tmp_path / "bare.py"
    bare.write_text(marked.sub("", text), encoding="utf-8")
    assert check(bare, monkeypatch) == expected
    assert len(expected) > 10  # the pattern has found them


def test_the_program_runs():
    typed_program.main()
