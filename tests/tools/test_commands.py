"""Tests that `make help`, CONTRIBUTING.md and the pre-commit hooks name the same commands."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_contributing_md_lists_the_commands_of_make_help():
    shown = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
    commands = re.findall(r"^  ([a-z-]+) ", shown, flags=re.MULTILINE)
    listed = re.findall(r"^\| `make ([a-z-]+)` \|", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)
    assert "check" in commands
    assert sorted(listed) == sorted(commands)


def test_pre_commit_hooks_run_the_commands_of_make_check():
    """A hook may omit the files at the end of a command, because pre-commit appends them."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", text_of("Makefile"), flags=re.MULTILINE)[1]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    hooks = re.findall(r"^ +entry: (.*)$", text_of(".pre-commit-config.yaml"), flags=re.MULTILINE)
    for command, hook in zip(commands, hooks, strict=True):
        assert command.startswith(hook)
