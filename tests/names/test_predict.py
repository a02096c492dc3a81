"""`names predict`: every format, one row out for each row in, in bounded memory, whatever comes."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from namernn_fast.names import Checkpoint, InputError, NameClassifier, load, save_checkpoint, tables
from namernn_fast.names.answers import Answer, answer_rows
from namernn_fast.names.commands import predict
from namernn_fast.names.tables import MAX_LINE_BYTES, Row, chunks, read_rows
from namernn_fast.names.text import dropped, escaped, why_unusable
from namernn_fast.names.writers import CsvWriter

LANGUAGES = ("Czech", "Irish", "Polish", "Thai")
PROGRAM = "python -m namernn_fast.names"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a checkpoint of random weights."""
    path = tmp_path_factory.mktemp("model") / "names.safetensors"
    torch.manual_seed(0)
    classifier = NameClassifier(len(LANGUAGES), embedding_size=4, hidden_size=8)
    save_checkpoint(path, Checkpoint(classifier, LANGUAGES, {}))
    return path


@pytest.fixture(scope="module")
def predictor(model):
    return load(model)


@pytest.fixture
def run(run, model, predictor, monkeypatch):
    """Run `predict` with a small model, which is loaded once."""

    def predicted(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return run("predict", "--checkpoint", model, *argv)

    monkeypatch.setattr(predict, "load_predictor", lambda arguments: predictor)
    return predicted


def rows_of(content, format="text", column=None, **options):
    return list(read_rows(io.BytesIO(content), format, column, **options))


def names_of(content, *arguments, **options):
    rows = rows_of(content, *arguments, **options)
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.name for row in rows]


# What is read


class Pipe:
    """Gives its blocks one by one, whatever it is asked for."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)

    def read1(self, size):
        return next(self.blocks, b"")


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_lines_end_with_lf_crlf_or_cr(size):
    content = b"\xef\xbb\xbfFrank\r\nKim\r\rNowak\n\n \r\n\x0bO\xe2\x80\xa8Neal"
    pipe = Pipe(content[begin : begin + size] for begin in range(0, len(content), size))
    rows = [row.name for row in read_rows(pipe, "text")]
    assert rows == ["Frank", "Kim", "", "Nowak", "", " ", "\x0bO\u2028Neal"]


@pytest.mark.parametrize(
    ("content", "format", "names"),
    [
        (b"", "text", []),
        (b"\n", "text", [""]),
        (b"\r", "text", [""]),
        (b"", "csv", []),
        (b"name\n", "csv", []),
        (b"", "jsonl", []),
        # Bytes that are no UTF-8 stay in their row; two odd bytes are no mark of UTF-16.
        (b"Kim\nFra\xffnk\nNowak", "text", ["Kim", "Fra\udcffnk", "Nowak"]),
        (b"\xff\xfe\nKim", "text", ["\udcff\udcfe", "Kim"]),
    ],
)
def test_odd_files(content, format, names):
    assert names_of(content, format) == names


@pytest.mark.parametrize(("format", "end"), [("text", b"\n"), ("csv", b"\r\n"), ("jsonl", b"\r")])
def test_a_line_without_bound_is_one_row_and_little_memory(format, end):
    pipe = Pipe([b'"name"' + end, *[b"x" * 65_536] * 100, b"x" * 5 + end, b'"Kim"'])
    tracemalloc.start()
    rows = list(read_rows(pipe, format))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    long, kim = rows[-2:]
    assert len(long.name) == MAX_LINE_BYTES + 1
    assert "a line of more than 65,536 bytes" in long.error
    assert kim.name.strip('"') == "Kim"


def test_csv_cells():
    content = b'age,Name\n1,"O\'Neal, Jr."\r\n2,"say ""hi"""\r3,"two\r\nlines"\n4,\n5,b"c\n6,a\0b'
    assert names_of(content, "csv")[:5] == ["O'Neal, Jr.", 'say "hi"', "two\nlines", "", 'b"c']
    assert len(rows_of(content, "csv")) == 6  # before Python 3.11 the zero byte is an error


