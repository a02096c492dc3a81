"""Tests that a split has three disjoint sets, which are the same on every machine."""

import functools
import math
from collections import Counter
from itertools import chain

import pytest
import torch

from namernn_fast import names
from namernn_fast.names import ASCII, Folding, InputError, NamesData, read_names
from namernn_fast.names.dataset import embedded_sample

SAMPLE = embedded_sample()
split = functools.partial(names.split, folding=ASCII)
PARTS = ("train", "validation", "test")


def all_pairs(parts):
    """Returns the (folded name, label) pairs of each set."""
    return [
        list(zip(part.texts, part.labels.tolist(), strict=True))
        for part in (getattr(parts, name) for name in PARTS)
    ]


def few(*rows):
    languages = tuple(f"language {i}" for i in range(1 + max(i for _, i in rows)))
    return NamesData("a few names", languages, rows)


def check_disjoint(data, parts):
    """Checks that every distinct pair is in exactly one set, and no name is in two sets."""
    found = chain.from_iterable(all_pairs(parts))
    assert sorted(found) == sorted({(ASCII.fold(name), label) for name, label in data.rows})
    texts = [set(getattr(parts, name).texts) for name in PARTS]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_the_split_of_the_sample_is_disjoint_and_stratified():
    parts = split(SAMPLE, validation=0.25, test=0.3, seed=3)
    check_disjoint(SAMPLE, parts)
    # No name of the sample occurs in two languages, so the fractions of each language are exact.
    counts = [Counter(label for _, label in part) for part in all_pairs(parts)]
    for label in range(len(SAMPLE.languages)):
        train, validation, test = (count[label] for count in counts)
        total = train + validation + test
        assert (validation, test) == (round(0.25 * total), round(0.3 * total))
    assert parts.priors().tolist() == [
        counts[0][label] / len(parts.train) for label in range(len(SAMPLE.languages))
    ]


def test_the_split_of_the_real_data_does_not_change(real_folder):
    data = read_names(real_folder)
    parts = split(data)
    check_disjoint(data, parts)
    for name in PARTS:
        assert set(getattr(parts, name).labels.tolist()) == set(range(18))
    assert [len(getattr(parts, name)) for name in PARTS] == [12_557, 1_811, 3_619]
    assert parts.info == {
        "method": "string",
        "seed": 0,
        "validation": 0.1,
        "test": 0.2,
        # Published results use this split, so it must not change.
        "sha256": "2e2e99dbcb93bb11b35818b75b8c6769bf352f4cac08027aab3c448d3c15e67c",
        "names": {"train": 12_557, "validation": 1_811, "test": 3_619},
        "data": {
            "source": f"the folder {real_folder}",
            "sha256": data.sha256,
            "rows": 20_074,
            "is_sample": False,
        },
    }


def test_a_random_split_distributes_all_rows(real_folder):
    data = read_names(real_folder)
    parts = split(data, method="random")
    assert [len(getattr(parts, name)) for name in PARTS] == [14_052, 2_007, 4_015]
    rows = Counter((ASCII.fold(name), label) for name, label in data.rows)
    assert Counter(chain.from_iterable(all_pairs(parts))) == rows
    assert parts.info["method"] == "random"


def test_the_split_does_not_depend_on_the_folding(real_folder):
    data = read_names(real_folder)
    drawn, parts = split(data), names.split(data)
    assert parts.info == drawn.info
    assert parts.folding == Folding("ßàáãäèéíñòóöúüż")
    # Accented letters that occur in only one training name, such as ê in Lévêque, lose the accent.
    assert {"müller", "muller", "léveque", "leveque"} <= {*parts.train.texts}
    for name in PARTS:
        part, of_ascii = getattr(parts, name), getattr(drawn, name)
        # The foldings treat hyphens differently, so names are compared without accents and blanks.
        accented, plain = (
            {text.replace(" ", "") for text in parts.folding.plain.fold_usable(texts)}
            for texts in (part.texts, of_ascii.texts)
        )
        assert accented == plain
        if name != "train":
            assert torch.equal(part.labels, of_ascii.labels)
            assert sum(not text.isascii() for text in part.texts) in (12, 27)
        assert part.names.characters.tolist() == [
            parts.folding.alphabet.index(c) for c in "".join(part.texts)
        ]


def test_all_spellings_of_a_training_name_are_in_the_training_set():
    data = few(
        *((name, 0) for name in ("Gäbler-Öz", "GABLER-ÖZ", "Gablerbz", "Öger", "Åger", "Gablär")),
        ("Tan", 1),
        ("Tän", 1),
    )
    found = {}
    for seed in range(20):
        parts = names.split(data, validation=0.2, test=0.2, seed=seed, folding=Folding("äö"))
        for name in ("validation", "test"):
            found |= dict.fromkeys(getattr(parts, name).texts, name)
        train = {*parts.train.texts}
        for spelled in ({"gäbler öz", "gabler öz", "gabler oz"}, {"tan", "tän"}, {"öger", "oger"}):
            assert train >= spelled or train.isdisjoint(spelled)
    # The validation and test sets contain only the first spelling of each name.
    assert "gäbler öz" in found
    assert {"gabler öz", "gabler oz", "tän", "oger"}.isdisjoint(found)


def test_three_distinct_names_are_enough_for_three_sets():
    """Repeated names count once. A language with fewer names fills the training set first."""
    names = ("Pugh", "PUGH", "Price", "Púgh ", "Rees")
    data = few(*((name, 0) for name in names), ("Etxe", 1), ("Agi", 1))
    train, validation, test = all_pairs(split(data, validation=0.01, test=0.01))
    assert sorted(label for _, label in train) == [0, 1, 1]
    assert [label for _, label in validation] == [label for _, label in test] == [0]
    greedy = split(data, validation=0.01, test=0.98)
    check_disjoint(data, greedy)
    assert all(0 in part.labels for part in (greedy.train, greedy.validation, greedy.test))
    assert 1 in greedy.train.labels


def test_a_shared_string_is_drawn_with_its_rarest_language():
    # All five names of language 1 are also in language 0, which has more names.
    shared = [(name, label) for name in ("Ab", "Cd", "Ef", "Gh", "Ij") for label in (0, 1)]
    data = few(*shared, *((f"name {letter}", 0) for letter in "abcdefghij"))
    for seed in range(5):
        parts = split(data, validation=0.2, test=0.4, seed=seed)
        check_disjoint(data, parts)
        counts = [part.labels.tolist().count(1) for part in (parts.validation, parts.test)]
        assert counts == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"validation": share}, "must be above 0") for share in (0, 1, -1, math.nan)),
        *(({"test": share}, "must be above 0") for share in (0, 1, -1, math.nan)),
        ({"validation": 0.5, "test": 0.5}, r"together below 1, not 0\.5 and 0\.5$"),
        ({"method": "rows"}, "the method of the split must be one of"),
        ({"data": few(("Pugh", 0), ("Pugh", 1))}, "^a few names: too few names for a validation"),
    ],
    ids=str,
)
def test_invalid_split_options_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        split(**{"data": SAMPLE, **options})
