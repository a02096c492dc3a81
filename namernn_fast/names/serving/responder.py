"""Computes the server's responses: languages of names, states, and a description of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checkpoint import recorded
from ..folding import why_unusable
from ..model import NameClassifier
from ..prediction import Predictor
from ..text import InputError, escaped

MAX_STATES_LENGTH = 64
"""The maximum length, in characters, of a name for which states are returned. The work grows with
the square of the length, because the model runs for every prefix of the name."""

JsonObject = dict[str, Any]


class Responder:
    """Computes responses as plain values, ready for JSON.

    `predict` and `states` run the model, so only one thread at a time may call these methods.

    Args:
        predictor: the model.

    Raises:
        InputError: a probability is not finite.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        model = predictor.checkpoint.model
        # The states of an ensemble cannot be shown, because each member has different states.
        self._network = model if isinstance(model, NameClassifier) else None
        # Run the model once, because the first call is slow, and a damaged model should fail here.
        predictor.probabilities(["a"])

    def predict(self, names: Sequence[str], top: int) -> list[JsonObject]:
        """Returns, for each name, its `top` most probable languages, or an error."""
        texts = self._predictor.folding.fold_usable(names)
        usable = [name for name, text in zip(names, texts, strict=True) if text]
        found = iter(self._of_usable(usable, top))
        return [
            next(found) if text else {"name": name, "error": why_unusable(name)}
            for name, text in zip(names, texts, strict=True)
        ]

    def states(self, name: str) -> JsonObject:
        """Returns the states and the probabilities after each character of `name`.

        Raises:
            InputError: the name is unusable or too long, or a probability or state is not finite.
        """
        if len(name) > MAX_STATES_LENGTH:
            raise InputError(
                f"a name of {len(name):,} characters: states are returned for at most "
                f"{MAX_STATES_LENGTH}"
            )
        # Raises an InputError if a probability is not finite.
        probabilities = self._predictor.prefix_probabilities(name)
        states = self._predictor.states(name)[1] if self._network else None
        return {
            "name": name,
            "characters": list(self._predictor.folding.fold(name)),
            "dropped": self._predictor.folding.dropped(name),
            "states": None if states is None else _rounded(states, 3),
            "languages": list(self._predictor.languages),
            "probabilities": _rounded(probabilities, 6),
        }

    def description(self) -> JsonObject:
        """Describes the model, and its training data as recorded in the checkpoint."""
        model, info = self._predictor.checkpoint.model, self._predictor.info
        source = recorded(info, str, "split", "data", "source")
        return {
            "model": {
                "networks": 1 if self._network else len(model.config),
                "parameters": sum(value.numel() for value in model.parameters()),
                "options": model.config if self._network else None,
                "has_states": self._network is not None,
            },
            "languages": list(self._predictor.languages),
            "weak_languages": sorted(self._predictor.checkpoint.weak_languages()),
            "data": {
                "source": None if source is None else escaped(source)[:300],
                "rows": recorded(info, int, "split", "data", "rows"),
                "training_names": recorded(info, int, "split", "names", "train"),
                "is_sample": self._predictor.checkpoint.is_sample(),
            },
        }

    def _of_usable(self, names: Sequence[str], top: int) -> list[JsonObject]:
        """Returns one result per name; the result is an error if the model fails for the name."""
        if not names:
            return []
        try:
            # A stable sort, so that `top` does not change the order of equally probable languages.
            values, places = self._predictor.probabilities(names).sort(descending=True, stable=True)
        except InputError as error:
            if len(names) == 1:
                return [{"name": names[0], "error": str(error)}]
            half = len(names) // 2
            return self._of_usable(names[:half], top) + self._of_usable(names[half:], top)
        languages = self._predictor.languages
        unusual = (self._predictor.unusualness(names) > 1).tolist()
        best, probabilities = places[:, :top].tolist(), values[:, :top].tolist()
        return [
            {
                "name": name,
                "languages": [
                    {"language": languages[place], "probability": round(value, 6)}
                    for place, value in zip(best[row], probabilities[row], strict=True)
                ],
                "unusual": unusual[row],
                "dropped": self._predictor.folding.dropped(name),
            }
            for row, name in enumerate(names)
        ]


def _rounded(numbers: Tensor, digits: int) -> list[list[float]]:
    """Returns a matrix as lists of rounded numbers, to save digits in the JSON response."""
    return [[round(number, digits) for number in row] for row in numbers.tolist()]
