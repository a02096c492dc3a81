"""Folding, encoding and packing of names."""

import string
import unicodedata

import pytest
import torch
from bounds import bounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from namernn_fast.names import ALPHABET, InputError, encode, encode_names, fold
from namernn_fast.names.dataset import read_names
from namernn_fast.names.encoding import encode_folded
from namernn_fast.names.text import (
    MAX_NAME_LENGTH,
    SPELLINGS,
    dropped,
    escaped,
    fold_lines,
    fold_usable,
    why_unusable,
)

# Rich in what folding looks at: ends, newlines, other controls, letters with marks and without.
_TELLING = "abzAZ .,;'`-1\n\r\t\0\x1f\x1c" + "ßéŁæİ李\u0301\u0323\u037e\u1fef\u00a0\u2028\ud800"
any_text = st.text() | st.text(st.sampled_from(_TELLING))
folded_names = st.text(ALPHABET, min_size=1, max_size=20).filter(str.strip).map(str.strip)
quick = settings(deadline=None, database=None, max_examples=100)
many = settings(deadline=None, database=None, max_examples=500)


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("Ślusàrski", "slusarski"),
        ("O'Néàl", "o'neal"),
        ("To The First Page", "to the first page"),
        ("Lu:", "lu"),
        ("Abl. Jr.,;'", "abl. jr.,;'"),
        ("Großmann-Łoś2", "grossmannlos"),
        ("İstanbul\u212a", "istanbulk"),
        ("e\u0301\u0323", "e"),
        (" Ahn \u00a0", "ahn"),
        ("Иванов", ""),
        ("李 - 2", ""),
        ("\ud800", ""),
        ("", ""),
    ],
)
def test_fold(name, folded):
    assert fold(name) == folded


@quick
@given(st.text())
def test_fold_gives_a_string_over_the_alphabet_and_keeps_it(name):
    folded = fold(name)
    assert set(folded) <= set(ALPHABET)
    assert folded == folded.strip()
    assert fold(folded) == folded


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("O’Neal", "o'neal"),
        ("O‘Neal", "o'neal"),
        ("Oʼneal", "o'neal"),
        ("O´Neal", "o'neal"),
        ("O`Neal", "o'neal"),
        ("Strauß", "strauss"),
        ("STRAUẞ", "strauss"),
        ("Łoś", "los"),
        ("Ǿ", "o"),
        ("Ǽbelø", "aebelo"),
        ("Œuvray", "oeuvray"),
        ("Đorđević", "dordevic"),
        ("Þórðarson", "thordarson"),
        ("Ħal-Għaxaq Ŧ", "halghaxaq t"),
        ("Işık", "isik"),
        ("Van\u00a0der\u202fBerg", "van der berg"),
    ],
)
def test_usual_spellings(name, folded):
    assert fold(name) == folded
    assert fold(name.upper()) == folded
    assert dropped(name) == "-" * name.count("-")


def test_every_spelling_is_over_the_alphabet():
    for character, spelling in SPELLINGS.items():
        assert set(spelling.lower()) <= set(ALPHABET)
        assert fold(f"x{character}x") == f"x{spelling.lower()}x"
        assert fold(f"x{character.upper()}x") == f"x{spelling.lower()}x"


def seed_fold(name):
    """The folding that the data set is customarily read with."""
    marked = unicodedata.normalize("NFD", name)
    return "".join(c for c in marked if c in string.ascii_letters + " .,;'").lower().strip()


def defined_fold(name):
    """The folding in the words of its documentation, a character at a time."""
    spelled = (SPELLINGS.get(c, c) for c in unicodedata.normalize("NFD", name))
    kept = (c for c in "".join(spelled) if c in string.ascii_letters + " .,;'")
    return "".join(kept).lower().strip(" ")


@many
@given(any_text)
def test_folding_is_what_its_documentation_says(name):
    assert fold(name) == defined_fold(name)


@many
@given(st.lists(any_text, max_size=6))
def test_names_are_folded_together_as_they_are_one_by_one(names):
    assert fold_lines(names).decode("ascii") == "\n".join(map(fold, names))
    assert fold_usable(names) == [*map(fold, names)]


@pytest.mark.parametrize(
    "names",
    [
        [""],
        ["", ""],
        ["\n"],
        ["a\n", "\nb", "c"],
        [" a", "b ", "  c  ", " ", "d"],
        ["a b", "c  ", "  d"],
        [" " * 900 + "a" + " " * 99, "b"],
        ["é", "\u0301a", "e", "\u0301"],
        ["é" * 1000, "æ" * 1000, "\u0301" * 999 + "a"],
        ["Ślusàrski ", "\u00a0Ahn", "李"],
    ],
    ids=range(10),
)
def test_odd_names_are_folded_together_as_they_are_one_by_one(names):
    assert fold_lines(names).decode("ascii") == "\n".join(map(defined_fold, names))


