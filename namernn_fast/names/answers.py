"""Answers for rows of names: one for each row, unusable ones included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .prediction import Predictor, probabilities
from .tables import Row
from .text import MAX_NAME_LENGTH, dropped, encode_folded, escaped, fold, why_unusable

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
    languages: tuple[tuple[str, float], ...] = ()
    """(language, probability), the most probable first; none if none is probable enough."""
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
    texts = [_folded(row) for row in rows]
    distinct = list(dict.fromkeys(filter(None, texts)))
    told = dict(zip(distinct, _tell(predictor, distinct, top, min_probability), strict=True))
    return [
        Answer(row.name, told[text], _dropped(row.name, text)) if text else _failed(row)
        for row, text in zip(rows, texts, strict=True)
    ]


def _folded(row: Row) -> str:
    """Returns the folded name, empty for a row that holds no usable one."""
    name = row.name
    if row.error is not None or len(name) > MAX_NAME_LENGTH:
        return ""
    if not name.isascii() and _LONE_SURROGATE.search(name):
        return ""
    return fold(name)


def _dropped(name: str, text: str) -> str:
    # Of ASCII no character is folded to several, so the lengths tell.
    if name.isascii() and len(text) == len(name.strip()):
        return ""
    return dropped(name)


def _tell(
    predictor: Predictor, texts: list[str], top: int, min_probability: float
) -> list[tuple[tuple[str, float], ...]]:
    """Returns the (language, probability) pairs for each of `texts`, names that are folded."""
    if not texts:
        return []
    languages = predictor.languages
    found = probabilities(predictor.checkpoint.model, encode_folded(texts))
    values, places = found.topk(min(top, len(languages)))
    rounded = values.double().mul_(10**DIGITS).round_().div_(10**DIGITS)
    answers = [
        tuple(zip(map(languages.__getitem__, row_places), row_values, strict=True))
        for row_places, row_values in zip(places.tolist(), rounded.tolist(), strict=True)
    ]
    if min_probability > 0:
        counts = (values >= min_probability).sum(1).tolist()
        answers = [answer[:count] for answer, count in zip(answers, counts, strict=True)]
    return answers


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
