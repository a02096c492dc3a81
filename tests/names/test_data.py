"""Tests reading names from folders, zips and the cache, and rejecting damaged or hostile files."""

import hashlib
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namernn_fast.names import ASCII, InputError, dataset, files, load_names, read_names
from namernn_fast.names.folding import why_unusable
from namernn_fast.names.sample import SAMPLE

TWO = {"data/names/Basque.txt": "Etxeberria\nAgirre\n", "data/names/Welsh.txt": "Llewelyn\nPugh"}


def test_the_sample_has_enough_distinct_usable_names():
    sample = dataset.embedded_sample()
    assert (sample.is_sample, sample.source) == (True, "the embedded sample")
    assert min(sample.counts().values()) >= 15
    assert len(set(sample.rows)) == len(sample.rows) == sum(map(len, SAMPLE.values())) >= 300
    assert all(ASCII.fold(name) for name, _ in sample.rows)


@pytest.fixture(params=["folder", "zip"])
def make_source(request, make_folder, make_zip):
    """Return a function that writes {language: text or bytes} to a folder or a zip.

    The function returns the path, and the words that errors use for the source.
    """

    def make(files):
        if request.param == "folder":
            path = make_folder(files)
        else:
            path = make_zip({f"data/names/{name}.txt": text for name, text in files.items()})
        return path, f"the {request.param} {path}"

    return make


def test_only_the_text_files_of_a_folder_are_read(make_folder):
    folder = make_folder(
        {"Welsh": "Llewelyn\r\nPugh ", "Basque": "\ufeffAgirre\n", "Basque-B": "Etxe"}
    )
    (folder / ".hidden.txt").write_text("no\n")
    (folder / "notes.md").write_text("no\n")
    (folder / "Folder.txt").mkdir()
    names = read_names(folder)
    assert names.languages == ("Basque", "Basque-B", "Welsh")
    assert names.rows == (("Agirre", 0), ("Etxe", 1), ("Llewelyn", 2), ("Pugh", 2))
    assert names.source == f"the folder {folder}"


def test_only_the_expected_members_of_a_zip_are_read(make_zip, tmp_path):
    odd = (
        "data/names/../../evil.txt",
        "data/names/../Evil.txt",
        "data/names/..txt",
        "data/names/sub/Evil.txt",
        "data/names/sub\\Evil.txt",
        "/data/names/Evil.txt",
        "../data/names/Evil.txt",
        "data/names/.Evil.txt",
        "__MACOSX/data/names/Evil.txt",
        "data/eng-fra.txt",
    )
    path = make_zip(TWO | dict.fromkeys(odd, b"\xff" * 2**23))
    before = sorted(tmp_path.rglob("*"))
    names = read_names(path)
    assert names.source == f"the zip {path}"
    assert names.languages == ("Basque", "Welsh")
    assert names.rows == (("Etxeberria", 0), ("Agirre", 0), ("Llewelyn", 1), ("Pugh", 1))
    assert sorted(tmp_path.rglob("*")) == before


def test_data_argument_overrides_environment_and_cache(make_folder, make_zip, cache, monkeypatch):
    cache.mkdir(parents=True)
    make_zip(TWO).rename(cache / "data.zip")
    assert load_names().source == f"the cached download {cache / 'data.zip'}"
    monkeypatch.setenv("NAMERNN_FAST_DATA", "")
    assert load_names().languages == ("Basque", "Welsh")
    monkeypatch.setenv("NAMERNN_FAST_DATA", str(make_folder({"Thai": "Saetang"}, "variable")))
    assert load_names().languages == ("Thai",)
    assert load_names(make_folder({"Maori": "Ngata"}, "named")).languages == ("Maori",)


def test_without_a_home_folder_reading_data_requires_a_path(homeless, make_zip):
    advice = "there is no folder for downloads and trained models: set HOME or XDG_CACHE_HOME"
    assert refusal(None) == advice
    assert refusal("~/data.zip") == "Could not determine home directory."
    assert read_names(make_zip(TWO)).languages == ("Basque", "Welsh")


@pytest.mark.parametrize("home", [None, "relative"])
def test_the_default_cache_is_in_the_home_folder(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert files.cache_folder() == tmp_path / ".cache" / "namernn_fast"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "macintosh"])
def test_skipped_lines_are_reported_once(make_folder, caplog, end):
    """Lines may end as on Unix, Windows or old Macs. Empty lines and unusable names are counted."""
    welsh = ["Pugh", "", " ", "", "Price", "李", "x" * 1001, "x" * 1000]
    folder = make_folder({"Basque": f"Agirre{end}{end} {end}12{end}", "Welsh": end.join(welsh)})
    names = [name for name, _ in read_names(folder).rows]
    assert names == ["Agirre", "Pugh", "Price", "x" * 1000]
    assert [record.getMessage() for record in caplog.records] == [
        f"the folder {folder}: skipped 5 empty lines and 3 unusable names"
    ]


NOTES = ["README", "readme", "LICENSE", "Licence", "COPYING", "NOTICE", "CHANGELOG", "AUTHORS"]


def test_files_such_as_readme_are_not_read_as_languages(make_source, caplog):
    path, _ = make_source({"Basque": "Agirre", **dict.fromkeys(NOTES, "Do as you like.")})
    assert read_names(path).languages == ("Basque",)
    for note in NOTES:
        assert f"{path}: {note}.txt is not taken for a language" in caplog.text


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_zip_member_is_an_error(make_zip):
    path = make_zip(TWO)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("data/names/Welsh.txt", "Price")
        file.writestr("data/other.txt", "")
        file.writestr("data/other.txt", "")
    assert refusal(path) == f"{path}: data/names/Welsh.txt occurs more than once in the zip"


