"""Tests that `names predict` copies all columns of its input to its output."""

import csv
import gzip
import io
import json
from types import SimpleNamespace

import pytest

from namernn_fast.names.lines import Recoded, lines_of


@pytest.fixture
def predict(call, tmp_path, monkeypatch):
    """Return a function that runs `predict` and returns its output, exit code and messages."""
    monkeypatch.chdir(tmp_path)

    def predicted(content, *options, source="in.csv", target="out.csv"):
        (tmp_path / source).write_bytes(content if isinstance(content, bytes) else content.encode())
        code, out, err = call(
            "predict", "--input", source, "--output", target, "--top", 1, *options
        )
        assert out == ""
        path = tmp_path / target
        return path.read_text().splitlines() if path.exists() else None, code, err.splitlines()

    return predicted


PREDICTIONS = "language_1,probability_1,unusual,dropped,error"


@pytest.mark.parametrize(
    ("content", "options", "head", "begin"),
    [
        ("id,name,town\n7,Kim,Seoul\n", [], "id,name,town", "7,Kim,Seoul"),
        ("name\nKim\n", [], "name", "Kim"),
        ('id;who;"a,b"\n7;Kim;"x,""y"""\n', ["--delimiter", ";", "--column", "who"], *(
            ['id,who,"a,b"', '7,Kim,"x,""y"""']
        )),
        # Column names may be empty or equal. Names and cells may contain blanks and line breaks.
        (",name,x,x, y \n 1 ,Kim,,2,3\n", [], ",name,x,x,y", " 1 ,Kim,,2,3"),
        ('name,n\nKim,"two\nlines"\n', [], "name,n", r"Kim,two\nlines"),
        # Missing cells become empty cells, and extra empty cells are ignored.
        ("name,a,b\nKim,1\n", [], "name,a,b", "Kim,1,"),
        ("name,a\nKim,1,,\n", [], "name,a", "Kim,1"),
        ("7,Kim\n", ["--no-header", "--column", "2"], "column_1,name", "7,Kim"),
        # Cells that a spreadsheet would interpret as formulas are escaped. Numbers are not.
        ("name,a,b,c\nKim,=1+1,-5,+49 30\n", [], "name,a,b,c", r"Kim,\x3d1+1,-5,\x2b49 30"),
        ("=x,name\n1,Kim\n", [], r"\x3dx,name", "1,Kim"),
    ],
)  # fmt: skip
def test_csv_output_keeps_the_columns_of_csv_input(predict, content, options, head, begin):
    (first, row), code, said = predict(content, *options)
    assert (first, code, said) == (f"{head},{PREDICTIONS}", 0, ["wrote 1 row to out.csv"])
    assert row.startswith(f"{begin},")
    assert row.endswith(",,")
    assert len(next(csv.reader([row]))) == len(next(csv.reader([first])))


def test_unreadable_rows_keep_their_columns(predict):
    lines, code, said = predict('id,name\n1,Kim\n2,\n3\n4,Kim,x,y\n"5,Kim\n6,Kim\n')
    cells = [*csv.reader(lines)]
    assert [row[0] for row in cells[1:]] == ["1", "2", "3", "4", "", "6"]
    assert [row[1] for row in cells[1:]] == ["Kim", "", "", "Kim", '"5,Kim', "Kim"]
    errors = [row[-1].partition(":")[0] for row in cells[1:]]
    left_over = "4 cells, but there are 2 columns"
    assert errors[:4] == ["", "the name is empty", "there is no column 2", left_over]
    assert errors[4:] == ["not readable as CSV", ""]
    assert cells[4][-1].endswith("what is left over is 'x', 'y'")
    assert (code, said) == (0, ["wrote 6 rows to out.csv", "4 of 6 names could not be read"])


def test_json_output_keeps_the_columns_of_csv_input(predict):
    content = 'id,name,"a ""b"\n1,Kim,Ł\u202e\n2,\n'
    lines, _, said = predict(content, target="out.jsonl")
    first, second = map(json.loads, lines)
    assert [*first] == ["id", "name", 'a "b', "languages", "unusual", "dropped", "error"]
    assert (first["id"], first["name"], first['a "b']) == ("1", "Kim", "Ł\u202e")
    assert r"Ł\u202e" in lines[0]
    assert (second['a "b'], second["languages"], second["error"]) == ("", [], "the name is empty")
    assert said == ["wrote 2 rows to out.jsonl", "1 of 2 names could not be read"]


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "Kim"}',
        '{"x": 1.10, "name": "Kim", "y": [1e400, {"z": null}], "x2": "\\u0141 \\ud800"}',
        '  {"name":"Kim","é":"Ł"}  ',
        '{"name": "Kim",\t"x": "\u202e"}',
    ],
)
def test_json_output_keeps_the_text_of_json_objects(predict, line):
    (written,), code, _ = predict(line, source="in.jsonl", target="out.jsonl")
    expected = line.strip()[:-1].replace("\t", " ").replace("\u202e", r"\u202e")
    assert written.startswith(f'{expected}, "languages": [')
    assert written.isprintable()
    assert json.loads(written)["error"] is None
    assert code == 0


def test_names_are_read_from_the_only_key_of_json_objects(predict):
    head, *rows = predict('{"who": "Kim"}\n"Nowak"\n', source="in.jsonl")[0]
    assert [line.partition(",")[0] for line in (head, *rows)] == ["who", "Kim", "Nowak"]


