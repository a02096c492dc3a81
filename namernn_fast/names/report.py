"""Reports on the names data: its languages, its odd rows, and the best possible accuracy."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .dataset import NamesData
from .evaluation import best_hits
from .folding import ASCII, SPELLINGS
from .splitting import LabelledNames, Split, split

# Text of web pages that got into the data by mistake.
_NO_NAMES = frozenset({"to the first page"})
# Punctuation that may end a name: the full stop of "Jr.", or an apostrophe for a soft sign.
_RIGHT_AT_THE_END = frozenset(".'’ʼ`´")
_RIGHT_INSIDE = frozenset(" -.'’‘ʼ`´\u00a0")


def _ends_in_punctuation(name: str) -> bool:
    last = name.strip()[-1:]
    return unicodedata.category(last).startswith("P") and last not in _RIGHT_AT_THE_END


def _has_signs_inside(name: str) -> bool:
    return any(
        unicodedata.category(character)[0] not in "LMN" and character not in _RIGHT_INSIDE
        for character in name.strip()[:-1]
    )


JUNK: MappingProxyType[str, tuple[str, Callable[[str], bool]]] = MappingProxyType(
    {
        "no name": (
            'the text comes from a web page and is not a name: "To The First Page"',
            lambda name: " ".join(name.lower().split()) in _NO_NAMES,
        ),
        "digits": (
            "there is a digit in the name",
            lambda name: any(character.isnumeric() for character in name),
        ),
        "punctuation at the end": (
            "the last character is punctuation, and neither a full stop nor an apostrophe",
            _ends_in_punctuation,
        ),
        "signs inside": (
            "a character before the last is neither a letter, a digit, a blank, a hyphen (-), a "
            "full stop nor an apostrophe",
            _has_signs_inside,
        ),
        "blanks at the ends": (
            "there are blanks before or after the name",
            lambda name: name != name.strip(),
        ),
    }
)
"""The rules for junk rows: a description of each rule, and a function that tests a name."""


@dataclass(frozen=True)
class LanguageFacts:
    """Facts about one language, or about all languages together."""

    language: str
    rows: int
    distinct: int
    """The number of distinct folded names, counted for each language."""
    repeats: int
    """The number of rows that repeat an earlier folded name."""
    shared: int
    """The number of distinct folded names that also occur in other languages."""
    junk: int
    """The number of rows that match a rule of `JUNK`."""
    train: int
    """The number of names in the training set."""
    validation: int
    test: int


@dataclass(frozen=True)
class OddRow:
    """A row that is not a clean name, or whose folding changes more than case and accents."""

    row: int
    """The number of the row in the data, from 1."""
    language: str
    name: str
    folded: str
    spelled: str
    """The characters of the name that `SPELLINGS` replaces."""
    dropped: str
    """The characters of the name that folding drops."""
    junk: tuple[str, ...]
    """The rules of `JUNK` that the row matches."""


@dataclass(frozen=True)
class DataReport:
    """The report that `describe` returns."""

    split: dict[str, Any]
    """As in `Split.info`."""
    languages: tuple[LanguageFacts, ...]
    total: LanguageFacts
    ceiling: dict[str, float]
    """The best accuracy that a function of the folded string can reach: over the "rows", over the
    "distinct pairs" of a folded name and a language, and in the "test part"."""
    leak: dict[str, dict[str, float]]
    """The results of `leak` for "this split", and for a "random split" with the same fractions."""
    odd_rows: tuple[OddRow, ...]
    shared_strings: dict[str, tuple[str, ...]]
    """Maps each folded name that occurs in several languages to these languages."""


def describe(data: NamesData, parts: Split) -> DataReport:
    """Returns a report on `data` and its split; names are folded with `ASCII`."""
    folded = ASCII.fold_usable([name for name, _ in data.rows])
    labels = [label for _, label in data.rows]
    pairs = sorted(set(zip(folded, labels, strict=True)))
    languages_of: defaultdict[str, list[str]] = defaultdict(list)
    for text, label in pairs:
        languages_of[text].append(data.languages[label])
    shared = {text: tuple(found) for text, found in languages_of.items() if len(found) > 1}
    rows = [
        OddRow(
            row=number,
            language=data.languages[label],
            name=name,
            folded=text,
            spelled="".join(
                c for c in unicodedata.normalize("NFD", name.strip()) if c in SPELLINGS
            ),
            dropped=ASCII.dropped(name),
            junk=tuple(rule for rule, (_, finds) in JUNK.items() if finds(name)),
        )
        for number, ((name, label), text) in enumerate(zip(data.rows, folded, strict=True), 1)
    ]

    def facts(title: str, languages: Collection[int]) -> LanguageFacts:
        chosen_rows = [row for row, label in zip(rows, labels, strict=True) if label in languages]
        chosen_texts = [text for text, label in pairs if label in languages]
        return LanguageFacts(
            language=title,
            rows=len(chosen_rows),
            distinct=len(chosen_texts),
            repeats=len(chosen_rows) - len(chosen_texts),
            shared=len(shared.keys() & chosen_texts),
            junk=sum(bool(row.junk) for row in chosen_rows),
            **{
                name: sum(label in languages for label in getattr(parts, name).labels.tolist())
                for name in ("train", "validation", "test")
            },
        )

    shares = {name: parts.info[name] for name in ("validation", "test", "seed")}
    return DataReport(
        split=parts.info,
        languages=tuple(facts(title, [label]) for label, title in enumerate(data.languages)),
        total=facts("all", range(len(data.languages))),
        ceiling={
            "rows": best_hits(folded, labels) / len(labels),
            "distinct pairs": len(languages_of) / len(pairs),
            "test part": best_hits(parts.test.texts, parts.test.labels.tolist()) / len(parts.test),
        },
        leak={
            "this split": leak(parts),
            "random split": leak(split(data, method="random", folding=ASCII, **shares)),
        },
        odd_rows=tuple(row for row in rows if row.spelled or row.dropped or row.junk),
        shared_strings=shared,
    )


def leak(parts: Split) -> dict[str, float]:
    """Returns the fraction of the test set that is also in the training or validation set.

    Returns:
        Maps "pairs" to the fraction of test names that also occur there with the same language, and
        "strings" to the fraction that also occur there with any language.
    """
    others = (parts.train, parts.validation)
    pairs = {pair for part in others for pair in _pairs(part)}
    strings = {text for text, _ in pairs}
    tested = _pairs(parts.test)
    return {
        "pairs": sum(pair in pairs for pair in tested) / len(tested),
        "strings": sum(text in strings for text, _ in tested) / len(tested),
    }


def _pairs(part: LabelledNames) -> list[tuple[str, int]]:
    return list(zip(ASCII.fold_usable(part.texts), part.labels.tolist(), strict=True))
