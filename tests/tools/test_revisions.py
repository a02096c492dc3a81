"""Tests the tools that compare the bits and the speed of two revisions."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import namernn_fast
from tools.revisions import bits, builds, digest, speed
from tools.revisions.probes import DTYPES, LAYERS, LAYOUTS, all_probes

CHECKOUT = pytest.mark.skipif(
    not (builds.ROOT / ".git").exists(), reason="needs a checkout of the repository"
)
SAME = {"a": {"output": "1", "h_n": "2"}, "b": {"output": "3"}}
# The smallest workload of each cell, family and mode.
WORKLOADS = [
    *{
        (workload.cell, workload.family, workload.mode): workload
        for workload in reversed(speed.WORKLOADS)
    }.values()
]
CELLS = tuple(LAYERS)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (SAME, []),
        ({**SAME, "b": {"output": "4"}}, ["b: differs in output"]),
        ({**SAME, "a": {"output": "1"}}, ["a: differs in h_n"]),
        ({"a": SAME["a"]}, ["b: differs in output"]),
        ({**SAME, "c": {"raised": "Error"}}, ["c: differs in raised"]),
        ({**SAME, "b": {"raised": "Error"}}, ["b: differs in output, raised"]),
    ],
    ids=["same", "digest", "missing result", "missing probe", "more probes", "new error"],
)
def test_every_kind_of_difference_between_revisions_is_reported(other, expected):
    assert bits.findings(SAME, other) == expected


def test_a_probe_that_raises_in_both_revisions_is_reported():
    raises = {"a": {"raised": "Error"}}
    assert bits.findings(raises, raises) == ["a: raises in both revisions, Error"]


def test_a_call_that_only_the_older_revision_rejects_is_not_reported(monkeypatch):
    assert bits.findings({**SAME, "a": {"raised": "Error"}}, SAME) == []
    monkeypatch.delattr(namernn_fast, LAYERS["leaky"])
    assert "raised" in digest.digests_of(all_probes(["leaky"])[0])


@pytest.mark.parametrize(
    ("new", "same"), [(SAME, True), ({}, False), ({**SAME, "b": {"output": "4"}}, False)]
)
def test_bits_match_only_if_an_instruction_set_was_compared(new, same, monkeypatch, capsys):
    """An instruction set that only one of the revisions runs counts as a difference."""
    digests = {("base", "avx2"): SAME, ("new", "avx2"): new}
    monkeypatch.setattr(builds, "build", lambda revision: revision)
    monkeypatch.setattr(bits, "digests_of", lambda *which: digests.get(which, {}))
    monkeypatch.setattr("sys.argv", ["bits", "base", "new"])
    assert bits.main() == same
    assert "Instruction sets compared: avx2.\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bits", "base", "new", "--levels", "amx"])
    assert not bits.main()


@pytest.mark.parametrize("call", ["module", "function", "cell"])
@pytest.mark.parametrize("cell", CELLS[1:])
def test_digests_include_the_last_states_for_every_kind_of_call(cell, call):
    last = {"h_n", "c_n"} if cell in ("lstm", "leaky") else {"h_n"}
    for probe in [probe for probe in all_probes([cell]) if probe.call == call][:5]:
        found = digest.digests_of(probe)
        assert {*found} & {"h_n", "c_n", "raised"} == last, found


@pytest.mark.covering(0)
@pytest.mark.parametrize("cell", CELLS)
def test_probes_have_unique_names_and_cover_all_options(cell):
    probes = all_probes([cell])
    assert len({probe.name for probe in all_probes()}) == len(all_probes())
    assert {probe.cell for probe in probes} == {cell}
    for dtype in DTYPES:
        for layout in LAYOUTS:
            chosen = [c for c in probes if (c.dtype, c.layout) == (dtype, layout)]
            for option in ("bias", "batch_first", "bidirectional", "hx", "strided"):
                assert {getattr(c, option) for c in chosen} == {False, True}
            assert {c.num_layers for c in chosen} >= {1, 3}
            assert {c.batch_invariant for c in chosen} == {False, True}
    assert probes == all_probes([cell])


FAST, WIDE = [(1.0, 1.0)] * 12, [(1.0, 1.3), (1.3, 1.0)] * 6


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (FAST, "\nAs fast.\n"),
        ([(1.0, 1.01)] * 12, "\nthe geometric mean is slower: 0.990 (0.990 to 0.990)\n"),
        ([(1.0, 1.1)] * 12, "-B16 is more than 4% slower: 0.909 (0.909 to 0.909)\n"),
        (WIDE, "\nNot shown to be slower, but 2 of 2 intervals include more than 4% slower"),
        ([*FAST, (1.0, 100.0)], "\nAs fast.\n"),  # one pair is disturbed
    ],
    ids=["same", "1 %", "10 %", "unsettled", "disturbed"],
)
def test_speed_reports_the_expected_verdict(pairs, message, monkeypatch, capsys):
    monkeypatch.setattr(builds, "build", lambda revision: builds.Build("new", Path()))
    laps = iter(pairs)
    monkeypatch.setattr(speed, "time_rounds", lambda *given: [(next(laps),) * len(given[3])])
    options = ["--laps", str(len(pairs)), "--workloads", "^packed-.*-B16$"]
    monkeypatch.setattr("sys.argv", ["speed", "base", "new", *options])
    assert speed.main() == ("slower: 0." not in message)
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_speed_times_every_kind_of_workload_in_both_builds(monkeypatch):
    asked, ask = [], speed.ask
    monkeypatch.setattr(speed, "ask", lambda *what: asked.append(what) or ask(*what))
    build = builds.Build("this", builds.ROOT)
    rounds = speed.time_rounds(build, build, 1, WORKLOADS)
    assert [len(pairs) for pairs in rounds] == [len(WORKLOADS)] * 2
    assert all(0 < seconds < 10 for pairs in rounds for pair in pairs for seconds in pair)
    processes = dict.fromkeys(process for process, _ in asked)
    assert len(processes) == 2
    for each in processes:
        prepared = [what for process, what in asked if process is each and isinstance(what, dict)]
        assert prepared == [asdict(speed.probe_of(workload)) for workload in WORKLOADS]


@CHECKOUT
def test_hashing_the_working_tree_does_not_change_the_git_index():
    before = builds.git("status", "--porcelain")
    tree = builds.tree_of(builds.WORKING_TREE)
    assert builds.git("cat-file", "-t", tree) == b"tree\n"
    assert builds.git("status", "--porcelain") == before
    assert (tree == builds.tree_of("HEAD")) == (not before)


@CHECKOUT
def test_an_unknown_revision_raises_an_error():
    with pytest.raises(SystemExit, match="no-such-revision"):
        builds.tree_of("no-such-revision")


def planted_tree(folder):
    """Changes a coefficient of the float32 tanh in a copy of HEAD. Returns the copy's tree hash."""
    path = "csrc/kernel/math/nonlinearities.h"
    index = {"env": os.environ | {"GIT_INDEX_FILE": f"{folder}/index"}}
    source = builds.git("show", f"HEAD:{path}")
    assert source.count(b"0.666661717641f") == 1
    planted = source.replace(b"0.666661717641f", b"0.66666178f")
    blob = builds.git("hash-object", "-w", "--stdin", input=planted).decode().strip()
    builds.git("read-tree", "HEAD", **index)
    builds.git("update-index", "--cacheinfo", f"100644,{blob},{path}", **index)
    return builds.git("write-tree", **index).decode().strip()


