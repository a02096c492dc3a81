"""Folding, encoding and packing of names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from namernn_fast.names import ALPHABET, InputError, encode, encode_names, fold
from namernn_fast.names.dataset import read_names

folded_names = st.text(ALPHABET, min_size=1, max_size=20).filter(str.strip).map(str.strip)
quick = settings(deadline=None, database=None, max_examples=100)


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
