"""The tool that compares two revisions: what it concludes, and that it notices a planted change."""

import math
import random
import subprocess
import sys

import pytest

from tools.revisions import bits, builds, planting, speed
from tools.revisions.cases import DTYPES, LAYOUTS, all_cases
from tools.revisions.cells import CELLS
from tools.revisions.intervals import interval, student_t

CHECKOUT = pytest.mark.skipif(
    not (builds.ROOT / ".git").exists(), reason="needs a checkout of the repository"
)
SAME = {"a": {"output": "1", "h_n": "2"}, "b": {"output": "3"}}


def test_equal_digests_pass():
    comparison = bits.compare(SAME, SAME, SAME)
    assert not comparison.failed
    assert comparison.cases == 2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({**SAME, "b": {"output": "4"}}, {"b": ["output"]}),
        ({**SAME, "a": {"output": "1"}}, {"a": ["h_n"]}),
        ({"a": SAME["a"]}, {"b": ["output"]}),
        ({**SAME, "c": {"raised": "Error"}}, {"c": ["raised"]}),
    ],
    ids=["digest", "missing result", "missing case", "more cases"],
)
def test_every_kind_of_difference_is_found(other, expected):
    comparison = bits.compare(SAME, other, other)
    assert comparison.differing == expected
    assert not comparison.unstable
    assert comparison.failed


def test_a_result_that_is_not_reproducible_is_an_error_of_its_own():
    comparison = bits.compare(SAME, SAME, {**SAME, "b": {"output": "4"}})
    assert not comparison.differing
    assert comparison.unstable == {"b": ["output"]}
    assert comparison.failed


def test_a_case_that_raises_compares_nothing():
    raises = {"a": {"raised": "Error"}}
    assert bits.compare(raises, raises, raises).raised == {"a": "Error"}
    assert bits.compare(raises, raises, raises).failed
    assert bits.compare({}, {}, {}).failed


def test_a_report_names_every_case(capsys):
    bits.report(bits.compare(SAME, {"a": {"output": "9", "h_n": "9"}}, SAME))
    printed = capsys.readouterr().out
    assert "a: differs in output, h_n" in printed
    assert "b: is not reproducible within one revision in output" in printed


def test_cases_have_names_of_their_own_and_cover_every_layout_and_dtype():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            chosen = [c for c in cases if (c.dtype, c.layout) == (dtype, layout)]
            for option in ("bias", "batch_first", "bidirectional", "hx", "strided"):
                assert {getattr(c, option) for c in chosen} == {False, True}
            assert {c.num_layers for c in chosen} >= {1, 3}
            assert {c.batch_invariant for c in chosen} == {False, True}
    assert cases == all_cases()


SOURCE = """
struct Tanh<double> { static constexpr double c[] = {1.0, 0.5}; };
struct Tanh<float> {
  static constexpr float limit = 10.0f;
  static constexpr float c[] = {1.0f, 0.5f,
                                0.25f};
};
"""


def test_a_plant_changes_one_coefficient_in_its_last_place(tmp_path):
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "tanh.h").write_text(SOURCE)
    (tmp_path / "plan.cpp").write_text("struct Tanh;\n")
    planting.plant(tmp_path)
    planted = (tmp_path / "kernel" / "tanh.h").read_text()
    assert "{1.0, 0.5}" in planted  # in double
    assert "{1.0f, 0x1.0000020000000p-1f, 0.25f}" in planted


def test_a_plant_without_a_place_is_an_error(tmp_path):
    (tmp_path / "plan.cpp").write_text("int x;\n")
    with pytest.raises(planting.PlantError):
        planting.plant(tmp_path)