@pytest.mark.parametrize(
    ("content", "column", "options"),
    [
        (b"surname\nKim\n", None, {}),
        (b"id,NAME\n1,Kim\n", None, {}),
        (b"id,name,Name2\n1,Kim,x\n", "name", {}),
        (b"id,who\n1,Kim\n", "2", {}),
        (b"2,who\nKim,1\n", "2", {}),
        (b"id,id\n1,Kim\n", "2", {}),
        ("id,Straße\n1,Kim\n".encode(), "Straße", {}),
        (b"Kim\n", None, {"header": False}),
        (b"1;Kim\n", "2", {"header": False, "delimiter": ";"}),
    ],
)
def test_the_column_of_csv(content, column, options):
    assert names_of(content, "csv", column, **options) == ["Kim"]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (b"id,who\n", None, "of several columns none is called 'name', which --column gives"),
        (b"id,who\n", "name", "no column is called 'name', which --column gives: 'id', 'who'"),
        (b"id,\x1b\n", "x", r"'id', '\\x1b'"),
        (b"id,who\n", "3", "there is no column 3: the first row has 2"),
        (b"id,who\n", "0", "'0' is no number of a column"),
        (b"id,who\n", "9" * 5000, "is no number of a column"),
        (b"name,name\n", None, "2 columns are called 'name': give a number"),
        (b"\nKim\n", None, "the header is an empty line"),
        (b'"name\n', None, "the header is not readable as CSV: "),
        ("Frank\nKim".encode("utf-16"), None, "the input is in UTF-16; UTF-8 is read"),
    ],
)
def test_a_column_of_csv_that_is_not_there(content, column, message):
    with pytest.raises(InputError, match=message):
        rows_of(content, "csv", column)


@pytest.mark.parametrize(
    ("format", "message"), [("text", "text has no columns"), ("csv", "without names")]
)
def test_a_column_without_titles(format, message):
    with pytest.raises(InputError, match=message):
        rows_of(b"1,Kim\n", format, "name", header=False)


def test_records_that_are_damaged_short_or_empty():
    first, second = rows_of(b'"a"b,Kim\n2,Nowak\n', "csv", "2", header=False)
    assert first.error.startswith("not readable as CSV: ")
    assert second == Row("Nowak")
    assert rows_of(b"\nKim\n", "csv", header=False) == [Row(""), Row("Kim")]
    missing = Row("1", "there is no column 2")
    assert rows_of(b"id,name\n1\n\n2,Kim\n", "csv") == [missing, Row(""), Row("Kim")]


@pytest.mark.parametrize("damage", [b'"Kim', b'"Kim"x', b'x,"Kim', b'""""Kim'])
def test_a_damaged_record_costs_one_row(damage):
    content = b"name,x\n1,\n" + damage + b"\n2,\n3,\n" + b"4,\n" * 20_000
    rows = rows_of(content, "csv")
    assert len(rows) == 20_004
    assert [row.error is not None for row in rows] == [False, True] + [False] * 20_002
    assert rows[1].name == damage.decode()
    assert rows[1].error.startswith("not readable as CSV: ")
    assert [row.name for row in rows[2:4]] == ["2", "3"]


def test_a_record_of_several_lines_is_bounded():
    whole, kim = rows_of(b'name\n"' + b"x\n" * 99 + b'x"\nKim\n', "csv")
    assert (whole, kim) == (Row("x\n" * 99 + "x"), Row("Kim"))
    first, *others = rows_of(b'name\n"' + b"x\n" * 100 + b'x"\nKim\n', "csv")
    assert first == Row('"x', "not readable as CSV: no quote closes one that was opened")
    assert others == [*[Row("x")] * 99, Row('x"'), Row("Kim")]
    rows = rows_of(b'name\n"' + (b"x" * 40_000 + b"\n") * 2 + b"Kim\n", "csv")
    assert [row.error is None for row in rows] == [False, True, True]


def test_json_lines():
    content = rb"""
"Kim"
{"name": "\u0141", "x": 1}
{"who": "Nowak"}
{"who": "Nowak", "x": 1}
{"name": 5}
[1]
null
{broken
"\ud800"
"""
    content = content[1:] + b'"\xff"\n\n' + b"[" * 60_000 + b"\n" + b"9" * 5000
    rows = rows_of(content, "jsonl")
    names = ["Kim", "Ł", "Nowak", None, None, None, None, None, "\ud800", "\udcff", "", None, None]
    assert [None if row.error else row.name for row in rows] == names
    assert rows[3] == Row('{"who": "Nowak", "x": 1}', "there is no 'name' in the JSON object")
    assert rows[4] == Row('{"name": 5}', "neither a JSON string nor an object with one")
    assert rows[7].error.startswith("not JSON: ")
    assert names_of(b'{"who": "Kim", "name": ""}\n"Nowak"', "jsonl", "who") == ["Kim", "Nowak"]
    assert rows_of(b'{"name": "Kim"}', "jsonl", "who")[0].error is not None