def test_csv_output_keeps_the_keys_of_the_first_json_object(predict):
    content = """{"who": "Kim", "n": 1.50, "list": [1, "é"], "none": null, "yes": true}
"Nowak"
{"n": "x", "who": "Lis", "more": 3}
{"n": 2}
"""
    lines, code, said = predict(content, "--column", "who", source="in.jsonl")
    head, *rows = csv.reader(lines)
    assert head[:-5] == ["who", "n", "list", "none", "yes"]
    assert [row[:5] for row in rows] == [
        ["Kim", "1.5", '[1, "é"]', "", "true"],
        ["Nowak", "", "", "", ""],
        ["Lis", "x", "", "", ""],
        ["", "2", "", "", ""],
    ]
    assert rows[-1][-1] == "there is no 'who' in the JSON object; --column takes one of 'n'"
    assert said == [
        "wrote 4 rows to out.csv",
        "1 of 4 rows have keys that the first JSON object lacks; CSV leaves them out, JSON lines "
        "keep them",
        "1 of 4 names could not be read",
    ]
    assert code == 0


@pytest.mark.parametrize(
    ("content", "source", "target", "said"),
    [
        ("name,dropped,error\nKim,,\n", "in.csv", "out.csv", "'dropped', 'error'"),
        ("name,language_1\nKim,\n", "in.csv", "out.csv", "'language_1'"),
        ("name,languages\nKim,\n", "in.csv", "out.jsonl", "'languages'"),
        ('{"name": "Kim"}\n{"name": "Kim", "error": 1}', "in.jsonl", "out.jsonl", "'error'"),
    ],
)
def test_input_columns_named_like_predictions_are_rejected(predict, content, source, target, said):
    written, code, messages = predict(content, source=source, target=target)
    assert (written, code) == (None, 2)
    advice = f"the input has columns that predictions also have: {said}; rename them"
    assert messages[-1].endswith(advice)


def test_json_output_requires_distinct_column_names(predict):
    written, code, (message,) = predict("x,name,x\n1,Kim,2\n", target="out.jsonl")
    assert (written, code) == (None, 2)
    assert message.endswith("several columns are called 'x', but JSON keys are unique: write CSV")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be", "shift_jis", "utf-8"])
def test_input_is_decoded_with_the_given_encoding(predict, encoding):
    cells = "Kim,ソ表" if encoding == "shift_jis" else "Müller,€"
    (_, row), code, _ = predict(f"name,x\n{cells}\n".encode(encoding), "--encoding", encoding)
    assert code == 0
    assert row.startswith(f"{cells},")


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_decoding_does_not_depend_on_block_sizes(size):
    expected = ["Müller", "Ł€", "\U0001f600"]
    content = io.BytesIO("\n".join(expected).encode("utf-16"))
    pipe = SimpleNamespace(read1=lambda most: content.read(size))
    assert [line.decode() for line in lines_of(Recoded(pipe, "utf-16"))] == expected


def test_undecodable_bytes_affect_only_their_row(predict):
    (_, bad, good), code, said = predict(b"name\nM\x81ller\nKim\n", "--encoding", "cp1252")
    error = "not valid in the encoding of the input; --encoding names another"
    assert bad == rf"M\udc81ller,,,,,{error}"
    assert good.startswith("Kim,")
    advice = "the input is not CP1252; --encoding utf-8, for example, names another encoding"
    assert (code, said) == (
        0,
        [advice, "wrote 2 rows to out.csv", "1 of 2 names could not be read"],
    )


def test_undecodable_bytes_in_other_columns_are_reported(predict):
    (_, row), code, said = predict("name,town\nKim,Köln\n".encode("cp1252"))
    advice = "the input is not UTF-8; --encoding cp1252, for example, names another encoding"
    assert row.startswith(r"Kim,K\udcf6ln,")
    assert (code, said) == (0, [advice, "wrote 1 row to out.csv"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.csv.gz", b"id,name\n1,Kim\n"), ("in.tsv.GZ", b"id\tname\n1\tKim\n")],
)
def test_gzip_is_read_and_damaged_gzip_is_reported(predict, name, content):
    packed = gzip.compress(content)
    (head, row), code, _ = predict(packed, source=name)
    assert (head, row[:6], code) == (f"id,name,{PREDICTIONS}", "1,Kim,", 0)
    for damaged in (packed[:-12], content, packed[:12] + b"\xff" * 20):
        written, code, (message,) = predict(damaged, source=name, target="other.csv")
        assert (written, code) == (None, 2)
        assert f"error: {name}: damaged, or not a gzip file (" in message


def test_the_output_path_is_checked_before_the_model_is_loaded(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("namernn_fast.names.commands.predict.load_predictor", None)
    (tmp_path / "folder.csv").mkdir()
    for target, said in (
        ("none/out.csv", "none/out.csv: there is no folder none"),
        ("out.xlsx", "out.xlsx: --output takes .txt, .csv, .tsv, .json, .jsonl, .ndjson, or any"),
        ("out", "out: --output takes .txt, "),
        ("folder.csv", "folder.csv: not a regular file"),
    ):
        assert fails("predict", "Kim", "--output", target).startswith(said)
    assert [*tmp_path.rglob("*")] == [tmp_path / "folder.csv"]


def test_a_file_path_given_as_a_name_is_reported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ("predict", "people.csv", "names.txt", "Kim", "x" * 300 + ".txt")
    assert run(*argv)[1] == ""
    for name in argv[1:4]:
        (tmp_path / name).write_text("name\nKim\n")
    assert run(*argv)[1].splitlines() == [
        f"{name} is read as a name; --input {name} reads the file" for name in argv[1:3]
    ]


def test_json_output_is_utf_8_for_any_terminal_encoding(root, run_program):
    argv = ("-m", "namernn_fast.names", "predict", "Müller", "--format", "jsonl")
    out = run_program(*argv, cwd=root, PYTHONIOENCODING="latin-1")
    assert json.loads(out)["name"] == "Müller"
