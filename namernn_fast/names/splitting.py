"""The split of the data into a training, a validation and a test part.

By default no string is in two parts, whatever its languages: the data repeats names (Arabic has
2,000 rows of 108 names) and has 465 strings in several languages, so a random split of its
rows, as tutorials make it, tests a model on names that it has seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import NamesData
from .encoding import EncodedNames, encode_folded
from .text import InputError, fold

METHODS = ("string", "random")


_Unit = TypeVar("_Unit")


@dataclass(frozen=True)
class LabelledNames:
    """Folded names with their languages."""

    texts: tuple[str, ...]
    """The names as `fold` returns them."""
    names: EncodedNames
    """The character ids of `texts`."""
    labels: Tensor
    """int64 (number of names), the index of each name's language; or float32 (number of names,
    languages), the probabilities of the languages"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Three parts of the data, and how they were made."""

    languages: tuple[str, ...]
    train: LabelledNames
    """The part to fit weights to."""
    validation: LabelledNames
    """The part to choose by: which epoch is kept, which recipe is best."""
    test: LabelledNames
    """The part to report figures on, once."""
    info: dict[str, Any]
    """The method, seed and shares, the SHA-256 of the parts, and the source, SHA-256 and number of
    rows of the data: plain values, which a checkpoint records."""

    def priors(self) -> Tensor:
        """Returns the share of each language in the training part: float64 (languages)."""
        labels = self.train.labels
        one_hot = F.one_hot(labels, len(self.languages)) if labels.ndim == 1 else labels
        counts = one_hot.double().sum(0)
        return counts / counts.sum()

    def log_priors(self) -> Tensor:
        """Returns the logarithms of the shares: float64 (languages).

        A language without training names counts as if it had one: log(0) would be infinite.
        """
        return self.priors().clamp(min=1 / len(self.train)).log()


def split(
    data: NamesData,
    *,
    method: str = "string",
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> Split:
    """Splits the names into a training, a validation and a test part.

    The method "string" splits the distinct pairs of a folded name and a language; all pairs with
    the same string go to one part. Strings are drawn within each language, so every language with
    at least three strings that no other has is in every part; a string in several languages is
    drawn with the one that has the fewest strings. The method "random" draws from all rows, repeats
    included, so the same name may be in several parts: use it only to compare with such splits.

    The order of drawing comes from a hash of the seed and the string (or the number of the row),
    so it is the same on every machine and with every version of torch.

    Args:
        data: the names.
        method: "string" or "random".
        validation, test: the share of each part, above 0, together below 1.
        seed: of the drawing.

    Raises:
        InputError: an argument has another value, or a part would be empty.
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
    for name, rows in parts.items():
        if not rows:
            raise InputError(f"{data.source}: too few names for a {name} part")
    info = {
        "method": method,
        "seed": seed,
        "validation": validation,
        "test": test,
        "sha256": _digest(parts, data.languages),
        "names": {name: len(rows) for name, rows in parts.items()},
        "data": {
            "source": data.source,
            "sha256": data.sha256,
            "rows": len(data.rows),
            "is_sample": data.is_sample,
        },
    }
    labelled = {name: _labelled(rows) for name, rows in parts.items()}
    return Split(data.languages, info=info, **labelled)


_Rows = list[tuple[str, int]]  # (folded name, index of the language)


def _draw_strings(
    data: NamesData, validation: float, test: float, seed: int
) -> tuple[_Rows, _Rows, _Rows]:
    languages_of: defaultdict[str, set[int]] = defaultdict(set)
    for name, language in data.rows:
        languages_of[fold(name)].add(language)
    sizes = Counter(language for languages in languages_of.values() for language in languages)
    strata: defaultdict[int, list[str]] = defaultdict(list)
    for text, languages in languages_of.items():
        strata[min(languages, key=lambda language: (sizes[language], language))].append(text)
    parts: tuple[_Rows, _Rows, _Rows] = ([], [], [])
    for _, texts in sorted(strata.items()):
        texts.sort(key=lambda text: _rank(seed, text))
        for part, chosen in zip(parts, _cut(texts, validation, test), strict=True):
            part += [(text, label) for text in chosen for label in sorted(languages_of[text])]
    return parts


def _draw_rows(
    data: NamesData, validation: float, test: float, seed: int
) -> tuple[_Rows, _Rows, _Rows]:
    order = sorted(range(len(data.rows)), key=lambda row: _rank(seed, row))
    rows = [(fold(data.rows[row][0]), data.rows[row][1]) for row in order]
    return _cut(rows, validation, test)


def _rank(seed: int, unit: object) -> bytes:
    return hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=16).digest()


def _cut(
    units: list[_Unit], validation: float, test: float
) -> tuple[list[_Unit], list[_Unit], list[_Unit]]:
    """Cuts units into train, validation and test, none of them empty where there are three."""
    count = len(units)
    least = int(count >= 3)
    tested = max(round(test * count), least)
    validated = max(round(validation * count), least)
    if count:  # the training part comes first where there are too few
        tested = min(tested, max(count - 1 - least, 0))
        validated = min(validated, count - 1 - tested)
    return units[tested + validated :], units[tested : tested + validated], units[:tested]


def _digest(parts: dict[str, _Rows], languages: Sequence[str]) -> str:
    lines = [
        f"{name}\t{languages[label]}\t{text}\n"
        for name, rows in parts.items()
        for text, label in rows
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _labelled(rows: _Rows) -> LabelledNames:
    texts, labels = zip(*rows, strict=True)
    return LabelledNames(texts, encode_folded(texts), torch.tensor(labels))