# This compiler's `--version` differs from the real one's, so its builds are cached separately.
SPARING_COMPILER = """#!/bin/sh
case "$*" in
  *--version*) $COMPILER "$@"; echo "sparing" ;;
  *baseline.cpp*) exec $COMPILER "$@" ;;
  *csrc/isa/*) exec $COMPILER "$@" -O0 ;;
  *) exec $COMPILER "$@" -O1 ;;
esac
"""


@CHECKOUT
@pytest.mark.slow
def test_a_planted_change_of_the_last_bit_is_reported(tmp_path):
    """Compares HEAD with a copy in which a coefficient differs. Caches builds in build/revisions.

    To save time, the compiler optimises only the kernels that run.
    """
    compiler = tmp_path / "compiler"
    compiler.write_text(SPARING_COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "tools.revisions.bits", "HEAD", planted_tree(tmp_path)]
    command += ["--levels", "default"]
    environment = {"CXX": str(compiler), "COMPILER": os.environ.get("CXX", "c++")}
    environment = os.environ | environment
    ran = subprocess.run(command, cwd=builds.ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    differing = [line for line in ran.stdout.splitlines() if ": differs in " in line]
    assert differing
    # The change affects the float32 tanh, which 16-bit dtypes use too, and the sigmoid, which
    # leaky cells apply to their rates.
    relu = [line for line in differing if "nonlinearity=relu" in line]
    assert not any("float64" in line for line in differing)
    assert all("cell=leaky" in line for line in relu)
