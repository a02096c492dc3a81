"""Tests that the package declares type hints, and that they are correct for a user's program."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("numpy")
api = pytest.importorskip("mypy.api")

import typed_program  # noqa: E402 - typed_program needs NumPy

ROOT = Path(__file__).parents[2]
PROGRAM = Path(typed_program.__file__)


def test_the_package_contains_py_typed():
    """Without py.typed, type checkers ignore the hints of an installed package (PEP 561)."""
    assert (files("namernn_fast") / "py.typed").is_file()


@pytest.mark.slow
def test_strict_checking_finds_exactly_the_marked_errors(monkeypatch, tmp_path):
    """Every asserted type is correct, and every marked mistake is an error.

    The test removes the `type: ignore` comments. mypy must then report errors of the given kinds on
    exactly these lines.
    """
    text = PROGRAM.read_text(encoding="utf-8")
    marked = re.compile(r"  # type: ignore\[([a-z-]+)\]")
    expected = [
        (number, found[1])
        for number, line in enumerate(text.splitlines(), 1)
        if (found := marked.search(line))
    ]
    assert len(expected) > 10  # fails if the pattern stops matching
    bare = tmp_path / "bare_program.py"
    bare.write_text(marked.sub("", text), encoding="utf-8")

    monkeypatch.chdir(ROOT)  # to reuse the .mypy_cache of `make check`
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    output, failure, _ = api.run(["--strict", "--no-error-summary", str(PROGRAM), str(bare)])
    assert not failure
    errors = re.findall(r"^(.*?):(\d+): error: .*\[([a-z-]+)\]$", output, re.MULTILINE)
    found = list(dict.fromkeys((Path(file).name, int(line), kind) for file, line, kind in errors))
    assert found == [("bare_program.py", line, kind) for line, kind in expected]


def test_the_typed_program_runs():
    typed_program.main()
