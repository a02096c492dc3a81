"""Distillation: trains a small network on a large network's predictions, also for made-up names.

The large network can label any string with probabilities, so the small network can be trained on
many more names than the data contains (Hinton et al., "Distilling the knowledge in a neural
network", arXiv:1503.02531). Made-up names are derived only from the training set.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict

from torch import nn

from .encoding import encode_folded
from .folding import ASCII
from .prediction import logits
from .splitting import LabelledNames, Split

MADE_UP = 80_000
"""The number of names made up to train the network that comes with the package."""

_START, _END = "^", "$"  # characters that never occur in folded names
_ORDERS = (2, 3)
_LONGEST = 20


def distilled(
    split: Split,
    teacher: nn.Module,
    made_up: int,
    *,
    prior_correction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Returns the split with a training set that the teacher has labelled with probabilities.

    Args:
        split: the split of the data; the validation and test sets stay unchanged.
        teacher: a trained classifier in evaluation mode, which must have been trained only on the
            training set, with the folding of the split.
        made_up: the number of names to make up. Fewer may be added to the training set, because
            duplicates and names of the validation and test sets are left out.
        prior_correction: the value in the teacher's recipe. Its effect is removed, so that only the
            student's recipe decides how strongly rare languages are favoured.
        seed: the seed of the made-up names.

    Returns:
        A split whose training set contains the distinct strings of `split.train` and the made-up
        names, with probabilities as labels: float32 (names, languages).
    """
    known = sorted(set(split.train.texts))
    drawn = set(made_up_names(split, made_up, seed=seed))
    tested = {*ASCII.fold_usable([*split.validation.texts, *split.test.texts])}
    new = sorted(drawn.difference(known))
    in_ascii = ASCII.fold_usable(new)
    texts = known + [text for text, name in zip(new, in_ascii, strict=True) if name not in tested]
    names = encode_folded(texts, split.folding)
    scores = logits(teacher, names)
    if prior_correction:
        scores = scores + prior_correction * split.log_priors().to(scores)
    train = LabelledNames(tuple(texts), names, scores.softmax(1))
    info = {**split.info, "made_up": made_up}
    return dataclasses.replace(split, train=train, info=info, seen=split.train)


def made_up_names(split: Split, count: int, *, seed: int = 0) -> list[str]:
    """Returns made-up names that look like the training names.

    For each language, a Markov chain draws the next character from all characters that follow the
    previous two or three in the language's training names. A language is drawn with a probability
    proportional to the square root of its number of names, so that rare languages are not
    neglected. The labels of the training set must be indices of languages, not probabilities.
    """
    draw = random.Random(seed)
    names_of: defaultdict[int, list[str]] = defaultdict(list)
    for text, label in zip(split.train.texts, split.train.labels.tolist(), strict=True):
        names_of[label].append(text)
    chains = {
        (label, order): _chain(texts, order)
        for label, texts in names_of.items()
        for order in _ORDERS
    }
    weights = [len(texts) ** 0.5 for texts in names_of.values()]
    made: list[str] = []
    while len(made) < count:
        [label] = draw.choices(list(names_of), weights)
        order = draw.choice(_ORDERS)
        if text := _walk(chains[label, order], order, draw):
            made.append(text)
    return made


def _chain(texts: list[str], order: int) -> dict[str, list[str]]:
    """Maps each run of `order` characters to all characters that follow it, including repeats."""
    following: defaultdict[str, list[str]] = defaultdict(list)
    for text in texts:
        marked = _START * order + text + _END
        for place in range(order, len(marked)):
            following[marked[place - order : place]].append(marked[place])
    return following


def _walk(chain: dict[str, list[str]], order: int, draw: random.Random) -> str:
    """Returns a name drawn from a chain, cut off after `_LONGEST` characters."""
    text = _START * order
    while len(text) < order + _LONGEST:
        character = draw.choice(chain[text[-order:]])
        if character == _END:
            break
        text += character
    return text[order:].strip()
