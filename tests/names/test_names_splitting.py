"""The split: three parts that share no string, drawn alike on every machine."""

from collections import Counter
from itertools import chain

import pytest

from namernn_fast.names import InputError, NamesData, fold, read_names, split
from namernn_fast.names.dataset import embedded_sample

SAMPLE = embedded_sample()
PARTS = ("train", "validation", "test")
# The SHA-256 of the parts of the real data with the seed 0: what published figures are about.
REAL_SHA256 = "2e2e99dbcb93bb11b35818b75b8c6769bf352f4cac08027aab3c448d3c15e67c"


def pairs(part):
    """The (folded name, language) pairs of one part."""
    return list(zip(part.texts, part.labels.tolist(), strict=True))


def all_pairs(parts):
    return [pairs(getattr(parts, name)) for name in PARTS]


def joined(lists):
    return list(chain.from_iterable(lists))


def few(*rows):
    languages = tuple(f"language {i}" for i in range(1 + max(i for _, i in rows)))
    return NamesData("a few names", languages, rows)


def check_disjoint(data, parts):
    """Every distinct pair is in one part, and no string is in two."""
    found = all_pairs(parts)
    assert sorted(joined(found)) == sorted({(fold(name), label) for name, label in data.rows})
    texts = [set(getattr(parts, name).texts) for name in PARTS]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_the_sample_is_split_by_string_and_stratified():
    parts = split(SAMPLE, validation=0.25, test=0.3, seed=3)
    check_disjoint(SAMPLE, parts)
    # The sample has no string under two languages, so the shares of each language are exact.
    counts = [Counter(label for _, label in part) for part in all_pairs(parts)]
    for label in range(len(SAMPLE.languages)):
        train, validation, test = (count[label] for count in counts)
        total = train + validation + test
        assert (validation, test) == (round(0.25 * total), round(0.3 * total))
    assert parts.priors().tolist() == [
        counts[0][label] / len(parts.train) for label in range(len(SAMPLE.languages))
    ]


def test_the_seed_fixes_the_split():
    assert all_pairs(split(SAMPLE, seed=3)) == all_pairs(split(SAMPLE, seed=3))
    assert split(SAMPLE, seed=3).info == split(SAMPLE, seed=3).info
    assert all_pairs(split(SAMPLE, seed=3)) != all_pairs(split(SAMPLE, seed=4))
    assert split(SAMPLE, seed=3).info["sha256"] != split(SAMPLE, seed=4).info["sha256"]


def test_the_real_data(real_folder):
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
        "sha256": REAL_SHA256,
        "data": {
            "source": f"the folder {real_folder}",
            "sha256": data.sha256,
            "rows": 20_074,
            "is_sample": False,
        },
    }


def test_random_rows_leak_as_those_of_tutorials_do(real_folder):
    data = read_names(real_folder)
    parts = split(data, method="random")
    assert [len(getattr(parts, name)) for name in PARTS] == [14_052, 2_007, 4_015]
    assert Counter(joined(all_pairs(parts))) == Counter(
        (fold(name), label) for name, label in data.rows
    )
    seen = set(parts.train.texts)
    assert sum(text in seen for text in parts.test.texts) == 596
    assert sum(text in seen for text in parts.validation.texts) == 312
    assert parts.info["method"] == "random"


def test_repeats_count_once():
    data = few(("Pugh", 0), ("PUGH", 0), ("Price", 0), ("Púgh ", 0), ("Rees", 0), ("Etxe", 1))
    found = all_pairs(split(data))
    assert sorted(joined(found)) == [("etxe", 1), ("price", 0), ("pugh", 0), ("rees", 0)]


def test_three_strings_reach_every_part_and_fewer_are_trained_on_first():
    shares = {"validation": 0.01, "test": 0.01}
    few_and_fewer = few(*((name, 0) for name in ("Pugh", "Price", "Rees")), ("Etxe", 1), ("Agi", 1))
    train, validation, test = all_pairs(split(few_and_fewer, **shares))
    assert sorted(label for _, label in train) == [0, 1, 1]
    assert [label for _, label in validation] == [label for _, label in test] == [0]
    greedy = split(few_and_fewer, validation=0.01, test=0.98)
    assert all(0 in part.labels for part in (greedy.train, greedy.validation, greedy.test))
    assert 1 in greedy.train.labels


def test_a_string_goes_with_its_rarest_language():
    # All five strings of language 1 are also of language 0, which has more.
    shared = [(name, label) for name in ("Ab", "Cd", "Ef", "Gh", "Ij") for label in (0, 1)]
    data = few(*shared, *((f"name {letter}", 0) for letter in "abcdefghij"))
    for seed in range(5):
        parts = split(data, validation=0.2, test=0.4, seed=seed)
        check_disjoint(data, parts)
        counts = [part.labels.tolist().count(1) for part in (parts.validation, parts.test)]
        assert counts == [1, 2]


def test_odd_splits_are_refused():
    for share in (0, 1, -1, float("nan")):
        for option in ("validation", "test"):
            with pytest.raises(InputError, match="must be above 0 and together below 1, not "):
                split(SAMPLE, **{option: share})
    with pytest.raises(InputError, match=r"together below 1, not 0\.5 and 0\.5$"):
        split(SAMPLE, validation=0.5, test=0.5)
    with pytest.raises(InputError, match="the method of the split must be one of"):
        split(SAMPLE, method="rows")
    with pytest.raises(InputError, match=r"^a few names: too few names for a validation part$"):
        split(few(("Pugh", 0), ("Pugh", 1)))
