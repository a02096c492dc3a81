"""Tests that `names predict` gives every input row one output row, in bounded memory."""

import codecs
import csv
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from namernn_fast.names import Checkpoint, InputError, NameClassifier, Predictor
from namernn_fast.names.answers import Answers, answer_rows
from namernn_fast.names.commands import predict
from namernn_fast.names.folding import ASCII, why_unusable
from namernn_fast.names.tables import Rows, read_table
from namernn_fast.names.writers import WRITERS

LANGUAGES = ("Czech", "Irish", "Polish", "Thai")


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    classifier = NameClassifier(len(LANGUAGES), embedding_size=4, hidden_size=8)
    return Predictor(Checkpoint(classifier, LANGUAGES, {}))


@pytest.fixture
def call(call, predictor, monkeypatch):
    """Return a function that runs `predict` with a small model that has random weights."""

    def predicted(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return call("predict", *argv)

    monkeypatch.setattr(predict, "load_predictor", lambda arguments: predictor)
    return predicted


# The name in an input row, and an error if the row is unreadable.
Row = namedtuple("Row", ["name", "error"], defaults=[None])


def read(file, *arguments, **options):
    return [
        Row(name, rows.errors.get(place))
        for rows in read_table(file, *arguments, **options).rows
        for place, name in enumerate(rows.names)
    ]


def rows_of(content, format="csv", column=None, **options):
    return read(io.BytesIO(content), format, column, **options)


def pipe(blocks):
    """Return a stream that returns the given blocks one by one, whatever size is requested."""
    left = iter(blocks)
    return SimpleNamespace(read1=lambda size: next(left, b""))


@pytest.mark.parametrize(
    ("format", "content", "names"),
    [
        ("text", b"", []),
        ("text", b"\n", [""]),
        ("text", b"\r", [""]),
        ("text", b"\xef\xbb\xbfFrank\r\nKim\r\rNowak\n\n ", ["Frank", "Kim", "", "Nowak", "", " "]),
        ("text", b"\x0bO\xe2\x80\xa8Neal\r\n", ["\x0bO\u2028Neal"]),
        # Invalid UTF-8 affects only its row, even if its bytes are the byte order mark of UTF-16.
        ("text", b"Kim\nFra\xffnk\nNowak", ["Kim", "Fra\udcffnk", "Nowak"]),
        ("text", b"\xff\xfe\nKim", ["\udcff\udcfe", "Kim"]),
        ("csv", b"", []),
        ("csv", b"name\n", []),
        ("csv", b'name\n"O\'Neal, Jr."\r\n"say ""hi"""\r', ["O'Neal, Jr.", 'say "hi"']),
        ("csv", b'age,Name\n3,"two\r\nlines"\n4,\n\n5,b"c', ["two\nlines", "", "", 'b"c']),
        ("jsonl", b"", []),
        ("jsonl", b'"Kim"\r{"who": "Nowak"}\n\n"\xff"', ["Kim", "Nowak", "", "\udcff"]),
        ("jsonl", rb'{"name": "\u0141", "x": 1}', ["Ł"]),
        ("jsonl", rb'"\ud800"', ["\ud800"]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_names_do_not_depend_on_how_the_input_is_split_into_blocks(format, content, names, size):
    """The input is a pipe that returns at most `size` bytes at a time."""
    blocks = [content[begin : begin + size] for begin in range(0, len(content), size)]
    assert read(pipe(blocks), format) == [Row(name) for name in names]


@pytest.mark.parametrize(("format", "end"), [("text", b"\n"), ("csv", b"\r\n"), ("jsonl", b"\r")])
def test_a_huge_line_becomes_one_row_and_needs_little_memory(format, end):
    blocks = [b'"name"' + end, *[b"x" * 65_536] * 100, b"x" * 5 + end, b'"Kim"']
    tracemalloc.start()
    rows = read(pipe(blocks), format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    long, kim = rows[-2:]
    assert len(long.name) == 65_537
    assert "a line of more than 65,536 bytes" in long.error
    assert kim.name.strip('"') == "Kim"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (b"surname\nKim\n", {}),
        (b"id,NAME\n1,Kim\n", {}),
        (b"id,name,Name2\n1,Kim,x\n", {"column": "name"}),
        (b"id,who\n1,Kim\n", {"column": "2"}),
        (b"2,who\nKim,1\n", {"column": "2"}),
        (b"id,id\n1,Kim\n", {"column": "2"}),
        ("id,Straße\n1,Kim\n".encode(), {"column": "Straße"}),
        (b"Kim\n", {"header": False}),
        # Excel's first line names the delimiter.
        (b"\xef\xbb\xbfsep=;\r\nid;who\r\n1;Kim\r\n", {"column": "who"}),
        (b"sep=;\n1;Kim\n", {"column": "2", "header": False, "default_delimiter": "\t"}),
        (b"sep=;\nid,who\n1,Kim\n", {"column": "who", "delimiter": ","}),
        (b'{"who": "Kim", "name": ""}\n', {"format": "jsonl", "column": "who"}),
    ],
)
def test_the_column_of_names_is_found(content, options):
    assert rows_of(content, **options) == [Row("Kim")]


NOT_UTF_8 = "not UTF-8; --encoding cp1252, for example, names another encoding"
SPREADSHEET = "the input is a spreadsheet or zip file, not text: save it as CSV"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"id,who\n", {}, "no column is called 'name'; --column takes one of 'id', 'who'"),
        (b"id,\x1b\n", {"column": "name"}, r"'name'; --column takes one of 'id', '\\x1b'"),
        (b"id,who\n", {"column": "3"}, "there is no column 3: the first row has 2"),
        (b"id,who\n", {"column": "0"}, "'0' is not the number of a column"),
        (b"id,who\n", {"column": "9" * 5000}, "is not the number of a column"),
        (
            b"1,Kim\n",
            {"column": "name", "header": False},
            "--column takes a number, because no column has a name",
        ),
        (b"name,name\n", {}, "2 columns are called 'name': give a number"),
        (b"\nKim\n", {}, "the header is an empty line"),
        (b'"name\n', {}, "the header is not readable as CSV: "),
        ("Frank\nKim".encode("utf-16"), {}, "the input is UTF-16; use --encoding utf-16"),
        (b"Kim\n", {"format": "text", "column": "name"}, "text has no columns"),
        (b"Nr.;who\n", {"column": "who"}, "one of 'Nr.;who'; --delimiter ';' cuts rows there"),
        (b"Nr.\twho\n", {"column": "2"}, "the first row has 1; --delimiter 'tab' cuts rows there"),
        ("who,Größe\n".encode("cp1252"), {"column": "Größe"}, f"the header is {NOT_UTF_8}"),
        (
            b"name,\x81\n",
            {"encoding": "cp1252"},
            "the header is not CP1252; --encoding utf-8, for example, names another encoding",
        ),
        (b"PK\x03\x04\n", {"format": "text", "column": "name"}, SPREADSHEET),
        (b"\xd0\xcf\x11\xe0", {}, SPREADSHEET),
        (
            b'\n [{"name": "Kim"}]\n',
            {"format": "jsonl"},
            "the input is a JSON array; JSON lines need one string or object per line",
        ),
    ],
)
def test_an_unusable_column_or_header_is_an_error(content, options, message):
    with pytest.raises(InputError, match=message):
        rows_of(content, **options)


