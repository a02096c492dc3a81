"""Predicts the languages of names in rows. A row with an unusable name gets an answer too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import encode_folded
from .folding import Folding, why_unusable
from .prediction import Predictor, probabilities
from .tables import Rows
from .text import escaped

UNKNOWN = "unknown"
"""The text written for a name if no language reaches the minimum probability."""

MILLION = 1_000_000
"""Probabilities are rounded to millionths, which is about the precision of float32."""

_SHOWN_CHARACTERS = 100
_NOT_TEXT = "not valid in the encoding of the input; --encoding names another"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Answers:
    """The answers for all rows, stored as columns, because creating one object per row is slow."""

    rows: Rows
    """The rows and their errors. In a row with an error, a long name is shortened and invalid bytes
    are escaped."""
    languages: tuple[str, ...]
    """The languages of the model."""
    best: Tensor
    """int64 (rows, top), the indices of the most probable languages, the most probable first. An
    entry equal to the number of languages means that no further language is probable enough, or
    that the row has an error."""
    millionths: Tensor
    """int64 (rows, top), the probabilities of the languages in `best`, in millionths."""
    unusual: Tensor
    """bool (rows), true if the name is unusual; false if the row has an error."""
    dropped: dict[int, str]
    """Maps a row to the characters of its name that were not read (see `Folding.dropped`). Rows
    without dropped characters are absent."""

    def __len__(self) -> int:
        return len(self.rows.names)

    def of_row(self, row: int) -> list[tuple[str, float]]:
        """Returns (language, probability) for each sufficiently probable language of a row."""
        pairs = zip(self.best[row].tolist(), self.millionths[row].tolist(), strict=True)
        return [
            (self.languages[place], value / MILLION)
            for place, value in pairs
            if place < len(self.languages)
        ]


def answer_rows(
    predictor: Predictor, rows: Rows, top: int = 3, min_probability: float = 0.0
) -> Answers:
    """Returns an answer for each row, in the order of the rows.

    The model runs once per distinct folded name.

    Args:
        predictor: the model.
        rows: the names. All names and answers are held in memory. Each unusable name adds an entry
            to `rows.errors`.
        top: the maximum number of languages per name.
        min_probability: languages below this probability are omitted.

    Raises:
        InputError: a probability is not finite.
    """
    texts = _folded(rows, predictor.folding)
    distinct = dict.fromkeys(texts)
    has_errors = distinct.pop("", 0) is None
    number = {text: place for place, text in enumerate(distinct)}
    number[""] = len(distinct)
    top = min(top, len(predictor.languages))
    best, millionths, unusual = _predict(predictor, [*distinct], top, min_probability)
    places = torch.tensor([*map(number.__getitem__, texts)], dtype=torch.int64)
    dropped = _dropped(rows.names, texts, predictor.folding)
    if has_errors:
        _report_errors(rows, texts)
    return Answers(
        rows=rows,
        languages=predictor.languages,
        best=best[places],
        millionths=millionths[places],
        unusual=unusual[places],
        dropped=dropped,
    )


def _folded(rows: Rows, folding: Folding) -> list[str]:
    """Returns the folded names, with an empty string for each row without a usable name."""
    names = rows.names
    if rows.errors:
        names = ["" if place in rows.errors else name for place, name in enumerate(names)]
    if not "".join(names).isascii():
        names = [
            name if name.isascii() or not _LONE_SURROGATE.search(name) else "" for name in names
        ]
    return folding.fold_usable(names)


def _dropped(names: Sequence[str], texts: Sequence[str], folding: Folding) -> dict[int, str]:
    """Returns `Answers.dropped`: the characters that folding dropped, by row index."""
    found = {}
    for place, (name, text) in enumerate(zip(names, texts, strict=True)):
        # An ASCII character never folds to several characters, so equal lengths mean that no
        # character was dropped.
        if len(name) == len(text) and name.isascii():
            continue
        if text and (lost := folding.dropped(name)):
            found[place] = lost
    return found


def _predict(
    predictor: Predictor, texts: list[str], top: int, min_probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `best`, `millionths` and `unusual` (see `Answers`) for folded names.

    Each tensor has one entry per name, then a single entry that all rows with an error share.
    """
    languages = len(predictor.languages)
    best, millionths = torch.full((len(texts) + 1, top), languages), torch.zeros(1, top)
    unusual = torch.zeros(len(texts) + 1, dtype=torch.bool)
    if texts:
        names = encode_folded(texts, predictor.folding)
        values, places = probabilities(predictor.checkpoint.model, names).topk(top)
        best[:-1] = places.masked_fill(values < min_probability, languages)
        millionths = torch.cat([values.double().mul(MILLION).round(), millionths])
        unusual[:-1] = predictor.checkpoint.unusualness.of(names, predictor.folding) > 1
    return best, millionths.long(), unusual


def _report_errors(rows: Rows, texts: Sequence[str]) -> None:
    """Adds an error for each unusable name; shortens and escapes the names of rows with errors."""
    for place, text in enumerate(texts):
        if text:
            continue
        name = rows.names[place]
        if place not in rows.errors:
            is_text = not _LONE_SURROGATE.search(name)
            rows.errors[place] = (why_unusable(name) or "") if is_text else _NOT_TEXT
        shown = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"
        # Strict JSON parsers reject a lone surrogate even if it is escaped.
        rows.names[place] = escaped(shown) if _LONE_SURROGATE.search(shown) else shown
