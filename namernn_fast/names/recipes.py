"""Recipes: plain values that describe how a model is built and trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .text import InputError

SCHEDULES = ("constant", "one-cycle")

MAX_EPOCHS = 2_500
"""The maximum number of epochs of all members together; a checkpoint records every epoch."""


@dataclass(frozen=True)
class Recipe:
    """The options of a training run; `RECIPES` contains the named recipes.

    Raises:
        InputError: a value is invalid.
    """

    epochs: int = 10
    """The number of passes over the training names."""
    batch_size: int = 64
    """The number of names in a step."""
    lr: float = 1e-3
    """The learning rate of AdamW; with "one-cycle", its maximum."""
    schedule: str = "constant"
    """The schedule of the learning rate: "constant", or "one-cycle" (Smith and Topin,
    arXiv:1708.07120)."""
    weight_decay: float = 0.0
    """The decoupled weight decay of AdamW."""
    label_smoothing: float = 0.0
    """As in `torch.nn.functional.cross_entropy`."""
    clip_norm: float | None = None
    """The maximum norm of the gradient; None disables clipping."""
    members: int = 1
    """The number of networks to train, whose logits are averaged."""
    prior_correction: float = 0.0
    """How strongly to favour rare languages: after training, this many times the logarithm of a
    language's training frequency is subtracted from its logit (Menon et al., "Long-tail
    learning via logit adjustment", arXiv:2007.07314)."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Options of `NameClassifier`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", MappingProxyType(dict(self.model)))
        checks = {
            "epochs": _is_count(self.epochs),
            "batch_size": _is_count(self.batch_size),
            "lr": 0 < self.lr < math.inf,
            "schedule": self.schedule in SCHEDULES,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "clip_norm": self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "members": _is_count(self.members),
            "prior_correction": 0 <= self.prior_correction < math.inf,
        }
        for name, usable in checks.items():
            if not usable:
                raise InputError(f"the recipe's {name} cannot be {getattr(self, name)!r}")
        if (total := self.epochs * self.members) > MAX_EPOCHS:
            raise InputError(f"{total:,} epochs in total, but at most {MAX_EPOCHS:,} are allowed")

    def changed(self, **changes: Any) -> Recipe:
        """Returns a copy with the given values; options missing from `model` stay as they are."""
        if "model" in changes:
            changes["model"] = {**self.model, **changes["model"]}
        return dataclasses.replace(self, **changes)

    def values(self) -> dict[str, Any]:
        """Returns the options as plain values, for a file."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**values, "model": dict(self.model)}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


_ONE_CYCLE = Recipe(
    epochs=12,
    lr=3e-3,
    schedule="one-cycle",
    weight_decay=0.01,
    label_smoothing=0.05,
    clip_norm=1.0,
    prior_correction=0.15,
    model={"character_dropout": 0.1},
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "plain": _ONE_CYCLE,
        "reference": _ONE_CYCLE.changed(
            members=8,
            prior_correction=0.3,
            model={
                "hidden_size": 192,
                "bidirectional": True,
                "pooling": "last+mean+max",
                "state_dropout": 0.2,
                "character_dropout": 0.2,
                "ngrams": True,
            },
        ),
        "distilled": _ONE_CYCLE.changed(
            epochs=8,
            batch_size=128,
            label_smoothing=0.0,
            model={"character_dropout": 0.0},
        ),
    }
)
"""The recipes by name, chosen on validation sets."""

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "one small network, with the defaults of NameClassifier",
        "reference": "eight bidirectional networks on n-gram embeddings, the most accurate model",
        "distilled": "the same network as in plain, trained on the answers of --teacher",
    }
)
"""A few words on what each recipe trains, for --help."""