@pytest.mark.parametrize(
    ("content", "format", "error"),
    [
        (b"id,name\n1", "csv", "there is no column 2"),
        (
            b'{"who": "Nowak", "x": 1}',
            "jsonl",
            "there is no 'name' in the JSON object; --column takes one of 'who', 'x'",
        ),
        (b'{"name": 5}', "jsonl", "the value of 'name' in the JSON object is not a string"),
        (b"null", "jsonl", "neither a JSON string nor an object with one"),
        (b"{broken", "jsonl", "not JSON: "),
        (b'{"":' * 15_000, "jsonl", "not JSON: "),
    ],
    ids=range(6),
)
def test_a_row_without_a_name_has_an_error(content, format, error):
    end = b"\n2,Kim" if format == "csv" else b'\n"Kim"'
    row, kim = rows_of(content + end, format)
    assert (row.name, kim) == (content.split(b"\n")[-1].decode(), Row("Kim"))
    assert row.error.startswith(error)


@pytest.mark.parametrize("damage", [b'"Kim', b'"Kim"x', b'x,"Kim', b'""""Kim'])
@pytest.mark.parametrize(
    ("head", "column", "name"), [(b"name,x\n", None, "2"), (b"", None, "2"), (b"", "2", "3")]
)
def test_a_damaged_record_affects_only_one_row(damage, head, column, name):
    content = head + damage + b"\n2,3\n" + b"2,3\n" * 20_000
    damaged, *others = rows_of(content, column=column, header=bool(head))
    assert damaged.name == damage.decode()
    assert damaged.error.startswith("not readable as CSV: ")
    assert others == [Row(name)] * 20_001


