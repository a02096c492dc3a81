"""Tests the report of `names data`, with its counts, junk rules and leaks of test names."""

import dataclasses
import functools
import json
import re
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namernn_fast import names
from namernn_fast.names import formatting, report
from namernn_fast.names.commands import data as command
from namernn_fast.names.dataset import NamesData, embedded_sample, read_names
from namernn_fast.names.encoding import encode_folded
from namernn_fast.names.folding import why_unusable
from namernn_fast.names.splitting import LabelledNames

split = functools.partial(names.split, folding=names.ASCII)


def described(data, **options):
    return report.describe(data, split(data, **options))


@pytest.fixture
def tiny():
    """Returns a few names that can be counted by hand."""
    rows = [
        *(("Kim", 0), ("Lee ", 0), ("Lu:\u00a0", 0)),
        *(("Groß", 1), ("Gross", 1), ("Lee", 1), ("Anna-Lee", 1), ("Weber", 1)),
        *(("Novak1", 2), ("Novak", 2), ("Nowák", 2), ("To The First Page", 2), ("Maxa/B", 2)),
    ]
    return NamesData("tiny", ("A", "B", "C"), tuple(rows))


def test_counts_per_language_match_hand_counts(tiny):
    found = described(tiny)
    facts = {facts.language: facts for facts in (*found.languages, found.total)}
    counted = ("rows", "distinct", "repeats", "shared", "junk")
    assert {name: [getattr(row, field) for field in counted] for name, row in facts.items()} == {
        "A": [3, 3, 0, 1, 2],
        "B": [5, 4, 1, 1, 0],
        "C": [5, 4, 1, 0, 3],
        "all": [13, 11, 2, 1, 5],
    }
    parts = split(tiny)
    for name in ("train", "validation", "test"):
        sizes = [getattr(row, name) for row in found.languages]
        assert sum(sizes) == getattr(found.total, name) == len(getattr(parts, name))


def test_ceilings_shared_names_and_odd_rows_are_correct(tiny):
    found = described(tiny)
    assert found.split == split(tiny).info
    assert found.ceiling["rows"] == pytest.approx(12 / 13)
    assert found.ceiling["distinct pairs"] == pytest.approx(10 / 11)
    assert found.shared_strings == {"lee": ("A", "B")}
    assert [
        (row.row, row.name, row.folded, row.spelled, row.dropped, row.junk)
        for row in found.odd_rows
    ] == [
        (2, "Lee ", "lee", "", "", ("blanks at the ends",)),
        (3, "Lu:\u00a0", "lu", "", ":", ("punctuation at the end", "blanks at the ends")),
        (4, "Groß", "gross", "ß", "", ()),
        (7, "Anna-Lee", "annalee", "", "-", ()),
        (9, "Novak1", "novak", "", "1", ("digits",)),
        (12, "To The First Page", "to the first page", "", "", ("no name",)),
        (13, "Maxa/B", "maxab", "", "/", ("signs inside",)),
    ]
    assert {row.language for row in found.odd_rows if row.row > 8} == {"C"}


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([], ("O'Neal", "O’Neal", "Smith Jr.", "Rus'", "Anna-Lee", "de la Cruz")),
        (["no name"], ("To The First Page", "to the  first\u00a0page")),
        ([], ("Novák", "To The First Pagerov")),
        (["digits"], ("Rafaj1", "1²")),
        (["punctuation at the end"], ("Lytkin,", "Lu:")),
        (["signs inside"], ("Maxa/B", "a,b", "<b>Smith", "\u200fKim")),
        (["blanks at the ends"], (" Park", "Park\u00a0")),
        (["punctuation at the end", "blanks at the ends"], ("Lytkin, ",)),
    ],
)
def test_names_match_only_the_expected_junk_rules(rules, names):
    for name in names:
        assert [rule for rule, (_, finds) in report.JUNK.items() if finds(name)] == rules


def test_only_a_random_split_leaks_test_names(tiny):
    """If rows are repeated, a random split puts a name into both the training and the test set."""
    repeated = NamesData("repeated", tiny.languages, tiny.rows * 10)
    assert report.leak(split(repeated)) == {"pairs": 0, "strings": 0}
    leaked = report.leak(split(repeated, method="random"))
    assert leaked["strings"] >= leaked["pairs"] > 0.9
    assert described(repeated).leak["random split"] == leaked


def test_names_from_the_validation_part_count_as_leaked(tiny):
    """The model's settings are chosen with the validation set, so its names count as known."""
    train, validation, test = (
        LabelledNames(texts, encode_folded(texts), torch.tensor(labels))
        for texts, labels in (
            (("kim", "lee"), [0, 1]),
            (("park",), [0]),
            (("kim", "lee", "park", "novak"), [0, 0, 0, 2]),
        )
    )
    parts = dataclasses.replace(split(tiny), train=train, validation=validation, test=test)
    assert report.leak(parts) == {"pairs": 0.5, "strings": 0.75}


_NAMES = st.text(max_size=8).filter(lambda name: why_unusable(name) is None)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(_NAMES, st.integers(0, 2)), min_size=3, max_size=30))
def test_reports_can_contain_any_names(rows):
    """The JSON report stays valid, and the Markdown report stays printable."""
    rows += [(name, language) for language in range(3) for name in ("aa", "bb", "cc")]
    found = described(NamesData("any", ("A", "B", "C"), tuple(rows)))
    values = json.loads(json.dumps(dataclasses.asdict(found)))
    assert values["split"]["data"]["rows"] == len(rows)
    page = command.page(found)
    assert all(character.isprintable() or character == "\n" for character in page)