def test_chunks_are_bounded_in_rows_and_in_characters():
    sizes = [len(chunk) for chunk in chunks([Row("Kim")] * 40_000)]
    assert sizes == [16_384, 16_384, 40_000 - 2 * 16_384]
    long = [len(chunk) for chunk in chunks(Row("x" * 65_537) for _ in range(1_000))]
    assert max(long) == 256
    assert sum(long) == 1_000
    assert list(chunks([])) == []


# What is told


def test_answers_are_those_of_predict(predictor):
    names = ["Frank", "Ślusàrski", "ffrank", "Frank", "O’Neal-Smith"]
    answers = answer_rows(predictor, list(map(Row, names)), top=2)
    for answer, name, told in zip(answers, names, predictor.predict(names, 2), strict=True):
        assert answer.name == name
        assert list(answer.languages) == [language for language, _ in told]
        assert answer.probabilities == pytest.approx([value for _, value in told], abs=1e-6)
        assert (answer.dropped, answer.error) == (dropped(name), None)
    assert answer_rows(predictor, []) == []
    [answer] = answer_rows(predictor, [Row("Kim")], top=99)
    assert sorted(answer.languages) == sorted(LANGUAGES)


@pytest.mark.parametrize(
    ("row", "shown", "error"),
    [
        (Row(""), "", "the name is empty"),
        (Row(" \t"), " \t", "the name is empty"),
        (Row("Иванов"), "Иванов", why_unusable("Иванов")),
        (Row("x" * 10_000), "x" * 100 + "…", why_unusable("x" * 10_000)),
        (Row("Fra\udcffnk"), r"Fra\udcffnk", "not valid UTF-8"),
        (Row("{", "not JSON"), "{", "not JSON"),
    ],
)
def test_a_row_that_cannot_be_read(predictor, row, shown, error):
    first, answer, last = answer_rows(predictor, [Row("Kim"), row, Row("Kim")])
    assert answer == Answer(shown, error=error)
    assert first == last
    assert first.error is None


def test_languages_that_are_not_probable_enough(predictor, run):
    [answer] = answer_rows(predictor, [Row("Kim")], top=4)
    least = answer.probabilities[1] - 1e-6
    [told] = answer_rows(predictor, [Row("Kim")], 4, least)
    assert told == answer._replace(
        languages=answer.languages[:2], probabilities=answer.probabilities[:2]
    )
    assert run("Kim", "--min-probability", 1) == (0, "Kim\n  unknown\n", "")
    out = run("Kim", "--min-probability", 1, "--format", "csv", "--top", 1)[1]
    assert out.splitlines()[1] == "Kim,unknown,,,"
    out = run("Kim", "--min-probability", 1, "--format", "jsonl")[1]
    assert json.loads(out)["languages"] == []


def test_the_table(run):
    code, out, err = run("Frank", "Jean-Luc", "Иванов", "\x1b[31m\u202eX")
    assert (code, err) == (0, "1 of 4 names could not be read\n")
    lines = out.splitlines()
    shown = [line for line in lines if not line.startswith("  ")]
    assert shown == ["Frank", "Jean-Luc", "Иванов", r"\x1b[31m\u202eX"]
    values, languages = zip(*(line.split() for line in lines[1:4]), strict=True)
    assert set(languages) < set(LANGUAGES)
    assert [*values] == sorted(values, reverse=True)
    assert lines[8] == "  not read: -"
    assert lines[10] == f"  error: {why_unusable('Иванов')}"
    assert lines[-1] == r"  not read: \x1b[31\u202e"


def test_csv_out(run):
    code, out, err = run("-", "--format", "csv", "--top", 2, stdin=b'Kim\n\nJean-"Luc",\n')
    assert (code, err) == (0, "1 of 3 names could not be read\n")
    head, kim, empty, jean = csv.reader(io.StringIO(out))
    assert ",".join(head) == "name,language_1,probability_1,language_2,probability_2,dropped,error"
    assert (kim[0], kim[5:]) == ("Kim", ["", ""])
    assert {kim[1], kim[3]} < set(LANGUAGES)
    assert 1 > float(kim[2]) > float(kim[4]) > 0
    assert empty == ["", "", "", "", "", "", "the name is empty"]
    assert (jean[0], jean[5]) == ('Jean-"Luc",', '-""')
    head = "name,language_1,probability_1,dropped,error\n"
    assert run("-", "--format", "csv", "--top", 1) == (0, head, "")