def test_the_size_of_a_multiline_record_is_limited():
    whole, kim = rows_of(b'name\n"' + b"x\n" * 99 + b'x"\nKim\n')
    assert (whole, kim) == (Row("x\n" * 99 + "x"), Row("Kim"))
    first, *others = rows_of(b'name\n"' + b"x\n" * 100 + b'x"\nKim\n')
    assert first == Row('"x', "not readable as CSV: a quote is not closed")
    assert others == [*[Row("x")] * 99, Row('x"'), Row("Kim")]
    first, *others = rows_of(b'name\n"' + (b"x" * 40_000 + b"\n") * 2 + b'x"\nKim\n')
    assert first.error == "not readable as CSV: a quote is not closed"
    assert others == [Row("x" * 40_000), Row('x"'), Row("Kim")]


@pytest.mark.parametrize("format", ["text", "csv", "jsonl"])
def test_chunks_of_rows_have_a_limited_size(format):
    def sizes(name, count):
        line = {"text": b"%b\n", "csv": b"%b\n", "jsonl": b'"%b"\n'}[format] % name
        content = line * count if format != "csv" else b"name\n" + line * count
        return [len(rows.names) for rows in read_table(io.BytesIO(content), format).rows]

    assert sizes(b"Kim", 150_000) == [65_536, 65_536, 150_000 - 2 * 65_536]
    long = sizes(b"x" * 10_000, 1_000)
    assert max(long) == 256
    assert sum(long) == 1_000
    assert sizes(b"", 0) == []


BAD_BYTES = "not valid in the encoding of the input; --encoding names another"


def answer(predictor, names, *arguments, errors=(), **options):
    return answer_rows(predictor, Rows([*names], dict(errors)), *arguments, **options)


def test_answers_match_the_results_of_the_predictor(predictor):
    names = ["Frank", "Ślusàrski", "ffrank", "Frank", "O’Neal-Smith"]
    answers = answer(predictor, names, top=2)
    assert (answers.rows.names, answers.rows.errors) == (names, {})
    for row, (name, expected) in enumerate(zip(names, predictor.predict(names, 2), strict=True)):
        languages, values = zip(*answers.of_row(row), strict=True)
        assert list(languages) == [language for language, _ in expected]
        assert values == pytest.approx([value for _, value in expected], abs=1e-6)
        assert answers.dropped.get(row, "") == ASCII.dropped(name)
    assert len(answer(predictor, [])) == 0
    found = answer(predictor, ["Kim"], top=99).of_row(0)
    assert sorted(language for language, _ in found) == sorted(LANGUAGES)


@pytest.mark.parametrize(
    ("name", "given", "shown", "error"),
    [
        ("", None, "", "the name is empty"),
        (" \t", None, " \t", "the name is empty"),
        ("Иванов", None, "Иванов", why_unusable("Иванов")),
        ("x" * 10_000, None, "x" * 100 + "…", why_unusable("x" * 10_000)),
        ("Fra\udcffnk", None, r"Fra\udcffnk", BAD_BYTES),
        ("{", "not JSON", "{", "not JSON"),
    ],
)
def test_an_unusable_name_has_an_error(predictor, name, given, shown, error):
    answers = answer(predictor, ["Kim", name, "Kim"], errors={1: given} if given else {})
    assert answers.rows.names == ["Kim", shown, "Kim"]
    assert answers.rows.errors == {1: error}
    assert answers.of_row(0) == answers.of_row(2) != answers.of_row(1) == []


