"""Answers for rows of names: one for each row, unusable ones included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .encoding import encode_folded
from .prediction import Predictor, probabilities
from .tables import Rows
from .text import dropped, escaped, fold_usable, why_unusable

UNKNOWN = "unknown"
"""What is written for a name for which no language is probable enough."""

DIGITS = 6
"""Decimals of a probability; float32 has no more."""

_SHOWN_CHARACTERS = 100
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Answers:
    """Answers for rows, in columns: a million small objects would cost more than the model."""

    rows: Rows
    """The rows; names with an error are cut, and bad bytes in them escaped."""
    top: int
    """The number of languages of each distinct name."""
    languages: list[str]
    """The most probable languages of all distinct names, `top` of each, most probable first."""
    probabilities: list[float]
    """Of the languages, with `DIGITS` decimals."""
    counts: list[int]
    """For each distinct name, how many of its languages are probable enough."""
    places: list[int]
    """For each row the index of its distinct name, or -1 if it has an error."""
    dropped: dict[int, str]
    """By row, the characters of the name that were not read, as in `text.dropped`; if any."""

    @property
    def errors(self) -> dict[int, str]:
        """By row, why no language can be predicted."""
        return self.rows.errors

    def __len__(self) -> int:
        return len(self.places)

    def of_row(self, row: int) -> list[tuple[str, float]]:
        """Returns the languages of a row that are probable enough, with their probabilities."""
        place = self.places[row]
        if place < 0:
            return []
        begin, end = place * self.top, place * self.top + self.counts[place]
        return [*zip(self.languages[begin:end], self.probabilities[begin:end], strict=True)]


def answer_rows(
    predictor: Predictor, rows: Rows, top: int = 3, min_probability: float = 0.0
) -> Answers:
    """Returns an answer for each row, in their order.

    Names that are folded to one string are given to the model once.

    Args:
        predictor: the model.
        rows: few enough for the answers to be held in memory. Errors of unusable names are added.
        top: how many languages to predict at most.
        min_probability: languages below this probability are omitted.

    Raises:
        InputError: the model gives no finite probabilities.
    """
    texts = _folded(rows)
    distinct = dict.fromkeys(texts)
    has_errors = distinct.pop("", 0) is None
    number = {text: place for place, text in enumerate(distinct)}
    number[""] = -1
    top = min(top, len(predictor.languages))
    found = _predict(predictor, [*distinct], top, min_probability)
    lost = _dropped(rows.names, texts)
    if has_errors:
        _report_errors(rows, texts)
    return Answers(rows, top, *found, [*map(number.__getitem__, texts)], lost)


def _folded(rows: Rows) -> list[str]:
    """Returns the folded names, an empty one for a row that holds no usable one."""
    names = rows.names
    if rows.errors:
        names = ["" if place in rows.errors else name for place, name in enumerate(names)]
    if not "".join(names).isascii():
        names = ["" if _has_lone_surrogate(name) else name for name in names]
    return fold_usable(names)


def _has_lone_surrogate(text: str) -> bool:
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


def _dropped(names: Sequence[str], texts: Sequence[str]) -> dict[int, str]:
    """Returns by row what folding dropped from a name that it made a text of."""
    found = {}
    for place, (name, text) in enumerate(zip(names, texts, strict=True)):
        # No character of ASCII is folded to several, so equal lengths mean that none was dropped.
        if len(name) == len(text) and name.isascii():
            continue
        if text and (lost := dropped(name)):
            found[place] = lost
    return found


def _predict(
    predictor: Predictor, texts: list[str], top: int, min_probability: float
) -> tuple[list[str], list[float], list[int]]:
    """Returns languages, probabilities and counts, as in `Answers`, of folded names."""
    if not texts:
        return [], [], []
    found = probabilities(predictor.checkpoint.model, encode_folded(texts))
    values, places = found.topk(top)
    rounded = values.double().mul_(10**DIGITS).round_().div_(10**DIGITS)
    languages = list(map(predictor.languages.__getitem__, places.flatten().tolist()))
    counts = (values >= min_probability).sum(1)
    return languages, rounded.flatten().tolist(), counts.tolist()


def _report_errors(rows: Rows, texts: Sequence[str]) -> None:
    """Adds the errors of unusable names, and makes names with an error fit to be shown."""
    for place, text in enumerate(texts):
        if text:
            continue
        name = rows.names[place]
        if place not in rows.errors:
            rows.errors[place] = _why(name)
        shown = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"
        # Strict readers of JSON refuse a lone surrogate even where it is escaped as such.
        rows.names[place] = escaped(shown) if _LONE_SURROGATE.search(shown) else shown


def _why(name: str) -> str:
    """Returns why a name is unusable."""
    if _LONE_SURROGATE.search(name):
        return "not valid in the encoding of the input"
    if not name or name.isspace():
        return "the name is empty"
    return why_unusable(name) or ""