def test_the_command_prints_counts_and_leaks(run, make_folder):
    folder = make_folder({"A": "Kim\nLee \nLu:\n", "B": "Groß\nGross\nLee\nWeber\nOtto\n"})
    out, err = run("data", "--data", folder)
    assert err == ""
    assert out.startswith(f"8 names in 2 languages: the folder {folder}\nSHA-256 of the data ")
    lines = out.splitlines()
    assert [line.split() for line in lines[3:7]] == [
        ["language", "rows", "distinct", "repeats", "shared", "junk", "train", "valid.", "test"],
        ["A", "3", "3", "0", "1", "2", "1", "1", "1"],
        ["B", "5", "4", "1", "1", "0", "2", "1", "1"],
        ["all", "8", "7", "1", "1", "2", "3", "2", "2"],
    ]
    assert lines[10:12] == [
        "folding to ASCII (of duplicates and of the split): the table of spellings changes 1 rows; "
        "dropped are ':' (1)",
        "junk: 2 rows (1 punctuation at the end, 1 blanks at the ends); kept as they are",
    ]
    assert "leak of this split: 0.0% of the test part" in out


def test_split_options_take_effect(run, make_folder):
    folder = make_folder({"A": "\n".join("abcdefghij"), "B": "\n".join("klmnopqrst")})
    options = ("--split", "random", "--split-seed", 3, "--validation", 0.3, "--test", 0.4)
    out, _ = run("data", "--data", folder, *options)
    parts = split(read_names(folder), method="random", seed=3, validation=0.3, test=0.4)
    assert re.search(r"^all .* 6 +6 +8$", out, re.MULTILINE)
    assert f"split: random, seed 3; SHA-256 {parts.info['sha256'][:16]}…" in out
    assert out.count("leak of") == 1


def test_the_json_report_is_complete(run, tmp_path, folder):
    path = tmp_path / "new" / "report.json"
    out, _ = run("data", "--data", folder, "--report", path)
    assert out.endswith(f"wrote {path}\n")
    expected = dataclasses.asdict(described(read_names(folder)))
    assert json.loads(path.read_bytes()) == json.loads(json.dumps(expected))


def test_the_markdown_report_escapes_text_from_files(run, tmp_path, make_folder):
    """Text from files must neither control a terminal nor become markup in the report."""
    evil = "<script>|*x*\u202e\x1b[2J"
    folder = make_folder({"A": f"{evil}\nLee \nKim\n", "B|b": "Lee\nGroß\nWeber\n"})
    path = tmp_path / "report.md"
    out, _ = run("data", "--data", folder, "--report", path)
    page = path.read_text(encoding="utf-8")
    for text in (out, page):
        assert not {"\u202e", "\x1b"} & set(text)
    assert r"\<script\>\|\*x\*\\u202e\\x1b\[2J" in page
    assert "<script>" not in page
    assert '| 2 | A | "Lee " | lee |  |  | blanks at the ends |' in page
    assert r"| lee | A, B\|b |" in page
    assert "- no name: the text comes from a web page" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_an_invalid_report_path_is_an_error(fails, tmp_path, make_folder):
    folder = make_folder({"A": "Kim\nLee\nLu\n"})
    options = ("data", "--data", folder, "--report")
    assert fails(*options, tmp_path) == f"{tmp_path}: not a regular file"
    path = folder / "A.txt"
    said = f"--report would overwrite what --data reads, {path}: choose another file"
    assert fails(*options, path) == said
    assert path.read_text() == "Kim\nLee\nLu\n"


def test_a_failed_write_keeps_the_old_report(run, tmp_path, folder, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("namernn_fast.names.files.Path.replace", full)
    run("data", "--data", folder, "--report", path, code=1)
    assert path.read_text() == "old"


def test_tables_align_and_escape_cells():
    header, rows = ("name", "n", "x"), [["é\n", 1234, None], ["abcdef", 1, 0.5]]
    assert formatting.aligned(header, rows) == (
        "name        n      x\né\\n     1,234      -\nabcdef      1  0.500"
    )
    assert formatting.markdown(header, rows).splitlines() == [
        "| name | n | x |",
        "| --- | ---: | ---: |",
        "| é\\\\n | 1,234 | - |",
        "| abcdef | 1 | 0.500 |",
    ]
    assert formatting.aligned(header, []) == "name  n  x"


def test_the_report_on_the_real_data_has_the_expected_numbers(real_folder):
    real = described(read_names(real_folder))
    facts = {facts.language: facts for facts in real.languages}
    assert tuple(facts) == embedded_sample().languages
    assert (real.total.rows, real.total.distinct) == (20_074, 17_987)
    assert (facts["Arabic"].rows, facts["Arabic"].distinct) == (2000, 108)
    assert (facts["Scottish"].rows, facts["Scottish"].shared) == (100, 99)
    assert real.ceiling["rows"] == pytest.approx(0.971, abs=1e-3)
    assert real.leak["this split"] == {"pairs": 0, "strings": 0}
    # Means over many splits. One split, with 4,015 test rows, has a standard error of 0.5 %.
    assert real.leak["random split"] == pytest.approx({"pairs": 0.111, "strings": 0.152}, abs=0.01)
    assert sum(bool(row.spelled) for row in real.odd_rows) == 11
    # Folding drops 25 hyphens, 3 digits, a colon and a slash.
    assert len("".join(row.dropped for row in real.odd_rows)) == 30
    assert real.total.junk == 42
    assert sum("no name" in row.junk for row in real.odd_rows) == 24