def test_improbable_languages_are_omitted(predictor):
    found = answer(predictor, ["Kim"], top=4).of_row(0)
    assert answer(predictor, ["Kim"], 4, found[1][1] - 1e-6).of_row(0) == found[:2]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (
            "table",
            "Ł\\u202eX\n  0.750  Thai (weak)\n  0.200  Irish\n  not read: \\x1b-\n"
            "Kim\n  unknown\n  unusual: unlike the names that the model has learned from\n"
            "\n  error: no\\x1b\n",
        ),
        (
            "csv",
            "name,language_1,probability_1,language_2,probability_2,unusual,dropped,error\n"
            "Ł\\u202eX,Thai,0.750000,Irish,0.200001,false,\\x1b-,\n"
            "Kim,unknown,,,,true,,\n"
            ",,,,,,,no\\x1b\n",
        ),
        (
            "jsonl",
            '{"name": "Ł\\u202eX", "languages": [{"language": "Thai", "probability": 0.750000}, '
            '{"language": "Irish", "probability": 0.200001}], "unusual": false, '
            '"dropped": "\\u001b-", "error": null}\n'
            '{"name": "Kim", "languages": [], "unusual": true, "dropped": "", "error": null}\n'
            '{"name": "", "languages": [], "unusual": null, "dropped": "", "error": "no\\u001b"}\n',
        ),
    ],
)
def test_every_format_writes_the_expected_text(format, text):
    answers = Answers(
        rows=Rows(["Ł\u202eX", "Kim", ""], {2: "no\x1b"}),
        languages=("Irish", "Thai"),
        best=torch.tensor([[1, 0], [2, 2], [2, 2]]),
        millionths=torch.tensor([[750_000, 200_001], [0, 0], [0, 0]]),
        unusual=torch.tensor([False, True, False]),
        dropped={0: "\x1b-"},
    )
    writer = WRITERS[format](2, weak={"Thai"})
    assert writer.head() + writer.body(answers) == text


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", r"\x3d1+1"),
        ("+X", r"\x2bX"),
        ("-X", r"\x2dX"),
        ("@X", r"\x40X"),
        ("＝X", r"\uff1dX"),
        ("\tX", r"\tX"),
        ("-5+A1", r"\x2d5+A1"),
        *((same, same) for same in ("--", "a=b", "-5", "+1.5e-3", "-1,5", "x,=1")),
    ],
)
def test_csv_cells_are_never_formulas(name, cell):
    answers = Answers(
        rows=Rows([name, ""], {1: name}),
        languages=("Thai",),
        best=torch.tensor([[0], [1]]),
        millionths=torch.tensor([[500_000], [0]]),
        unusual=torch.tensor([False, False]),
        dropped={0: name},
    )
    rows = csv.reader(io.StringIO(WRITERS["csv"](1).body(answers)))
    assert [*rows] == [[cell, "Thai", "0.500000", "false", cell, ""], ["", "", "", "", "", cell]]


def wrote(count, path):
    """Return the message that reports how many rows were written to a file."""
    return f"wrote {count} {'row' if count == 1 else 'rows'} to {path}\n"


