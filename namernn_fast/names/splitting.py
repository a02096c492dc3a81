"""Splits the data into a training, a validation and a test set.

By default, each string is in only one set, even if it has several languages. The data repeats
names (Arabic has 2,000 rows but 108 names) and has 465 strings in several languages, so a random
split of the rows, as in tutorials, tests a model on training names. Strings are names folded with
`ASCII`, so Müller and Muller are in the same set, whichever folding the model uses.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import NamesData
from .encoding import EncodedNames, encode_folded
from .folding import ASCII, Folding, letters_of
from .text import InputError

METHODS = ("string", "random")

LEAST = 2
"""The number of training names that must contain an accented letter for the folding to keep it."""

_Unit = TypeVar("_Unit")


@dataclass(frozen=True)
class LabelledNames:
    """Folded names with their languages."""

    texts: tuple[str, ...]
    """The names, folded by the split's folding."""
    names: EncodedNames
    """The character ids of `texts`."""
    labels: Tensor
    """int64 (number of names), the index of each name's language; or float32 (number of names,
    languages), the probabilities of the languages"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """A training, a validation and a test set, and how they were drawn."""

    languages: tuple[str, ...]
    train: LabelledNames
    """The set that weights are trained on."""
    validation: LabelledNames
    """The set that decides choices, such as the recipe and the epoch to keep."""
    test: LabelledNames
    """The set that final results are computed on, once."""
    info: dict[str, Any]
    """Plain values that a checkpoint records: the method, seed and fractions, the SHA-256 of the
    sets, and the source, SHA-256 and number of rows of the data."""
    folding: Folding = ASCII
    """The folding of the names in the sets."""
    seen: LabelledNames | None = None
    """The training names from the data, if `train` also contains made-up names; else None."""

    def priors(self) -> Tensor:
        """Returns the frequency of each language in the training set: float64 (languages)."""
        labels = self.train.labels
        one_hot = F.one_hot(labels, len(self.languages)) if labels.ndim == 1 else labels
        counts = one_hot.double().sum(0)
        return counts / counts.sum()

    def log_priors(self) -> Tensor:
        """Returns the logarithm of each language's training frequency: float64 (languages).

        A language without training names counts as having one, because log(0) is infinite.
        """
        return self.priors().clamp(min=1 / len(self.train)).log()


def split(
    data: NamesData,
    *,
    method: str = "string",
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    folding: Folding | None = None,
) -> Split:
    """Splits the names into a training, a validation and a test set.

    The method "string" splits the distinct pairs of a folded name and a language; all pairs with
    the same string go to one set. Strings are drawn separately for each language. A string in
    several languages is drawn with the language that has the fewest strings. If a
    language has at least three strings that occur in no other language, every set contains the
    language. The method "random" draws from all rows, including repeats, so the same name may be in
    several sets: use this method only to compare with results on such splits.

    The order of drawing comes from a hash of the seed and the string (or the index of the row),
    so the order is the same on every machine and with every version of torch.

    The training set contains all spellings of each of its names, and also a copy without
    accents; the other sets contain only the first spelling of each name.

    Args:
        data: the names.
        method: "string" or "random".
        validation, test: the fraction for each set; both must be above 0, and their sum below 1.
        seed: the seed that determines the order of drawing.
        folding: the folding of the names in the sets, which does not affect which names are drawn.
            If None, a folding that keeps the accented letters that occur in at least `LEAST`
            training names.

    Raises:
        InputError: an argument is out of range, or a set would be empty.
    """
    if method not in METHODS:
        raise InputError(f"the method of the split must be one of {METHODS}, not {method!r}")
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise InputError(
            "the shares of the validation and the test part must be above 0 and together below 1, "
            f"not {validation} and {test}"
        )
    draw = _draw_strings if method == "string" else _draw_rows
    parts = dict(
        zip(("train", "validation", "test"), draw(data, validation, test, seed), strict=True)
    )
    for name, units in parts.items():
        if not units:
            raise InputError(f"{data.source}: too few names for a {name} part")
    if folding is None:
        spellings = (spelling for unit in parts["train"] for spelling in unit.spellings)
        folding = Folding(letters_of(spellings, LEAST))
    info = {
        "method": method,
        "seed": seed,
        "validation": validation,
        "test": test,
        "sha256": _digest(parts, data.languages),
        "names": {name: len(units) for name, units in parts.items()},
        "data": {
            "source": data.source,
            "sha256": data.sha256,
            "rows": len(data.rows),
            "is_sample": data.is_sample,
        },
    }
    labelled = {name: _labelled(units, folding, name == "train") for name, units in parts.items()}
    return Split(data.languages, info=info, folding=folding, **labelled)


class _Name(NamedTuple):
    """A name in one language, which is drawn into a set."""

    text: str
    """The name in the folding `ASCII`."""
    label: int
    """The index of the language."""
    spellings: tuple[str, ...]
    """The spellings in the data that fold to `text`."""


def _draw_strings(
    data: NamesData, validation: float, test: float, seed: int
) -> tuple[list[_Name], ...]:
    spellings: defaultdict[str, defaultdict[int, dict[str, None]]]
    spellings = defaultdict(lambda: defaultdict(dict))
    texts = ASCII.fold_usable([name for name, _ in data.rows])
    for text, (name, language) in zip(texts, data.rows, strict=True):
        spellings[text][language][name] = None
    sizes = Counter(language for languages in spellings.values() for language in languages)
    strata: defaultdict[int, list[str]] = defaultdict(list)
    for text, languages in spellings.items():
        strata[min(languages, key=lambda language: (sizes[language], language))].append(text)
    parts: tuple[list[_Name], ...] = ([], [], [])
    for _, drawn in sorted(strata.items()):
        drawn.sort(key=lambda text: _rank(seed, text))
        for part, chosen in zip(parts, _cut(drawn, validation, test), strict=True):
            part += [
                _Name(text, label, tuple(names))
                for text in chosen
                for label, names in sorted(spellings[text].items())
            ]
    return parts


def _draw_rows(
    data: NamesData, validation: float, test: float, seed: int
) -> tuple[list[_Name], ...]:
    texts = ASCII.fold_usable([name for name, _ in data.rows])
    order = sorted(range(len(data.rows)), key=lambda row: _rank(seed, row))
    rows = [_Name(texts[row], data.rows[row][1], (data.rows[row][0],)) for row in order]
    return _cut(rows, validation, test)


def _rank(seed: int, unit: object) -> bytes:
    return hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=16).digest()


def _cut(
    units: list[_Unit], validation: float, test: float
) -> tuple[list[_Unit], list[_Unit], list[_Unit]]:
    """Cuts `units` into a training, a validation and a test set.

    No set is empty if there are at least three units.
    """
    count = len(units)
    least = int(count >= 3)
    tested = max(round(test * count), least)
    validated = max(round(validation * count), least)
    if count:  # the training set gets at least one unit
        tested = min(tested, max(count - 1 - least, 0))
        validated = min(validated, count - 1 - tested)
    return units[tested + validated :], units[tested : tested + validated], units[:tested]


def _digest(parts: dict[str, list[_Name]], languages: Sequence[str]) -> str:
    lines = [
        f"{part}\t{languages[name.label]}\t{name.text}\n"
        for part, names in parts.items()
        for name in names
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _labelled(names: Sequence[_Name], folding: Folding, is_train: bool) -> LabelledNames:
    """Returns the names of one set with their labels.

    The training set gets every spelling, with and without accents; other sets get only the first
    spelling of each name.
    """
    plain = folding.plain
    texts: list[str] = []
    labels: list[int] = []
    for name in names:
        found = dict.fromkeys(map(folding.fold, name.spellings))
        if is_train:
            found |= dict.fromkeys(map(plain.fold, name.spellings))
        used = [*found] if is_train else [*found][:1]
        texts += used
        labels += [name.label] * len(used)
    return LabelledNames(tuple(texts), encode_folded(texts, folding), torch.tensor(labels))
