"""Tests folding, encoding and packing of names."""

import re
import string
import unicodedata

import pytest
import torch
from bounds import bounded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from namernn_fast.names import ASCII, Folding, InputError, encode, encode_names
from namernn_fast.names.encoding import encode_folded
from namernn_fast.names.folding import MAX_LETTERS, SPELLINGS, letters_of, why_unusable
from namernn_fast.names.text import escaped

ACCENTED = Folding("ßáéłñś")
FOLDINGS = (ASCII, Folding(), ACCENTED)
# Characters for every branch of folding: letters with and without marks, punctuation, whitespace,
# control characters and a lone surrogate.
_TELLING = (
    "abzAZ .,;'`-1\n\r\t\0\x1f\x1c" + "ßẞéÉŁæİ李\u0301\u0323\u037e\u1fef\u00a0\u2010\u2028\ud800"
)
any_text = st.text() | st.text(st.sampled_from(_TELLING))
folded_names = st.text(ASCII.alphabet, min_size=1, max_size=20).filter(str.strip).map(str.strip)
LONG = "x" * 1001


@pytest.mark.parametrize(
    ("folding", "name", "folded", "lost"),
    [
        (ASCII, "Ślusàrski", "slusarski", ""),
        (ASCII, "Großmann-Łoś2", "grossmannlos", "-2"),
        (ASCII, "İstanbul\u212a", "istanbulk", ""),
        (ASCII, "Иванов", "", "Иванов"),
        (ASCII, "и\u0306", "", "й"),
        (ASCII, "\u0301Kim", "kim", "\u0301"),
        (ASCII, "Kim-\u0301", "kim", "-\u0301"),
        (ASCII, "\x1b[31mKim", "mkim", "\x1b[31"),
        (ASCII, "\ud800", "", "\ud800"),
        (ASCII, "’‘ʼ´`Neal'", "'''''neal'", ""),
        (ASCII, "STRAUẞ", "strauss", ""),
        (ASCII, "Ǽbelǿ", "aebelo", ""),
        (ASCII, "Œuvray", "oeuvray", ""),
        (ASCII, "Đorđević", "dordevic", ""),
        (ASCII, "Þórðarson", "thordarson", ""),
        (ASCII, "Ħal-Għaxaq Ŧ", "halghaxaq t", "-"),
        (ASCII, "Işık", "isik", ""),
        (ASCII, "Van\u00a0der\u202fBerg", "van der berg", ""),
        (ACCENTED, "Al-Farsi", "al farsi", ""),
        (ACCENTED, "ŚLUSÀRSKI", "ślusarski", ""),
        (ACCENTED, "STRAUẞ", "strauß", ""),
        (ACCENTED, "Nuñez\u2010García2", "nuñez garcia", "2"),
        (ACCENTED, "李-é", "é", "李"),
    ],
)
def test_folding_keeps_and_drops_the_expected_characters(folding, name, folded, lost):
    assert folding.fold(name) == folding.fold(name.upper()) == folded
    assert folding.dropped(name) == lost


@given(st.text())
def test_dropped_characters_fold_to_an_empty_string(name):
    for folding in FOLDINGS:
        lost, folded = folding.dropped(name), folding.fold(name)
        assert folding.fold(lost) == ""
        if not lost + folded:
            hyphens = "" if folding is ASCII else "-\u2010\u2011\u2013"
            assert not name.strip().strip(hyphens + string.whitespace + "\u00a0")


def defined_fold(name, folding=ASCII):
    """Folds a name as the documentation defines folding, one character at a time."""
    folded = ""
    for letter in unicodedata.normalize("NFC", name):
        if letter.lower() in {*folding.letters}:
            folded += letter.lower()
            continue
        spelled = (SPELLINGS.get(c, c) for c in unicodedata.normalize("NFD", letter))
        for c in "".join(spelled):
            if c in string.ascii_letters + " .,;'":
                folded += c.lower()
            elif c == "-" and folding.version > 2:
                folded += " "
    if folding.version > 2:
        return " ".join(part for part in folded.split(" ") if part)
    return folded.strip(" ")


@settings(max_examples=500)
@given(st.lists(any_text, max_size=6))
@example([""])
@example(["", ""])
@example(["\n"])
@example(["a\n", "\nb", "c"])
@example([" a", "b ", "  c  ", " ", "d"])
@example(["a b", "c  ", "  d"])
@example([" " * 900 + "a" + " " * 99, "b"])
@example(["é", "\u0301a", "e", "\u0301"])
@example(["é" * 1000, "æ" * 1000, "\u0301" * 999 + "a"])
@example([f"x{letter}x" for letter in SPELLINGS])
def test_folding_matches_its_documentation(names):
    """Covers single names and lists of names."""
    for folding in FOLDINGS:
        folded = [defined_fold(name, folding) for name in names]
        assert [*map(folding.fold, names)] == folded
        assert folding.fold_usable(names) == folded
        assert folding.joined(folded) == folding.fold_lines(names)
        assert [name for name, text in zip(names, folded, strict=True) if not text] == [
            name for name in names if why_unusable(name)
        ]


UNUSABLE = (
    "'{}' has no character that the model reads: it reads Latin letters, with or without accents, "
    "and the signs . , ; '"
)


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ([], InputError, "no names were given"),
        (["Kim", "", "李"], InputError, "the name is empty"),
        (["Kim", "\x1b Иванов", LONG], InputError, UNUSABLE.format(r"\x1b Иванов")),
        (["Kim", LONG, "李"], InputError, "a name of 1,001 characters: at most 1,000 are read"),
        ("Frank", TypeError, "names must be a list of strings, not str"),
        (b"Frank", TypeError, "names must be a list of strings, not bytes"),
        (None, TypeError, "names must be a list of strings, not NoneType"),
        (["Frank", b"Kim"], TypeError, "names must hold strings, but names[1] is b'Kim'"),
    ],
    ids=range(8),
)
def test_invalid_lists_of_names_are_rejected(names, kind, message):
    """The error quotes or describes the first unusable name."""
    with pytest.raises(kind) as error:
        encode_names(names)
    assert str(error.value) == message


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
def test_unprintable_characters_are_escaped(text, shown):
    assert escaped(text) == shown
    assert escaped(shown) == shown