def test_the_output_format_follows_the_file_suffix(run, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_bytes(b"id\tname\n1\tKim\n2\tNowak\n")
    for suffix, begin in [
        ("csv", "id,name,language_1,"),
        ("tsv", "id\tname\tlanguage_1\t"),
        ("jsonl", '{"id": "1", "name": "Kim", '),
        ("txt", "Kim\n  0."),
    ]:
        target = tmp_path / "new" / f"out.{suffix}"
        target.parent.mkdir(exist_ok=True)
        assert run("--input", source, "--output", target) == ("", wrote(2, target))
        text = target.read_text()
        assert text.startswith(begin)
        assert text.count("Kim") == text.count("Nowak") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["in.tsv"]


def test_output_options_take_effect(run):
    assert run("Kim", "--min-probability", 1) == ("Kim\n  unknown\n", "")
    head = "name,language_1,probability_1,unusual,dropped,error\n"
    assert run("-", "--format", "csv", "--top", 1) == (head, "")


def test_names_from_a_pipe_need_no_dash(run, fails, monkeypatch):
    assert run("--top", 1, stdin=b"Kim\n") == run("-", "--top", 1, stdin=b"Kim\n")
    terminal = type("Terminal", (io.TextIOWrapper,), {"isatty": lambda self: True})
    monkeypatch.setattr(io, "TextIOWrapper", terminal)
    assert "pass some, --input FILE, or - for standard input" in fails("--top", 1)


PEOPLE = b"id,surname,town\n1,Nguyen,Hanoi\n2,Kim,Seoul\n"


@contextmanager
def redirected(files):
    """Redirects file descriptors, given as {descriptor: open file}, as a shell does."""
    saved = {number: os.dup(number) for number in files}
    try:
        for number, file in files.items():
            os.dup2(file.fileno(), number)
        yield
    finally:
        for number, before in saved.items():
            os.dup2(before, number)
            os.close(before)


@pytest.mark.parametrize(
    ("numbers", "argv", "written", "read"),
    [
        ([], "--input people.csv --output people.csv", "--output", "--input"),
        ([], "--input people.csv --output none/../people.csv", "--output", "--input"),
        ([], "--input people.csv --output {}/people.csv", "--output", "--input"),
        ([], "--input folder/people.csv --output linked/people.csv", "--output", "--input"),
        ([], "--input people.csv --output symbolic.csv", "--output", "--input"),
        ([], "--input people.csv --output hard.csv", "--output", "--input"),
        ([], "Kim --checkpoint people.csv --output hard.csv", "--output", "--checkpoint"),
        ([0], "- --output people.csv", "--output", "standard input"),
        ([0], "--input /dev/stdin --output people.csv", "--output", "--input"),
        ([1], "--input people.csv", "standard output", "--input"),
        ([1], "--input people.csv --output -", "standard output", "--input"),
        ([0, 1], "- --output stdout", "standard output", "standard input"),
    ],
)
def test_inputs_are_not_overwritten(fails, tmp_path, monkeypatch, numbers, argv, written, read):
    """The file descriptors in `numbers` are redirected to people.csv."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / "people.csv", tmp_path / "folder" / "people.csv"]
    for path in paths:
        path.write_bytes(PEOPLE)
    (tmp_path / "hard.csv").hardlink_to("people.csv")
    (tmp_path / "linked").symlink_to("folder")
    (tmp_path / "symbolic.csv").symlink_to("people.csv")
    (tmp_path / "stdout").symlink_to("/dev/stdout")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(predict, "load_predictor", None)  # the model must not be loaded
    with paths[0].open("r+b") as file, redirected(dict.fromkeys(numbers, file)):
        message = fails(*argv.format(tmp_path).split())
    assert message.startswith(f"{written} would overwrite what {read} reads")
    assert [path.read_bytes() for path in paths] == [PEOPLE, PEOPLE]
    assert sorted(tmp_path.rglob("*")) == before


def test_output_to_a_device_does_not_replace_it(run, tmp_path):
    for argv, count in (("Kim",), 1), (("--input", "/dev/null"), 0):
        assert run(*argv, "--output", "/dev/null") == ("", wrote(count, "/dev/null"))
    names, log, stdout = (tmp_path / name for name in ("names.txt", "log.txt", "stdout"))
    names.write_text("Kim\n")
    log.write_text("before\n")
    stdout.symlink_to("/dev/stdout")
    with names.open() as input, log.open("a") as output, redirected({0: input, 1: output}):
        out, _ = run("--input", "/dev/stdin", "--output", stdout)
    assert out.startswith("Kim\n")  # written to sys.stdout, which pytest replaces
    assert log.read_text() == "before\n"
    assert stdout.is_symlink()


def test_the_exit_code_is_2_if_no_name_could_be_read(run, tmp_path):
    out, err = run("Иванов", code=2)
    assert out == f"Иванов\n  error: {why_unusable('Иванов')}\n"
    assert err.endswith(": error: the name could not be read\n")
    target = tmp_path / "out.csv"
    failure = "python -m namernn_fast.names: error: none of 2 names could be read\n"
    done = run("-", "--output", target, stdin=b"1\n2\n", code=2)
    assert done == ("", wrote(2, target) + failure)
    assert target.read_text().count("\n") == 3
    assert run("-", stdin=b"") == ("", "")  # no names, as from a filter without matches


def test_missing_input_is_an_error(fails, tmp_path):
    assert fails("--input", tmp_path) == f"{tmp_path}: a folder, but --input takes a file"
    assert fails("--input", "none") == "none: there is no such file"


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"Nguyen\nKim\n", [], "Nguyen"),
        (b'\xef\xbb\xbf" O\'Neal"\nKim\n', [], "O'Neal"),
        (b"1,Nguyen\n2,Kim\n", ["--column", "2"], "Nguyen"),
        (b"Nguyen\nKim\n", ["--no-header"], None),
        (b"Nguyen\nKim\n", ["--column", "Nguyen"], None),
        (b"Last_Name\nKim\n", [], None),
        (b"id,name\n1,Kim\n", ["--column", "2"], None),
        (b"id,who\n1,Kim\n", ["--column", "who"], None),
    ],
)
def test_a_name_that_is_read_as_the_header_is_reported(run, content, options, said):
    line = f"the first row, {said!r}, is read as the header; --no-header reads it as a name\n"
    err = run("-", "--input-format", "csv", *options, stdin=content)[1]
    assert err == (line if said else "")


@pytest.mark.parametrize(("sign", "option"), [(";", ";"), ("\t", "tab"), ("|", "|")])
def test_a_wrong_delimiter_is_reported(run, sign, option):
    content = f"name{sign}age\nKim{sign}3\n".encode()
    options = ["--input", "-", "--output", "-", "--input-format", "csv"]
    out, err = run(*options, stdin=content)
    assert out.count("\n") > 1
    title, advice = f"name{sign}age", f"--delimiter '{option}' cuts rows there"
    assert err == f"the first row, {title!r}, is read as one title; {advice}\n"
    assert run(*options, "--delimiter", option, stdin=content)[1] == ""


def test_nothing_is_written_if_the_column_is_missing(fails, tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("old")
    for output in (["--format", "csv"], ["--output", target]):
        message = fails("-", "--input-format", "csv", *output, stdin=b"a,b\n")
        assert message.startswith("no column is called 'name'; --column takes one of")
    assert target.read_text() == "old"


def test_memory_does_not_grow_with_the_number_of_names(run, tmp_path, monkeypatch):
    source = tmp_path / "names.txt"
    monkeypatch.setattr("namernn_fast.names.tables._CHUNK_ROWS", 512)
    monkeypatch.setattr("namernn_fast.names.lines._BLOCK_BYTES", 2048)
    letters = str.maketrans("0123456789", "abcdefghij")
    peaks = []
    for count in (2_048, 8_192):
        source.write_text("".join(f"{number}\n".translate(letters) for number in range(count)))
        tracemalloc.start()
        run("--input", source, "--output", tmp_path / "out.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


ANY = st.one_of(
    st.text(st.characters(), max_size=8),  # all of Unicode, including lone surrogates
    st.text(
        "\0\r\n\t\x1b\x7f\x85\u2028\u202e\u200f\ufeff,\"'={}[]\\ aßЖم\U0001f600\udcff", max_size=12
    ),
    st.sampled_from(["", "x" * 10_000, "\u202eمحمد", "e" + "\u0301" * 500, "Frank"]),
)
FUZZ = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def parsed(out, format):
    """Check that the output is printable. Return (name, languages, error) for each row."""
    assert out.replace("\n", "").isprintable()  # also excludes lone surrogates
    if format == "csv":
        head, *rows = csv.reader(io.StringIO(out))
        assert {len(row) for row in rows} <= {len(head)}
        name, first = head.index("name"), head.index("language_1")
        return [(row[name], [x for x in row[first:-3:2] if x], row[-1] or None) for row in rows]
    rows = [json.loads(line) for line in out.splitlines()]
    return [(r["name"], [x["language"] for x in r["languages"]], r["error"]) for r in rows]


def check(result, names, format):
    """Check the exit code, and that each name has a row with predictions or an error."""
    code, out, err = result
    rows = parsed(out, format)
    assert len(rows) == len(names)
    for (name, languages, error), asked in zip(rows, names, strict=True):
        assert len(languages) == (3 if error is None else 0)
        if asked is not None:
            lone = re.search("[\ud800-\udfff]", asked)
            assert (error is None) == (not lone and why_unusable(asked) is None)
            assert name == asked or error or format == "csv"
    failed = sum(error is not None for _, _, error in rows)
    assert code == (2 if failed == len(rows) > 0 else 0)
    assert (err == "") == (failed == 0)


@FUZZ
@given(names=st.lists(ANY, max_size=6), format=st.sampled_from(["csv", "jsonl"]))
def test_predict_gives_a_row_for_any_name(call, names, format):
    """The names are given as JSON lines and as CSV cells."""
    stdin = "\n".join(map(json.dumps, names)).encode()
    check(call("-", "--input-format=jsonl", "--format", format, stdin=stdin), names, format)
    names = [name.replace("\0", "").replace("\r", "\n") for name in names]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("id", "name"), *((1, x) for x in names)])
    stdin = text.getvalue().encode("utf-8", "surrogatepass")
    check(call("-", "--input-format=csv", "--format", format, stdin=stdin), names, format)


@FUZZ
@given(
    content=st.one_of(
        st.binary(max_size=60), st.lists(ANY).map(lambda x: "".join(x).encode(errors="replace"))
    ),
    source=st.sampled_from(["text", "csv", "jsonl"]),
    format=st.sampled_from(["csv", "jsonl"]),
)
def test_any_input_bytes_give_rows_or_errors(call, content, source, format):
    """Text and JSON lines give one row per line. CSV may give fewer, as records may span lines."""
    options = ["--input-format", source, "--format", format]
    options += ["--no-header", "--column", "1"] if source == "csv" else []
    result = call("-", *options, stdin=content)
    lines = len(content.splitlines())
    if source == "jsonl" and content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        assert result[:2] == (2, "")
    elif source != "csv":
        check(result, [None] * lines, format)
    else:
        assert result[0] in (0, 2)
        assert len(parsed(result[1], format)) <= lines
    table = call("-", *options, "--format", "table", stdin=content)
    assert table[0] == result[0]
    assert table[1].replace("\n", "").isprintable()


def test_predict_accepts_invalid_utf_8_and_starts_fast(root):
    """The command must not import torch._dynamo, because the import takes seconds."""
    code = (
        "import sys; from namernn_fast.names.__main__ import main;"
        "print(main(), main(sys.argv[1:3] + ['-']), 'torch._dynamo' in sys.modules)"
    )
    argv = ["predict", "--format=jsonl"]
    names = ["Fra\udcffnk", "Kim", "\u202e"]
    process = subprocess.run(
        [sys.executable, "-c", code, *argv, *names],
        input="\n".join(names).encode(errors="surrogateescape"),
        capture_output=True,
        cwd=root,
    )
    *lines, codes = process.stdout.decode().splitlines(keepends=True)
    assert codes == "0 0 False\n"
    failed = "2 of 3 names could not be read\n"
    assert process.stderr.decode() == f"{failed}the input is {NOT_UTF_8}\n{failed}"
    assert lines[:3] == lines[3:]
    check((0, "".join(lines[:3]), "-"), names, "jsonl")
