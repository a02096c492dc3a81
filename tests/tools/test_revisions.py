"""The tool that compares two revisions: what it concludes, and that it notices a planted change."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import namernn_fast
from benchmarks.harness.grid import CELLS_OF_EVERY_RUN, GATED_KINDS
from tools.revisions import bits, builds, digest, speed
from tools.revisions.cases import DTYPES, LAYERS, LAYOUTS, all_cases

CHECKOUT = pytest.mark.skipif(
    not (builds.ROOT / ".git").exists(), reason="needs a checkout of the repository"
)
SAME = {"a": {"output": "1", "h_n": "2"}, "b": {"output": "3"}}
# The smallest of each kind, family and mode.
CELLS = [
    *{(cell.kind, cell.family, cell.mode): cell for cell in reversed(CELLS_OF_EVERY_RUN)}.values()
]
KINDS = tuple(LAYERS)
OLD, NEW = builds.Build("old", Path()), builds.Build("new", Path(), KINDS)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (SAME, []),
        ({**SAME, "b": {"output": "4"}}, ["b: differs in output"]),
        ({**SAME, "a": {"output": "1"}}, ["a: differs in h_n"]),
        ({"a": SAME["a"]}, ["b: differs in output"]),
        ({**SAME, "c": {"raised": "Error"}}, ["c: differs in raised"]),
    ],
    ids=["same", "digest", "missing result", "missing case", "more cases"],
)
def test_every_kind_of_difference_is_found(other, expected):
    assert bits.findings(SAME, other) == expected


def test_a_case_that_raises_compares_nothing():
    raises = {"a": {"raised": "Error"}}
    assert bits.findings(raises, raises) == ["a: raises in both revisions, Error"]


@pytest.mark.parametrize(
    ("new", "same"), [(SAME, True), ({}, False), ({**SAME, "b": {"output": "4"}}, False)]
)
def test_bits_agree_where_an_instruction_set_was_compared(new, same, monkeypatch, capsys):
    """A level that only one revision runs differs, and what no revision runs does not count."""
    digests = {("base", "avx2", KINDS): SAME, ("new", "avx2", KINDS): new}
    monkeypatch.setattr(builds, "build", lambda revision: revision)
    monkeypatch.setattr(builds, "common_kinds", lambda base, new: KINDS)
    monkeypatch.setattr(bits, "digests_of", lambda *which: digests.get(which, {}))
    monkeypatch.setattr("sys.argv", ["bits", "base", "new"])
    assert bits.main() == same
    assert "Instruction sets compared: avx2.\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bits", "base", "new", "--levels", "amx"])
    assert not bits.main()


@pytest.mark.parametrize(
    ("base", "new", "kinds", "missing"),
    [(NEW, NEW, [*KINDS], ""), (OLD, NEW, ["rnn"], "old"), (NEW, OLD, ["rnn"], "old")],
    ids=["both", "base lacks them", "revision lacks them"],
)
def test_a_kind_is_compared_if_both_revisions_have_it(
    base, new, kinds, missing, monkeypatch, capsys
):
    assert builds.common_kinds(base, new) == tuple(kinds)
    said = [
        f"The kind {kind!r} is not compared: {missing} does not have it."
        for kind in KINDS
        if kind not in kinds
    ]
    assert capsys.readouterr().out.splitlines() == said

    timed = []
    monkeypatch.setattr(builds, "build", {"base": base, "new": new}.get)
    monkeypatch.setattr(
        speed,
        "time_round",
        lambda *arguments: timed.extend(arguments[4]) or [(1.0, 1.0)] * len(arguments[4]),
    )
    monkeypatch.setattr("sys.argv", ["speed", "base", "new", "--rounds", "2"])
    assert speed.main()
    assert [*dict.fromkeys(cell.kind for cell in timed)] == kinds

    asked = []
    monkeypatch.setattr(bits, "digests_of", lambda *which: asked.append(which[2]) or SAME)
    monkeypatch.setattr("sys.argv", ["bits", "base", "new"])
    assert bits.main()
    assert {*asked} == {tuple(kinds)}


@pytest.mark.parametrize("kind", GATED_KINDS)
def test_a_revision_without_a_kind_can_still_be_digested(kind, monkeypatch):
    for name in (LAYERS[kind], f"{LAYERS[kind]}Cell", kind):
        monkeypatch.delattr(namernn_fast, name)
    monkeypatch.delitem(sys.modules, "tools.revisions.digest", raising=False)
    digest = importlib.import_module("tools.revisions.digest")
    monkeypatch.delitem(sys.modules, "tools.revisions.digest")
    of_rnn, of_kind = (all_cases([known])[0] for known in ("rnn", kind))
    assert "raised" not in digest.digests_of(of_rnn)
    assert "raised" in digest.digests_of(of_kind)


@pytest.mark.parametrize("call", ["module", "function", "cell"])
@pytest.mark.parametrize("kind", GATED_KINDS)
def test_a_kind_has_digests(kind, call):
    last = {"h_n", "c_n"} if kind == "lstm" else {"h_n"}
    for case in [case for case in all_cases([kind]) if case.call == call][:3]:
        found = digest.digests_of(case)
        assert {*found} & {"h_n", "c_n", "raised"} == last, found


@pytest.mark.parametrize("kind", KINDS)
def test_cases_have_names_of_their_own_and_cover_every_layout_and_dtype(kind):
    cases = all_cases([kind])
    assert len({case.name for case in all_cases()}) == len(all_cases())
    assert {case.kind for case in cases} == {kind}
    # The name seeds the values: those of the RNN must not change.
    assert [f"kind={kind}" in case.name for case in cases] == [kind != "rnn"] * len(cases)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            chosen = [c for c in cases if (c.dtype, c.layout) == (dtype, layout)]
            for option in ("bias", "batch_first", "bidirectional", "hx", "strided"):
                assert {getattr(c, option) for c in chosen} == {False, True}
            assert {c.num_layers for c in chosen} >= {1, 3}
            assert {c.batch_invariant for c in chosen} == {False, True}
    assert cases == all_cases([kind])


FAST, WIDE = [(1.0, 1.0)] * 12, [(1.0, 1.3), (1.3, 1.0)] * 6


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (FAST, "\nAs fast.\n"),
        ([(1.0, 1.01)] * 12, "\nthe geometric mean is slower: 0.990 (0.990 to 0.990)\n"),
        ([(1.0, 1.1)] * 12, "-B16 is more than 4% slower: 0.909 (0.909 to 0.909)\n"),
        (WIDE, "\nNot shown to be slower, but 2 of 2 intervals include more than 4% slower"),
        ([*FAST, (1.0, 100.0)], "\nAs fast.\n"),  # one disturbed pair
    ],
    ids=["same", "1 %", "10 %", "unsettled", "disturbed"],
)
def test_what_is_concluded_from_times(pairs, message, monkeypatch, capsys):
    monkeypatch.setattr(builds, "build", lambda revision: NEW)
    monkeypatch.setattr(
        speed, "time_round", lambda *arguments: [pairs[arguments[3]]] * len(arguments[4])
    )
    options = ["--rounds", str(len(pairs)), "--cells", "^packed-.*-B16$"]
    monkeypatch.setattr("sys.argv", ["speed", "base", "new", *options])
    assert speed.main() == ("slower: 0." not in message)
    assert message in capsys.readouterr().out


def test_builds_take_turns_to_begin():
    begun = []

    def build(seconds):
        process = MagicMock()
        process.__enter__.return_value = process
        process.stdout.readline = lambda: begun.append(seconds) or seconds
        return MagicMock(start=lambda *arguments: process)

    rounds = [speed.time_round(build("1"), build("2"), 1, n, CELLS) for n in range(2)]
    assert rounds == [[(1.0, 2.0)] * len(CELLS)] * 2
    assert begun[::2].count("1") == begun[::2].count("2") == len(CELLS)


@pytest.mark.slow
def test_the_stopwatch_times_every_kind_of_cell():
    build = builds.Build("this", builds.ROOT)
    for pair in speed.time_round(build, build, 1, 0, CELLS):
        assert all(0 < seconds < 10 for seconds in pair)


@CHECKOUT
def test_the_working_tree_is_a_tree_of_its_own_and_the_index_stays_as_it_is():
    before = builds.git("status", "--porcelain")
    tree = builds.tree_of(builds.WORKING_TREE)
    assert builds.git("cat-file", "-t", tree) == b"tree\n"
    assert builds.git("status", "--porcelain") == before
    assert (tree == builds.tree_of("HEAD")) == (not before)


@CHECKOUT
def test_an_unknown_revision_is_an_error():
    with pytest.raises(SystemExit, match="no-such-revision"):
        builds.tree_of("no-such-revision")


def planted_tree(folder):
    """Returns HEAD's tree with a coefficient of tanh in float32 changed by one last place."""
    path, index = "csrc/kernel/tanh.h", {"env": os.environ | {"GIT_INDEX_FILE": f"{folder}/index"}}
    source = builds.git("show", f"HEAD:{path}")
    assert source.count(b"0.666661717641f") == 1
    planted = source.replace(b"0.666661717641f", b"0.66666178f")
    blob = builds.git("hash-object", "-w", "--stdin", input=planted).decode().strip()
    builds.git("read-tree", "HEAD", **index)
    builds.git("update-index", "--cacheinfo", f"100644,{blob},{path}", **index)
    return builds.git("write-tree", **index).decode().strip()


@CHECKOUT
@pytest.mark.slow
def test_a_planted_change_of_one_last_place_is_noticed(tmp_path):
    """Builds HEAD with and without the change, or finds both in build/revisions."""
    command = [sys.executable, "-m", "tools.revisions.bits", "HEAD", planted_tree(tmp_path)]
    command += ["--levels", "default"]
    ran = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    differing = [line for line in ran.stdout.splitlines() if ": differs in " in line]
    assert differing
    # The change is in tanh in float32, in which both 16-bit types are computed too.
    assert not any("float64" in line or "nonlinearity=relu" in line for line in differing)
