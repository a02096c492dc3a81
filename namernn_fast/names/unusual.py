"""Measures how unusual a name is: how improbable its characters are, given the training names.

A recurrent network predicts confidently for any string, because its probabilities only compare
languages. The likelihood of a name under a model of character trigrams shows whether the name
resembles the training names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoding import EncodedNames
from .folding import ASCII, MAX_NAME_LENGTH, Folding
from .splitting import LabelledNames, Split

SHARE = 0.02
"""The fraction of the validation names that counts as unusual."""

SYMBOLS = len(ASCII.alphabet) + 1
"""The number of symbols: the ASCII alphabet, and a mark before and after a name."""

_MARK = SYMBOLS - 1

# Pseudo-count: weight of the shorter n-gram's distribution, as a number of observations.
_PRIOR = 5.0
_LEAST_LIMIT = 1.0  # in standard deviations; a tiny validation set could give a limit too low
_NAMES_AT_ONCE = 65_536


@dataclass(frozen=True)
class Unusualness:
    """A character-trigram model that measures how unusual names are.

    The surprise of a character is its negative log-probability given the previous two characters.
    A name of n characters, its end included, has the score
    sum(surprise - mean) / (deviation * sqrt(n)), with the mean and the deviation of all surprises
    in the validation names. The score is divided by the value that `SHARE` of the validation names
    exceed. With the default fields, no name is unusual.
    """

    table: Tensor = field(default_factory=lambda: torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS))
    """float32 (SYMBOLS, SYMBOLS, SYMBOLS), the scaled terms of the score's sum, indexed by the
    previous two symbols and the next symbol."""
    longest: int = MAX_NAME_LENGTH
    """The number of characters of the longest training name."""

    def of(self, names: EncodedNames, folding: Folding) -> Tensor:
        """Returns how unusual names are: float32 (number of names), above 1 for unusual names.

        A name that is longer than every training name is always unusual: the result is at least the
        name's length divided by `longest`.

        Args:
            names: the encoded names, as `encode_names` returns them.
            folding: the folding of the names.
        """
        plain = torch.tensor(folding.plain_ids)
        lengths = names.lengths.split(_NAMES_AT_ONCE)
        characters = names.characters.split([int(each.sum()) for each in lengths])
        starts = (each.cumsum(0) - each for each in lengths)
        parts = map(EncodedNames, characters, starts, lengths)
        values = torch.cat([_sums(self.table.flatten(), part, plain) for part in parts]).float()
        excess = names.lengths / self.longest
        return torch.where(excess > 1, values.maximum(excess), values)


def fit_unusualness(split: Split) -> Unusualness:
    """Fits the trigrams to the training names, and the scale to the validation names.

    Each probability is interpolated with the probability under the shorter n-gram (MacKay and Peto,
    "A hierarchical Dirichlet language model", 1995). Each name has the weight 1 / sqrt(n) if
    its language has n names, so that names are not unusual just because their language is rare.

    Args:
        split: the split of the data. If labels are probabilities, a name belongs to its most
            probable language.
    """
    plain = torch.tensor(split.folding.plain_ids)
    train = split.seen or split.train
    surprise = -_log_probabilities(train, plain)
    names = split.validation.names
    codes, ends = _codes(names, plain)
    observed = surprise.flatten()[torch.cat([codes, ends])]
    mean, deviation = observed.mean(), observed.std(correction=0).clamp(min=1e-3)
    table = (surprise - mean) / deviation
    limit = _sums(table.flatten(), names, plain).quantile(1 - SHARE).clamp(min=_LEAST_LIMIT)
    return Unusualness((table / limit).float(), int(train.names.lengths.max()))


def _log_probabilities(data: LabelledNames, plain: Tensor) -> Tensor:
    """Returns log P(symbol | previous two symbols): float64 (SYMBOLS, SYMBOLS, SYMBOLS)."""
    codes, ends = _codes(data.names, plain)
    labels = data.labels if data.labels.ndim == 1 else data.labels.argmax(1)
    rarity = labels.bincount().double().rsqrt()[labels]
    weights = rarity / rarity.mean()
    repeated = weights.repeat_interleave(data.names.lengths)
    counts = torch.zeros(SYMBOLS**3, dtype=torch.float64)
    counts.index_add_(0, torch.cat([codes, ends]), torch.cat([repeated, weights]))
    three = counts.view(SYMBOLS, SYMBOLS, SYMBOLS)
    two, one = three.sum(0), three.sum((0, 1))
    found = (one + 1) / (one.sum() + SYMBOLS)
    for count in (two, three):
        found = (count + _PRIOR * found) / (count.sum(-1, keepdim=True) + _PRIOR)
    return found.log()


def _codes(names: EncodedNames, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Returns indices into the flattened table of trigrams; `plain` holds `Folding.plain_ids`.

    Returns:
        int64 (characters), the trigram that ends at each character; int64 (number of names), the
        trigram that ends at the mark after each name.
    """
    ids = plain[names.characters]
    previous = ids.roll(1)
    previous[names.starts] = _MARK
    before = previous.roll(1)
    before[names.starts] = _MARK
    last = names.starts + names.lengths - 1
    ends = (previous[last] * SYMBOLS + ids[last]) * SYMBOLS + _MARK
    return (before * SYMBOLS + previous) * SYMBOLS + ids, ends


def _sums(table: Tensor, names: EncodedNames, plain: Tensor) -> Tensor:
    """Returns each name's score: the sum of its terms in `table`, divided by sqrt(length + 1)."""
    codes, ends = _codes(names, plain)
    running = F.pad(table[codes].double().cumsum(0), (1, 0))
    sums = running[names.starts + names.lengths] - running[names.starts] + table[ends]
    return sums / (names.lengths + 1).sqrt()
