"""What is in the names data: its rows and what is odd about them, what folding does, its limits."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from .dataset import NamesData
from .evaluation import best_hits
from .splitting import LabelledNames, Split, split
from .text import SPELLINGS, dropped, fold

POLICY = (
    "Rows that are no clean names are kept as they are, so that figures stay comparable with those "
    "that others publish on the same files; this report counts them and names them."
)

# Texts that web pages left among the names.
_NO_NAMES = frozenset({"to the first page"})
# Punctuation at the end of a name that is part of it: "Jr.", and soft signs as apostrophes.
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
            'the text is one of a web page and no name: "To The First Page"',
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
            "before the last character is one that is neither a letter, a digit, a blank, a hyphen "
            "(-), a full stop nor an apostrophe",
            _has_signs_inside,
        ),
        "blanks at the ends": (
            "there are blanks before or behind the name",
            lambda name: name != name.strip(),
        ),
    }
)
"""The rules for junk rows: what each one finds, in words and as a function of the name."""


@dataclass(frozen=True)
class LanguageFacts:
    """The facts of one language, or of all together."""

    language: str
    rows: int
    distinct: int
    """Distinct folded names."""
    repeats: int
    """Rows beyond the first of each folded name."""
    shared: int
    """Distinct folded names that other languages have too."""
    spelled: int
    """Rows that the table of spellings changes."""
    dropped: int
    """Rows with characters that folding drops."""
    junk: int
    """Rows that a rule of `JUNK` finds."""
    train: int
    """Names in the training part."""
    validation: int
    test: int


@dataclass(frozen=True)
class DataReport:
    """All that `describe` finds."""

    data: dict[str, Any]
    """source, sha256, rows, is_sample, languages"""
    split: dict[str, Any]
    """The method, seed, shares and SHA-256 of the split, and the sizes of its parts."""
    languages: tuple[LanguageFacts, ...]
    total: LanguageFacts
    distinct: dict[str, int]
    """Distinct strings and distinct pairs of a string and a language, as written and folded; of
    the strings, those under several languages."""
    folding: dict[str, int]
    """Rows that folding changes in more than case and blanks at the ends, and by what."""
    ceiling: dict[str, float]
    """The best accuracy that a function of the string can reach: over rows and over distinct pairs
    of a string and a language, the strings as written and folded; and in each part of the split."""
    leak: dict[str, dict[str, float]]
    """The share of the test part that is elsewhere in the data too, in the split and in a random
    split of rows with the same shares: "pairs", with the same language; "strings", with any."""
    lengths: dict[str, float]
    """The mean and the longest length, as written and folded."""
    dropped_characters: dict[str, int]
    """How often folding drops each character."""
    dropped_rows: tuple[dict[str, str], ...]
    spelled_rows: tuple[dict[str, str], ...]
    junk_rules: dict[str, str]
    junk_policy: str
    junk_rows: dict[str, tuple[dict[str, Any], ...]]
    """For each rule of `JUNK` the rows that it finds, with their numbers in the data from 1."""
    shared_strings: dict[str, tuple[str, ...]]
    """The folded names that several languages have, with the languages."""

    def values(self) -> dict[str, Any]:
        """Returns the report as plain values, for a file."""
        return asdict(self)


def describe(data: NamesData, parts: Split) -> DataReport:
    """Counts what is in the data.

    Args:
        data: the names.
        parts: their split.
    """
    rows = _Rows(data)
    shares = {name: parts.info[name] for name in ("validation", "test", "seed")}
    sizes = {name: len(part) for name, part in _parts(parts).items()}
    return DataReport(
        data={
            "source": data.source,
            "sha256": data.sha256,
            "rows": len(data.rows),
            "languages": len(data.languages),
            "is_sample": data.is_sample,
        },
        split={name: value for name, value in parts.info.items() if name != "data"}
        | {"names": sizes},
        languages=tuple(
            rows.facts(language, [place], parts) for place, language in enumerate(data.languages)
        ),
        total=rows.facts("all", range(len(data.languages)), parts),
        distinct=rows.distinct(),
        folding=rows.folding(),
        ceiling=rows.ceilings()
        | {
            f"{name} part": _ceiling(part.texts, part.labels.tolist())
            for name, part in _parts(parts).items()
        },
        leak={
            "this split": leak(parts),
            "random split": leak(split(data, method="random", **shares)),
        },
        lengths=rows.lengths(),
        dropped_characters=dict(
            Counter(character for lost in rows.lost for character in lost).most_common()
        ),
        dropped_rows=rows.listed(rows.lost, "dropped"),
        spelled_rows=rows.listed(rows.spelled, "spelled"),
        junk_rules={rule: words for rule, (words, _) in JUNK.items()},
        junk_policy=POLICY,
        junk_rows=rows.junk_rows(),
        shared_strings={
            text: tuple(data.languages[language] for language in sorted(languages))
            for text, languages in sorted(rows.languages_of.items())
            if len(languages) > 1
        },
    )


def leak(parts: Split) -> dict[str, float]:
    """Returns the share of the test part that is in the training or the validation part too.

    Returns:
        "pairs", of names with the same language; "strings", of names with any language.
    """
    others = (parts.train, parts.validation)
    pairs = {pair for part in others for pair in _pairs(part)}
    strings = {text for text, _ in pairs}
    tested = _pairs(parts.test)
    return {
        "pairs": sum(pair in pairs for pair in tested) / len(tested),
        "strings": sum(text in strings for text, _ in tested) / len(tested),
    }


class _Rows:
    """The rows of the data with what folding does to them."""

    def __init__(self, data: NamesData) -> None:
        self.data = data
        self.names = [name for name, _ in data.rows]
        self.labels = [language for _, language in data.rows]
        self.folded = [fold(name) for name in self.names]
        self.lost = [dropped(name) for name in self.names]
        self.spelled = [
            "".join(c for c in _decomposed(name) if c in SPELLINGS) for name in self.names
        ]
        self.junk = {
            rule: [finds(name) for name in self.names] for rule, (_, finds) in JUNK.items()
        }
        self.languages_of: defaultdict[str, set[int]] = defaultdict(set)
        for text, language in zip(self.folded, self.labels, strict=True):
            self.languages_of[text].add(language)

    def facts(self, title: str, languages: Sequence[int], parts: Split) -> LanguageFacts:
        places = [place for place, label in enumerate(self.labels) if label in languages]
        pairs = {(self.folded[place], self.labels[place]) for place in places}
        strings = {text for text, _ in pairs}
        return LanguageFacts(
            language=title,
            rows=len(places),
            distinct=len(pairs),
            repeats=len(places) - len(pairs),
            shared=sum(len(self.languages_of[text]) > 1 for text in strings),
            spelled=sum(bool(self.spelled[place]) for place in places),
            dropped=sum(bool(self.lost[place]) for place in places),
            junk=sum(any(found[place] for found in self.junk.values()) for place in places),
            **{
                name: sum(label in languages for label in part.labels.tolist())
                for name, part in _parts(parts).items()
            },
        )

    def distinct(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for words, texts in (("as written", self.names), ("folded", self.folded)):
            pairs = set(zip(texts, self.labels, strict=True))
            times = Counter(text for text, _ in pairs)
            counts |= {
                f"strings {words}": len(times),
                f"pairs {words}": len(pairs),
                f"strings under several languages {words}": sum(n > 1 for n in times.values()),
            }
        return counts

    def folding(self) -> dict[str, int]:
        texts = list(zip(self.names, self.folded, strict=True))
        return {
            "rows changed": sum(text != name.strip().lower() for name, text in texts),
            "rows changed by the spellings": sum(map(bool, self.spelled)),
            "rows with dropped characters": sum(map(bool, self.lost)),
        }

    def ceilings(self) -> dict[str, float]:
        ceilings: dict[str, float] = {}
        for words, texts in (("as written", self.names), ("folded", self.folded)):
            ceilings[f"rows {words}"] = _ceiling(texts, self.labels)
            strings, labels = zip(*set(zip(texts, self.labels, strict=True)), strict=True)
            ceilings[f"pairs {words}"] = _ceiling(strings, labels)
        return ceilings

    def lengths(self) -> dict[str, float]:
        lengths: dict[str, float] = {}
        for words, texts in (("as written", self.names), ("folded", self.folded)):
            lengths[f"mean {words}"] = sum(map(len, texts)) / len(texts)
            lengths[f"longest {words}"] = max(map(len, texts))
        return lengths

    def listed(self, values: Sequence[str], title: str) -> tuple[dict[str, str], ...]:
        """Returns the rows for which there is a value."""
        return tuple(
            {
                "language": self.data.languages[self.labels[place]],
                "name": self.names[place],
                "folded": self.folded[place],
                title: value,
            }
            for place, value in enumerate(values)
            if value
        )

    def junk_rows(self) -> dict[str, tuple[dict[str, Any], ...]]:
        return {
            rule: tuple(
                {
                    "row": place + 1,
                    "language": self.data.languages[self.labels[place]],
                    "name": self.names[place],
                }
                for place, is_junk in enumerate(found)
                if is_junk
            )
            for rule, found in self.junk.items()
        }


def _ceiling(texts: Sequence[str], labels: Sequence[int]) -> float:
    return best_hits(texts, labels) / len(texts)


def _decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name.strip())


def _parts(parts: Split) -> dict[str, LabelledNames]:
    return {"train": parts.train, "validation": parts.validation, "test": parts.test}


def _pairs(part: LabelledNames) -> list[tuple[str, int]]:
    return list(zip(part.texts, part.labels.tolist(), strict=True))