@given(st.lists(any_text.filter(ASCII.fold) | folded_names, min_size=1, max_size=6))
def test_a_character_is_encoded_as_its_index_in_the_alphabet(names):
    assert ASCII.alphabet == Folding().alphabet == "abcdefghijklmnopqrstuvwxyz .,;'"
    assert ACCENTED.alphabet == ASCII.alphabet + ACCENTED.letters
    assert (ACCENTED.plain, ASCII.plain) == (Folding(), ASCII)
    for folding in FOLDINGS:
        texts = [*map(folding.fold, names)]
        for encoded in (encode_names(names, folding), encode_folded(texts, folding)):
            assert encoded.characters.dtype == encoded.lengths.dtype == torch.int64
            ids = [folding.alphabet.index(c) for c in "".join(texts)]
            assert encoded.characters.tolist() == ids
            assert encoded.lengths.tolist() == [*map(len, texts)]
            assert torch.equal(encoded.starts, encoded.lengths.cumsum(0) - encoded.lengths)
        assert torch.equal(encode(names[0], folding), encoded.characters[: len(texts[0])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1), "the version of a folding must be 2 or 3, not 1"),
        (("", True), "the version of a folding must be 2 or 3, not True"),
        (("é", 2), "a folding of version 2 keeps no accented letters"),
        (("éé", 3), "letters that a folding cannot keep: 'éé'"),
        *(((letter, 3), "letters that a folding cannot keep: ") for letter in "aÉ李1\u0301’\ud800"),
        (("e\u0301", 3), "letters that a folding cannot keep: "),
        ((3, 3), "a folding keeps a string of at most 96 letters"),
        (("é" * (MAX_LETTERS + 1), 3), "a folding keeps a string of at most 96 letters"),
    ],
)
def test_invalid_foldings_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Folding(*arguments)


def test_letters_of_returns_frequent_accented_letters():
    """Capitals and combining accents count, too. At most `MAX_LETTERS` letters are returned."""
    names = ["Müller", "MÜLLER", "e\u0301", "É", "Ñü", "李", "o’a-"]
    assert letters_of(names) == "éñü"
    assert letters_of(names, 2) == "éü"
    assert letters_of([]) == ""
    many = [chr(code) for code in range(0xC0, 0x24F)]
    found = letters_of([*many, "éü"])
    assert len(found) == MAX_LETTERS == len(Folding(found).letters)
    assert {"é", "ü"} <= {*found}


@given(st.lists(folded_names, min_size=1, max_size=12), st.data())
def test_pack_matches_pack_sequence(names, data):
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
    if (lengths.diff() <= 0).all():
        assert packed.sorted_indices is packed.unsorted_indices is None
    else:
        assert (lengths[packed.sorted_indices].diff() <= 0).all()
        restored = packed.sorted_indices[packed.unsorted_indices]
        assert torch.equal(restored, torch.arange(len(indices)))


@given(st.lists(folded_names, min_size=1, max_size=30), st.integers(1, 40), st.data())
def test_packing_many_batches_matches_packing_single_batches(names, batch_size, data):
    encoded = encode_names(names)
    indices = torch.tensor(data.draw(st.permutations(range(len(names)))))
    ordered = encoded.by_length(indices, batch_size)
    expected = [encoded.by_length(batch) for batch in indices.split(batch_size)]
    assert torch.equal(ordered, torch.cat(expected))
    assert sorted(ordered.tolist()) == sorted(indices.tolist())
    found = [*encoded.pack_each(ordered, batch_size)]
    for packed, batch in zip(found, expected, strict=True):
        alone = encoded.pack(batch)
        assert packed.sorted_indices is alone.sorted_indices is None
        assert packed.batch_sizes.device.type == "cpu"
        assert torch.equal(packed.data, alone.data)
        assert torch.equal(packed.batch_sizes, alone.batch_sizes)


def test_many_batches_are_packed_in_bounded_memory():
    """With such long names, a single table for all batches would have 60 million entries."""
    names = encode_names(["Kim", "x" * 1000, "Papadopoulos"] * 20_000)
    with bounded(32):
        count = sum(1 for _ in names.pack_each(names.by_length(torch.arange(len(names)), 64), 64))
    assert count == 938


@given(st.lists(folded_names, min_size=1, max_size=30))
def test_names_are_sorted_by_their_first_characters(names):
    for folding, characters in ((ASCII, 6), (ACCENTED, 5)):
        names = [*names, "xś"[: 1 + len(folding.letters)]]
        encoded = encode_names(["'ś", *names], folding)
        order = encoded.by_beginning(torch.arange(len(encoded)))
        ids = encoded.characters.split(encoded.lengths.tolist())
        expected = sorted(range(len(ids)), key=lambda i: ids[i][:characters].tolist())
        assert order.tolist() == expected


def test_packing_rejects_empty_batches_and_invalid_indices():
    encoded = encode_names(["a", "bc"])
    with pytest.raises(ValueError, match=r"^a batch must contain at least one name$"):
        encoded.pack(torch.arange(0))
    assert [*encoded.pack_each(torch.arange(0), 3)] == []
    for pack in (encoded.pack, lambda indices: next(encoded.pack_each(indices, 3))):
        with pytest.raises(IndexError):
            pack(torch.arange(3))
