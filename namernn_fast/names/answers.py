"""Answers for rows of names: one for each row, unusable ones included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .encoding import encode_folded
from .prediction import Predictor, probabilities
from .tables import Row
from .text import dropped, escaped, fold_usable, why_unusable

UNKNOWN = "unknown"
"""What is written for a name for which no language is probable enough."""

DIGITS = 6
"""Decimals of a probability; float32 has no more."""

_SHOWN_CHARACTERS = 100
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Answer(NamedTuple):
    """What is told about a row."""

    name: str
    """As it was read; of a row with an error the beginning, with escapes for bad bytes."""
    languages: Sequence[str] = ()
    """The most probable ones, in the order of their probability, as far as they are told."""
    probabilities: Sequence[float] = ()
    """Of the languages, with `DIGITS` decimals."""
    dropped: str = ""
    """The characters of the name that were not read, as of `text.dropped`."""
    error: str | None = None
    """Why no language can be told, or None."""


def answer_rows(
    predictor: Predictor, rows: Sequence[Row], top: int = 3, min_probability: float = 0.0
) -> list[Answer]:
    """Returns an answer for each row, in their order.

    Names that are folded to one string are given to the model once.

    Args:
        predictor: the model.
        rows: few enough for the answers to be held in memory.
        top: how many languages to tell at most.
        min_probability: languages of a lower probability are not told.

    Raises:
        InputError: the model gives no finite probabilities.
    """
    texts = _folded(rows)
    places = {text: place for place, text in enumerate(dict.fromkeys(filter(None, texts)))}
    top = min(top, len(predictor.languages))
    # Flat lists, because a million small ones keep Python's garbage collector busy.
    languages, values, counts = _tell(predictor, list(places), top, min_probability)
    answers = []
    for row, text in zip(rows, texts, strict=True):
        if text:
            place = places[text]
            told = slice(place * top, place * top + counts[place])
            lost = _dropped(row.name, text)
            answers.append(Answer(row.name, languages[told], values[told], lost))
        else:
            answers.append(_failed(row))
    return answers


def _folded(rows: Sequence[Row]) -> list[str]:
    """Returns the folded names, an empty one for a row that holds no usable one."""
    names = [row.name if row.error is None else "" for row in rows]
    for place, name in enumerate(names):
        if not name.isascii() and _LONE_SURROGATE.search(name):
            names[place] = ""
    return fold_usable(names)


def _dropped(name: str, text: str) -> str:
    # Of ASCII no character is folded to several, so the lengths tell.
    if name.isascii() and len(text) == len(name.strip()):
        return ""
    return dropped(name)


def _tell(
    predictor: Predictor, texts: list[str], top: int, min_probability: float
) -> tuple[list[str], list[float], list[int]]:
    """Returns the most probable languages of `texts`, which are folded names.

    Returns:
        `top` languages and probabilities for each of `texts`, one after another, and how many of
        them are probable enough.
    """
    if not texts:
        return [], [], []
    found = probabilities(predictor.checkpoint.model, encode_folded(texts))
    values, places = found.topk(top)
    rounded = values.double().mul_(10**DIGITS).round_().div_(10**DIGITS)
    languages = list(map(predictor.languages.__getitem__, places.flatten().tolist()))
    counts = (values >= min_probability).sum(1)
    return languages, rounded.flatten().tolist(), counts.tolist()


def _failed(row: Row) -> Answer:
    name = row.name
    if row.error is not None:
        error = row.error
    elif _LONE_SURROGATE.search(name):
        error = "not valid UTF-8"
    elif not name or name.isspace():
        error = "the name is empty"
    else:
        error = why_unusable(name) or ""
    shown = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"
    # Strict readers of JSON refuse a lone surrogate even where it is escaped as such.
    return Answer(escaped(shown) if _LONE_SURROGATE.search(shown) else shown, error=error)