def test_jsonl_out(run):
    code, out, err = run("-", "--format", "jsonl", stdin="Ł-Kim\n\n\u202e\x1bX\n".encode())
    assert (code, err) == (0, "1 of 3 names could not be read\n")
    assert out.isascii()
    kim, empty, odd = map(json.loads, out.splitlines())
    assert list(kim) == ["name", "languages", "dropped", "error"]
    assert (kim["name"], kim["dropped"], kim["error"]) == ("Ł-Kim", "-", None)
    assert [list(told) for told in kim["languages"]] == [["language", "probability"]] * 3
    assert 0 < kim["languages"][2]["probability"] <= kim["languages"][0]["probability"] < 1
    assert empty == {"name": "", "languages": [], "dropped": "", "error": "the name is empty"}
    assert odd["name"] == "\u202e\x1bX"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", r"\x3d1+1"),
        ("+X", r"\x2bX"),
        ("-X", r"\x2dX"),
        ("@X", r"\x40X"),
        ("＝X", r"\uff1dX"),
        ("\tX", r"\tX"),
        ("--", "--"),
        ("a=b", "a=b"),
    ],
)
def test_a_cell_is_no_formula(name, cell):
    body = CsvWriter(1).body([Answer(name, ["Thai"], [0.5], name, None), Answer("", error=name)])
    [first, second] = csv.reader(io.StringIO(body))
    assert first == [cell, "Thai", "0.5", cell, ""]
    assert second == ["", "", "", "", cell]


# The command


def test_files_in_and_out(run, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_bytes(b"id\tname\n1\tKim\n2\tNowak\n")
    for suffix, begin in [("csv", "Kim,"), ("jsonl", '{"name": "Kim", '), ("txt", "Kim\n  0.")]:
        target = tmp_path / "new" / f"out.{suffix}"
        assert run("--input", source, "--output", target) == (0, "", "")
        text = target.read_text()
        assert text.removeprefix(CsvWriter(3).head()).startswith(begin)
        assert text.count("Kim") == text.count("Nowak") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["in.tsv"]


PEOPLE = b"id,surname,town\n1,Nguyen,Hanoi\n2,Kim,Seoul\n"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("people.csv", "people.csv"),
        ("people.csv", "none/../people.csv"),
        ("people.csv", "/people.csv"),
        ("folder/people.csv", "linked/people.csv"),
        ("people.csv", "symbolic.csv"),
        ("people.csv", "hard.csv"),
    ],
)
def test_the_input_is_not_overwritten(run, tmp_path, monkeypatch, source, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to("folder")
    for path in (tmp_path / "people.csv", tmp_path / "folder" / "people.csv"):
        path.write_bytes(PEOPLE)
    (tmp_path / "symbolic.csv").symlink_to("people.csv")
    (tmp_path / "hard.csv").hardlink_to("people.csv")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(predict, "load_predictor", None)  # nothing may be read
    target = f"{tmp_path}{target}" if target.startswith("/") else target
    assert run("--input", source, "--column", "surname", "--output", target) == (
        2,
        "",
        f"{PROGRAM}: error: --output would overwrite what --input reads, {target}: "
        "choose another file\n",
    )
    assert (tmp_path / source).read_bytes() == PEOPLE
    assert sorted(tmp_path.rglob("*")) == before


def test_the_model_is_not_overwritten(run, model):
    before = model.read_bytes()
    code, _, err = run("Kim", "--output", model)
    assert code == 2
    assert f"--output would overwrite what --checkpoint reads, {model}" in err
    assert model.read_bytes() == before


@contextmanager
def redirected(files):
    """Redirects file descriptors to {descriptor: open file}, as a shell does."""
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
        ([0], ["-", "--output", "people.csv"], "--output", "standard input"),
        ([0], ["--input", "/dev/stdin", "--output", "people.csv"], "--output", "--input"),
        ([1], ["--input", "people.csv"], "standard output", "--input"),
        ([1], ["--input", "people.csv", "--output", "-"], "standard output", "--input"),
        ([0, 1], ["-", "--output", "stdout"], "standard output", "standard input"),
    ],
)
def test_redirected_input_is_not_overwritten(
    run, tmp_path, monkeypatch, numbers, argv, written, read
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "people.csv"
    path.write_bytes(PEOPLE)
    (tmp_path / "stdout").symlink_to("/dev/stdout")
    with path.open("r+b") as file, redirected(dict.fromkeys(numbers, file)):
        code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"{PROGRAM}: error: {written} would overwrite what {read} reads")
    assert path.read_bytes() == PEOPLE