def test_names_that_are_too_long_are_not_folded():
    names = ["x" * (MAX_NAME_LENGTH + 1), "Kim", "-", "x" * MAX_NAME_LENGTH]
    assert fold_usable(names) == ["", "kim", "", "x" * MAX_NAME_LENGTH]
    assert fold_usable([]) == []


def test_the_real_names_are_folded_together_as_they_are_one_by_one(real_folder):
    names = [name for name, _ in read_names(real_folder).rows]
    assert fold_lines(names).decode("ascii") == "\n".join(map(defined_fold, names))


def test_the_spellings_change_few_rows_of_the_real_data(real_folder):
    names = [name for name, _ in read_names(real_folder).rows]
    changed = [name for name in names if fold(name) != seed_fold(name)]
    # Nine with ß, one with ł, and one that has a no-break space between its parts.
    assert len(changed) == 11
    assert all(set(name) & set(SPELLINGS) for name in changed)


@quick
@given(st.text())
def test_the_spellings_are_the_only_change_of_the_folding(name):
    if not set(unicodedata.normalize("NFD", name)) & set(SPELLINGS):
        assert fold(name) == seed_fold(name)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("Müller-Lüdenscheidt 2", "-2"),
        ("e\u0301\u0323", ""),
        (" Ahn\u00a0", ""),
        ("Иванов", "Иванов"),
        ("и\u0306", "й"),
        ("\u0301Kim", "\u0301"),
        ("Kim-\u0301", "-\u0301"),
        ("\x1b[31mKim", "\x1b[31"),
        ("", ""),
    ],
)
def test_what_is_dropped(name, lost):
    assert dropped(name) == lost


@quick
@given(st.text())
def test_what_is_dropped_leaves_no_trace(name):
    assert fold(dropped(name)) == ""
    if not dropped(name) + fold(name):
        assert not name.strip()


def test_a_name_that_is_too_long():
    assert why_unusable("x" * MAX_NAME_LENGTH) is None
    long = "x" * (MAX_NAME_LENGTH + 1)
    assert why_unusable(long) == "a name of 1,001 characters: at most 1,000 are read"
    with pytest.raises(InputError, match=r"^a name of 1,001 characters"):
        encode_names(["Kim", long])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("O'Néàl 李 ", "O'Néàl 李 "),
        ("\x1b[31mX", r"\x1b[31mX"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("\u202eright to left", r"\u202eright to left"),
        ("\u200b\ufeff\ue000", r"\u200b\ufeff\ue000"),
        ("\ud800", r"\ud800"),
    ],
)
def test_escaped(text, shown):
    assert escaped(text) == shown
    assert escaped(shown) == shown


@quick
@given(st.text())
def test_escaped_is_printable_and_keeps_what_is(text):
    assert escaped(text).isprintable()
    if text.isprintable():
        assert escaped(text) == text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Frank", "names must be a list of strings, not str"),
        (b"Frank", "names must be a list of strings, not bytes"),
        (7, "names must be a list of strings, not int"),
        (None, "names must be a list of strings, not NoneType"),
        (["Frank", b"Kim"], "names must hold strings, but names[1] is b'Kim'"),
        (["Frank", None], "names must hold strings, but names[1] is None"),
        ([["Frank"]], "names must hold strings, but names[0] is ['Frank']"),
    ],
)
def test_a_string_is_no_list_of_names(names, message):
    with pytest.raises(TypeError) as error:
        encode_names(names)
    assert str(error.value) == message


def test_the_alphabet_is_the_fields():
    assert ALPHABET == "abcdefghijklmnopqrstuvwxyz .,;'"


def test_encode_gives_places_in_the_alphabet():
    ids = encode("Zoë D'")
    assert ids.dtype == torch.int64
    assert [ALPHABET[i] for i in ids] == list("zoe d'")


@pytest.mark.parametrize("name", ["", "  ", "李", "Иванов"])
def test_a_name_without_a_usable_character_is_refused(name):
    with pytest.raises(InputError) as error:
        encode(name)
    assert str(error.value) == (
        f"{name!r} holds no usable character: letters from A to Z, plain or accented, and .,;' are"
    )


def test_no_names_are_refused():
    with pytest.raises(InputError, match=r"^no names were given$"):
        encode_names([])