def test_the_place_for_a_plant_is_found_in_the_sources():
    files = [p for p in (builds.ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    assert sum(planting.plant_in(path.read_text()) is not None for path in files) == 1


def test_quantiles_of_student():
    assert student_t(1) == pytest.approx(12.706)
    assert student_t(11) == pytest.approx(2.201, abs=1e-3)
    assert student_t(30) == pytest.approx(2.042, abs=1e-3)
    assert student_t(10_000) == pytest.approx(1.960, abs=1e-3)


def test_an_interval_of_known_values():
    found = interval([math.log(x) for x in (0.9, 1.0, 1.1)])
    mean = math.log(0.99) / 3
    spread = math.sqrt(sum((math.log(x) - mean) ** 2 for x in (0.9, 1.0, 1.1)) / 2 / 3)
    assert found.ratio == pytest.approx(math.exp(mean))
    assert found.low == pytest.approx(math.exp(mean - 4.303 * spread))
    assert found.high == pytest.approx(math.exp(mean + 4.303 * spread))
    assert not found.settled
    assert interval([0.0]).high == math.inf


@pytest.mark.parametrize("count", [6, 16])
def test_intervals_cover_the_truth_about_as_often_as_they_say(count):
    draw = random.Random(0)
    covered = 0
    for _ in range(1000):
        found = interval([draw.gauss(0.1, 0.05) for _ in range(count)])
        covered += found.low < math.exp(0.1) < found.high
    assert 925 <= covered <= 975


def test_one_disturbed_pair_does_not_decide():
    steady = [0.001 * (-1) ** i for i in range(15)]
    assert interval([*steady, -3.0]).settled
    assert not interval([*steady, -3.0]).slower


@pytest.mark.parametrize(
    ("ratio", "cells", "mean"), [(0.99, 0, True), (0.9, 1, True), (1.02, 0, False)]
)
def test_a_verdict(ratio, cells, mean):
    found = interval([math.log(ratio) + 0.0001 * (-1) ** i for i in range(12)])
    wrong = speed.verdict({"cell": found}, found)
    assert [sentence.startswith("cell is") for sentence in wrong].count(True) == cells
    assert any("geometric mean" in sentence for sentence in wrong) == mean


def test_a_wide_interval_is_not_called_as_fast():
    narrow, wide = interval([0.0, 0.001] * 4), interval([-0.3, 0.3] * 4)
    assert speed.conclusion({"cell": narrow}) == "As fast."
    assert "1 of 2 intervals" in speed.conclusion({"cell": narrow, "other": wide})


def test_drift_cancels_over_turns():
    for turns in (1, 2):
        orders = [speed.order_of(number, 0, turns) for number in range(2)]
        places = {"base": 0, "new": 0}
        for order in orders:
            for place, side in enumerate(order):
                places[side] += place
        assert places["base"] == places["new"]


def test_the_geometric_mean_is_of_whole_rounds():
    rows = [
        {"round": number, "cell": cell, "base": base, "new": 1.0}
        for number in range(4)
        for cell, base in (("a", 2.0), ("b", 8.0))
    ]
    record = speed.Record([*rows, {"round": 4, "cell": "a", "base": 1.0, "new": 1.0}])
    assert record.mean(["a", "b"]).ratio == pytest.approx(4.0)
    assert record.mean(["a", "b"]).count == 4
    assert record.cell("a").count == 5


def test_the_grid_has_20_dense_and_5_packed_shapes_in_two_modes():
    assert len(CELLS) == 50
    assert sum(cell.seq_len == 0 for cell in CELLS.values()) == 10


@CHECKOUT
def test_the_working_tree_is_a_tree_of_its_own_and_the_index_stays_as_it_is():
    before = builds.git("status", "--porcelain")
    tree = builds.tree_of(builds.WORKING_TREE)
    assert builds.git("cat-file", "-t", tree) == "tree"
    assert builds.git("status", "--porcelain") == before
    assert (tree == builds.tree_of("HEAD")) == (not before)


@CHECKOUT
def test_an_unknown_revision_is_an_error():
    with pytest.raises(builds.BuildError, match="no-such-revision"):
        builds.tree_of("no-such-revision")


@CHECKOUT
@pytest.mark.slow
def test_a_planted_change_of_one_last_place_is_noticed():
    """Builds HEAD with and without the plant, or finds both in build/revisions."""
    command = [sys.executable, "-m", "tools.revisions", "bits", "HEAD", "HEAD", "--plant"]
    command += ["--levels", "default"]
    ran = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    differing = [line for line in ran.stdout.splitlines() if ": differs in " in line]
    assert differing
    # The plant is in tanh in float32, in which both 16-bit types are computed too.
    assert not any("float64" in line or "nonlinearity=relu" in line for line in differing)