def test_devices(run, tmp_path):
    """What looks like a file and is none is written to, and stays what it is."""
    assert run("Kim", "--output", "/dev/null") == (0, "", "")
    assert run("--input", "/dev/null", "--output", "/dev/null") == (0, "", "")
    names, log, stdout = (tmp_path / name for name in ("names.txt", "log.txt", "stdout"))
    names.write_text("Kim\n")
    log.write_text("before\n")
    stdout.symlink_to("/dev/stdout")
    with names.open() as input, log.open("a") as output, redirected({0: input, 1: output}):
        code, out, _ = run("--input", "/dev/stdin", "--output", stdout)
    assert (code, out[:4]) == (0, "Kim\n")  # to sys.stdout, which pytest has replaced
    assert log.read_text() == "before\n"
    assert stdout.is_symlink()


def test_options_of_the_input_arrive(run):
    options = ["--input-format", "csv", "--column", "2", "--no-header", "--delimiter", "tab"]
    out = run("--input", "-", *options, "--output", "-", stdin=b"1\tKim\n")[1]
    assert out.splitlines()[0] == "Kim"


def test_no_name_could_be_read(run, tmp_path):
    code, out, err = run("Иванов")
    assert code == 2
    assert out == f"Иванов\n  error: {why_unusable('Иванов')}\n"
    assert err == f"{PROGRAM}: error: the name could not be read\n"
    target = tmp_path / "out.csv"
    code, out, err = run("-", "--output", target, stdin=b"1\n2\n")
    assert (code, out, err) == (2, "", f"{PROGRAM}: error: none of 2 names could be read\n")
    assert target.read_text().count("\n") == 3


def test_input_that_is_not_there(run, tmp_path):
    for path, reason in [
        (tmp_path, "a folder, and --input takes a file"),
        (tmp_path / "none\x1b", "there is no such file"),
    ]:
        shown = escaped(f"{path}: {reason}")
        assert run("--input", path) == (2, "", f"{PROGRAM}: error: {shown}\n")


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
def test_a_name_that_is_read_as_the_header_is_told(run, content, options, said):
    code, _, err = run("-", "--input-format", "csv", *options, stdin=content)
    line = f"the first row, {said!r}, is read as the header; --no-header reads it as a name\n"
    assert (code, err) == (0, line if said else "")


def test_nothing_is_written_when_the_column_is_not_there(run, tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("old")
    for output in (["--format", "csv"], ["--output", target]):
        code, out, err = run("-", "--input-format", "csv", *output, stdin=b"a,b\n")
        assert (code, out) == (2, "")
        assert err.startswith(f"{PROGRAM}: error: of several columns none is called 'name'")
    assert target.read_text() == "old"
    assert run("Kim", "--output", tmp_path)[0] == 2


def test_an_interrupted_run_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "answer_rows", interrupt)
    target = tmp_path / "out.csv"
    assert run("Kim", "--output", target) == (130, "", f"{PROGRAM}: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_is_for_a_terminal(run, tmp_path, monkeypatch):
    source = tmp_path / "names.txt"
    source.write_text("Kim\n" * 20)
    target = tmp_path / "out.csv"
    for argv, shown in [
        (["--input", source, "--output", target], True),
        (["--input", source], False),
        (["Kim", "--output", target], False),
    ]:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        if not shown:
            monkeypatch.setattr(sys, "stdout", Terminal())
        assert run(*argv)[0] == 0
        assert bool(re.search("80.0/80.0.*20 names", terminal.getvalue())) == shown


def test_memory_does_not_grow_with_the_number_of_names(run, tmp_path, monkeypatch):
    source = tmp_path / "names.txt"
    monkeypatch.setattr(tables, "_CHUNK_ROWS", 512)
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 2048)
    letters = str.maketrans("0123456789", "abcdefghij")
    peaks = []
    for count in (2_048, 8_192):
        source.write_text("".join(f"{number}\n".translate(letters) for number in range(count)))
        tracemalloc.start()
        assert run("--input", source, "--output", tmp_path / "out.jsonl")[0] == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# Whatever comes