@many
@given(st.lists(any_text | folded_names | st.just("x" * 1001), min_size=1, max_size=6))
def test_encode_names_is_its_definition_errors_included(names):
    """The error speaks of the first unusable name, whatever is wrong with it."""
    reasons = [reason for reason in map(why_unusable, names) if reason is not None]
    if reasons:
        with pytest.raises(InputError) as error:
            encode_names(names)
        assert str(error.value) == reasons[0]
        return
    encoded = encode_names(names)
    texts = [*map(fold, names)]
    assert encoded.characters.dtype == encoded.lengths.dtype == torch.int64
    assert encoded.characters.tolist() == [ALPHABET.index(c) for c in "".join(texts)]
    assert encoded.lengths.tolist() == [*map(len, texts)]
    assert torch.equal(encoded.starts, encoded.lengths.cumsum(0) - encoded.lengths)
    again = encode_folded(texts)
    for name in ("characters", "starts", "lengths"):
        assert torch.equal(getattr(again, name), getattr(encoded, name))


@quick
@given(st.lists(folded_names, min_size=1, max_size=30), st.integers(1, 40), st.data())
def test_many_batches_are_packed_as_they_are_one_by_one(names, batch_size, data):
    encoded = encode_names(names)
    indices = torch.tensor(data.draw(st.permutations(range(len(names)))))
    ordered = encoded.by_length(indices, batch_size)
    expected = [encoded.by_length(batch) for batch in indices.split(batch_size)]
    assert torch.equal(ordered, torch.cat(expected))
    found = [*encoded.pack_each(ordered, batch_size)]
    assert len(found) == len(expected)
    for packed, batch in zip(found, expected, strict=True):
        alone = encoded.pack(batch)
        assert packed.sorted_indices is None
        assert packed.batch_sizes.device.type == "cpu"
        assert torch.equal(packed.data, alone.data)
        assert torch.equal(packed.batch_sizes, alone.batch_sizes)


def test_many_batches_are_packed_in_bounded_memory():
    """A long name among many would make a table of 60 million places, were there one for all."""
    names = encode_names(["Kim", "x" * 1000, "Papadopoulos"] * 20_000)
    with bounded(32):
        count = sum(1 for _ in names.pack_each(names.by_length(torch.arange(len(names)), 64), 64))
    assert count == 938


def test_no_names_make_no_batch():
    assert [*encode_names(["a"]).pack_each(torch.arange(0), 3)] == []
    with pytest.raises(IndexError):
        next(encode_names(["a"]).pack_each(torch.arange(2), 3))


@quick
@given(st.lists(folded_names, min_size=1, max_size=30))
def test_names_are_sorted_by_their_beginnings(names):
    encoded = encode_names(names)
    order = encoded.by_beginning(torch.arange(len(names)))
    expected = sorted(range(len(names)), key=lambda i: encode(names[i])[:6].tolist())
    assert order.tolist() == expected


@quick
@given(st.lists(folded_names, min_size=1, max_size=12), st.data())
def test_pack_is_pack_sequence(names, data):
    encoded = encode_names(names)
    assert len(encoded) == len(names)
    places = st.integers(0, len(names) - 1)
    indices = torch.tensor(data.draw(st.lists(places, min_size=1, max_size=12)))
    packed = encoded.pack(indices)
    expected = pack_sequence([encode(names[i]) for i in indices], enforce_sorted=False)
    assert packed.data.dtype == torch.int64
    assert torch.equal(packed.data, expected.data)
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)
    lengths = encoded.lengths[indices]
    if torch.equal(lengths, lengths.sort(descending=True).values):
        assert packed.sorted_indices is None
        assert packed.unsorted_indices is None
    else:
        assert torch.equal(lengths[packed.sorted_indices], lengths.sort(descending=True).values)
        assert torch.equal(
            packed.sorted_indices[packed.unsorted_indices], torch.arange(len(indices))
        )


@quick
@given(st.lists(folded_names, min_size=1, max_size=12))
def test_by_length_needs_no_reordering(names):
    encoded = encode_names(names)
    indices = encoded.by_length(torch.arange(len(names)))
    assert sorted(indices.tolist()) == list(range(len(names)))
    packed = encoded.pack(indices)
    assert packed.sorted_indices is None
    expected = pack_sequence([encode(names[i]) for i in indices])
    assert torch.equal(packed.data, expected.data)
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)


def test_pack_refuses_an_empty_batch_and_indices_out_of_range():
    encoded = encode_names(["a", "bc"])
    with pytest.raises(ValueError, match=r"^a batch holds at least one name$"):
        encoded.pack(torch.arange(0))
    with pytest.raises(IndexError):
        encoded.pack(torch.tensor([2]))


def test_the_real_names_fold_as_their_description_says(real_folder):
    names = [name for name, _ in read_names(real_folder).rows]
    assert max(len(name) for name in names) == 20
    assert max(len(fold(name)) for name in names) == 19
    dropped = "".join(names)
    assert [dropped.count(sign) for sign in "-ßł\u00a0:/"] == [25, 9, 1, 1, 1, 1]
    assert sum(fold(name) != name.lower().strip(" ") for name in names) == 185