def test_too_many_languages_are_an_error(make_zip, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_LANGUAGES", 2)
    path = make_zip(TWO)
    assert read_names(path).languages == ("Basque", "Welsh")
    path = make_zip(TWO | {"data/names/Xhosa.txt": "Mandela"})
    assert refusal(path) == f"the zip {path}: more than 2 languages"


def test_the_data_hash_depends_only_on_the_rows(make_folder, make_zip):
    folder = make_folder({"Basque": "Etxeberria\nAgirre", "Welsh": "Llewelyn\r\nPugh\n\n"})
    lines = "Basque\tEtxeberria\nBasque\tAgirre\nWelsh\tLlewelyn\nWelsh\tPugh\n"
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert read_names(folder).sha256 == read_names(make_zip(TWO)).sha256 == expected


def refusal(path):
    with pytest.raises(InputError) as error:
        load_names(path)
    return str(error.value)


def test_a_missing_path_is_an_error(tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    assert refusal(missing) == f"{missing}: there is no such folder or file"
    monkeypatch.setenv("NAMERNN_FAST_DATA", str(missing))
    assert refusal(None) == f"NAMERNN_FAST_DATA: {missing}: there is no such folder or file"
    assert refusal("") == "the path of the data is empty"
    assert refusal("/dev/null") == "/dev/null: neither a folder nor a zip"


@pytest.mark.parametrize("files", [{}, {"README": "Do as you like."}])
def test_a_source_without_names_is_an_error(make_source, files):
    path, _ = make_source(files)
    assert refusal(path).startswith(f"{path}: no names here; ")


@pytest.mark.parametrize(
    ("language", "content", "message"),
    [
        ("Welsh", "", "Welsh.txt holds no names"),
        ("Welsh", "\n \n\n", "Welsh.txt holds no names"),
        ("Welsh", "李\n123\n", f"Welsh.txt holds no usable name: {why_unusable('李')}"),
        ("German", "Müller".encode("latin-1"), "German.txt is not UTF-8 ("),
        ("German", "Müller\n".encode("utf-16"), "German.txt is not UTF-8 ("),
        *(
            (language, "Agirre", f"{language!r} cannot be the name of a language")
            for language in ("\x1b[2J", "two\nlines", "\u202eleft", " ", "x" * 51)
        ),
    ],
)
def test_the_error_names_the_language_that_cannot_be_read(make_source, language, content, message):
    path, where = make_source({"Basque": "Agirre", language: content})
    assert refusal(path).startswith(f"{where}: {message}")


def test_a_file_that_is_not_a_complete_zip_is_an_error(make_zip):
    path = make_zip(TWO)
    whole = path.read_bytes()
    for content in (b"Agirre\n", *(whole[:size] for size in range(0, len(whole), 7))):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: not a readable zip (")


def test_a_zip_bomb_is_rejected_even_if_its_header_is_wrong(make_folder, make_zip):
    bomb = b"a" * (dataset.MAX_FILE_BYTES + 1)
    folder = make_folder({"Bomb": bomb})
    assert refusal(folder) == f"{folder / 'Bomb.txt'}: too large, more than 4 MiB"
    path = make_zip({"data/names/Bomb.txt": bomb})
    assert path.stat().st_size < 2**13
    assert refusal(path) == f"{path}: data/names/Bomb.txt: too large, more than 4 MiB"
    content = path.read_bytes()
    size = struct.pack("<I", len(bomb))
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, struct.pack("<I", 7)))
    assert refusal(path).startswith(f"{path}: not a readable zip (Bad CRC-32")


@pytest.mark.covering(0)
def test_the_total_size_of_the_files_is_limited(make_source, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_TOTAL_BYTES", 2**20)
    path, where = make_source(dict.fromkeys("ABC", "Agirre\n" * (2**20 // 7 // 2)))
    assert refusal(path) == f"{where}: too large, more than 1 MiB"


def test_a_large_archive_is_rejected_before_it_is_read(make_zip, monkeypatch):
    path = make_zip(TWO)
    monkeypatch.setattr(dataset, "MAX_ARCHIVE_BYTES", path.stat().st_size)
    assert read_names(path).languages == ("Basque", "Welsh")
    monkeypatch.setattr(dataset, "MAX_ARCHIVE_BYTES", path.stat().st_size - 1)
    assert "too large, more than" in refusal(path)


def test_an_unknown_compression_method_is_an_error(make_zip):
    path = make_zip(TWO, zipfile.ZIP_BZIP2)
    assert refusal(path) == f"{path}: data/names/Basque.txt: unsupported compression"


def test_an_encrypted_zip_is_an_error(make_zip):
    path = make_zip(TWO)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    assert "is encrypted, password required for extraction" in refusal(path)


@settings(deadline=None, database=None, max_examples=200)
@given(st.data())
def test_reading_a_damaged_zip_returns_names_or_raises_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, text in TWO.items():
            file.writestr(member, text)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        outcome = read_names(path).source
    except InputError as error:
        outcome = str(error)
    assert str(path) in outcome


def test_files_are_replaced_atomically(tmp_path):
    path = tmp_path / "new" / ("x" * 255)  # the longest file name that most file systems allow
    with files.replacing(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def interrupted():
        with files.replacing(path) as file:
            file.write(b"tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_a_symbolic_link_survives_replacing_its_target(tmp_path):
    link, path = tmp_path / "link", tmp_path / "folder" / "new"
    link.symlink_to(path)
    with files.replacing(link) as file:
        file.write(b"one")
    assert link.is_symlink()
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_only_regular_files_are_replaced(path):
    with (
        pytest.raises(InputError, match=f"^{path}: not a regular file$"),
        files.replacing(Path(path)),
    ):
        pass