ANY = st.one_of(
    st.text(st.characters(), max_size=8),  # all of Unicode, lone surrogates included
    st.text(
        "\0\r\n\t\x1b\x7f\x85\u2028\u202e\u200f\ufeff,\"'={}[]\\ aßЖم\U0001f600\udcff", max_size=12
    ),
    st.sampled_from(["", "x" * 10_000, "\u202eمحمد", "e" + "\u0301" * 500, "Frank"]),
)
FUZZ = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def parsed(out, format):
    """Return (name, languages, error) of each row, after checking what all output must be."""
    assert not any(0xD800 <= ord(character) < 0xE000 for character in out)
    assert all(character.isprintable() or character == "\n" for character in out)
    if format == "csv":
        head, *rows = csv.reader(io.StringIO(out))
        assert {len(row) for row in rows} <= {len(head)}
        return [(row[0], [x for x in row[1:-2:2] if x], row[-1] or None) for row in rows]
    rows = [json.loads(line) for line in out.removesuffix("\n").split("\n")] if out else []
    return [(r["name"], [x["language"] for x in r["languages"]], r["error"]) for r in rows]


def check(result, names, format):
    """Check that the row of each name has an answer or an error, and that the code says which."""
    code, out, err = result
    rows = parsed(out, format)
    assert len(rows) == len(names)
    for (name, languages, error), given_name in zip(rows, names, strict=True):
        if given_name is None:
            continue
        lone = any(0xD800 <= ord(character) < 0xE000 for character in given_name)
        assert (error is None) == (not lone and why_unusable(given_name) is None)
        assert len(languages) == (3 if error is None else 0)
        if error is None and format == "jsonl":
            assert name == given_name
    failed = sum(error is not None for _, _, error in rows)
    assert code == (2 if failed == len(rows) > 0 else 0)
    assert (err == "") == (failed == 0)


@pytest.mark.parametrize("source", ["arguments", "jsonl", "csv"])
@FUZZ
@given(names=st.lists(ANY, max_size=6), format=st.sampled_from(["csv", "jsonl"]))
def test_any_names(run, source, names, format):
    if source == "arguments":
        names = [name for name in names if name != "-"] or ["Kim"]
        result = run("--format", format, "--", *names)
    elif source == "jsonl":
        stdin = "\n".join(map(json.dumps, names)).encode()
        result = run("-", "--input-format", "jsonl", "--format", format, stdin=stdin)
    else:
        names = [name.replace("\0", "").replace("\r", "\n") for name in names]
        text = io.StringIO()
        rows = [["id", "name"], *((1, name) for name in names)]
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
        stdin = text.getvalue().encode("utf-8", "surrogatepass")
        result = run("-", "--input-format", "csv", "--format", format, stdin=stdin)
    check(result, names, format)


@FUZZ
@given(
    content=st.one_of(
        st.binary(max_size=60), st.lists(ANY).map(lambda x: "".join(x).encode(errors="replace"))
    ),
    source=st.sampled_from(["text", "csv", "jsonl"]),
    format=st.sampled_from(["csv", "jsonl"]),
)
def test_any_bytes(run, content, source, format):
    """Text and JSON lines give a row for each line; CSV, whose records span lines, no more."""
    options = ["--input-format", source, "--format", format]
    options += ["--no-header", "--column", "1"] if source == "csv" else []
    result = run("-", *options, stdin=content)
    lines = len(content.splitlines())
    if source != "csv":
        check(result, [None] * lines, format)
    else:
        assert result[0] in (0, 2)
        assert len(parsed(result[1], format)) <= lines
    table = run("-", *options, "--format", "table", stdin=content)
    assert table[0] == result[0]
    assert all(character.isprintable() or character == "\n" for character in table[1])


def test_as_a_program(root):
    """Bytes as the system gives them, and no import that takes seconds."""
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
    assert process.stderr.decode() == "2 of 3 names could not be read\n" * 2
    assert lines[:3] == lines[3:]
    check((0, "".join(lines[:3]), "-"), names, "jsonl")
