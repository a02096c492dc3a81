"""Predicts the languages of names with a trained model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN

from .checkpoint import PRETRAINED, Checkpoint, load_checkpoint, pretrained_checkpoint
from .encoding import EncodedNames, encode, encode_names
from .folding import Folding
from .model import NameClassifier, NameEnsemble
from .text import InputError, check_names

# Maximum number of characters in a batch. It bounds the memory, because each layer stores
# hidden_size numbers per character.
_BATCH_CHARACTERS = 16_384

# Maximum number of characters in a batch of names that share the states of common prefixes. Most
# characters then need no new state, and larger batches share more prefixes. Names longer than
# _SHARED_LENGTH get separate batches, because long names take many steps.
_SHARED_CHARACTERS = 262_144
_SHARED_LENGTH = 32


class Predictor:
    """A trained model, ready to predict.

    Args:
        checkpoint: the model with its languages; the model is switched to evaluation mode.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.checkpoint.model.eval()

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the order of the columns of `probabilities`."""
        return self.checkpoint.languages

    @property
    def folding(self) -> Folding:
        """The folding that the model was trained with."""
        return self.checkpoint.folding

    @property
    def info(self) -> dict[str, Any]:
        """Plain values about how the model was trained, as in `Checkpoint.info`."""
        return self.checkpoint.info

    def predict(self, names: Iterable[str], top: int = 3) -> list[list[tuple[str, float]]]:
        """Returns the most probable languages of each name, the most probable first.

        Args:
            names: the names, all usable (see `names.folding.why_unusable`).
            top: the number of languages to return for each name; all languages if there are fewer.

        Returns:
            For each name, in the order given, a list of (language, probability).

        Raises:
            TypeError: `names` is a string, or contains something other than strings.
            ValueError: `top` is below 1.
            InputError: a name is unusable, or a probability is not finite.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        top = min(top, len(self.languages))
        values, places = self.probabilities(names).topk(top)
        languages = map(self.languages.__getitem__, places.flatten().tolist())
        pairs = [*zip(languages, values.flatten().tolist(), strict=True)]
        return [pairs[begin : begin + top] for begin in range(0, len(pairs), top)]

    def languages_of(self, names: Iterable[str]) -> list[str]:
        """Returns the most probable language of each name, in the order given.

        This is the fastest way to label many names: `predict` is slower, because it also returns
        probabilities and builds a list for each name.

        Raises:
            TypeError, InputError: as in `predict`.
        """
        names = check_names(names)
        if not names:
            return []
        scores = logits(self.checkpoint.model, encode_names(names, self.folding))
        values, labels = scores.max(1)
        # The probabilities of a name are finite if its largest logit is finite.
        _finite(values, "probabilities")
        return [*map(self.languages.__getitem__, labels.tolist())]

    def probabilities(self, names: Iterable[str]) -> Tensor:
        """Returns the probabilities of the languages: float32 (number of names, languages).

        Names are read in batches of bounded size, so the memory for the states of the model does
        not grow with the number of names.

        Raises:
            TypeError, InputError: as in `predict`.
        """
        names = check_names(names)
        if not names:
            return torch.empty(0, len(self.languages))
        return probabilities(self.checkpoint.model, encode_names(names, self.folding))

    def unusualness(self, names: Iterable[str]) -> Tensor:
        """Returns how unusual names are, given the training names: float32 (number of names).

        A name with a value above 1 is unusual: its characters are less probable than in 98 % of the
        validation names. Predictions for unusual names are unreliable.

        Raises:
            TypeError, InputError: as in `predict`.
        """
        names = check_names(names)
        if not names:
            return torch.empty(0)
        return self.checkpoint.unusualness.of(encode_names(names, self.folding), self.folding)

    def states(self, name: str) -> tuple[str, Tensor]:
        """Returns the folded name, and the states after each of its characters.

        The model must be a single network, such as the pretrained model.

        Returns:
            The folded name, and float32 (length, hidden_size), or (length, 2 * hidden_size) for a
            bidirectional model.

        Raises:
            TypeError: the model is an ensemble.
            InputError: the name is unusable, or a state is not finite.
        """
        model = self.checkpoint.model
        ids = encode(name, self.folding)
        if not isinstance(model, NameClassifier):
            raise TypeError("an ensemble has no single state; use one of its members")
        with torch.no_grad():
            states = model.states(ids.to(next(model.parameters()).device)).float().cpu()
        return self.folding.fold(name), _finite(states, "states")

    def prefix_probabilities(self, name: str) -> Tensor:
        """Returns the probabilities after each character of `name`: float32 (length, languages).

        Raises:
            InputError: as in `predict`.
        """
        ids = encode(name, self.folding)
        lengths = torch.arange(1, len(ids) + 1)
        prefixes = EncodedNames(ids, torch.zeros_like(lengths), lengths)
        return probabilities(self.checkpoint.model, prefixes)


def load(
    path: str | os.PathLike[str] = PRETRAINED,
    *,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
) -> Predictor:
    """Loads the model at `path`, or by default the pretrained model.

    Training a model does not change the default.

    Args:
        path: the path of a checkpoint, or "pretrained" for the model that comes with the package.
            For a file that is called pretrained, pass "./pretrained" or a `pathlib.Path`.
        device: the device to run the model on.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.

    Raises:
        InputError, OSError, ModuleNotFoundError: as in `load_checkpoint`.

    Example:
        >>> predictor = load()
        >>> predictor.languages_of(["Ślusàrski", "Nguyen"])
        ['Polish', 'Vietnamese']
        >>> ((language, probability),) = predictor.predict(["Ślusàrski"], top=1)[0]
    """
    found = pretrained_checkpoint() if path == PRETRAINED else Path(path)
    return Predictor(load_checkpoint(found, device=device, rnn_class=rnn_class))


def probabilities(model: nn.Module, names: EncodedNames) -> Tensor:
    """Returns the probabilities of the languages (number of names, num_classes), on the CPU.

    Args:
        model: a `NameClassifier` or `NameEnsemble`, in evaluation mode.
        names: the names, at least one.

    Raises:
        InputError: a probability is not finite.
    """
    return _finite(logits(model, names).softmax(1), "probabilities")


def _finite(results: Tensor, what: str) -> Tensor:
    if not results.isfinite().all():
        raise InputError(f"the model is damaged: its {what} are not finite")
    return results


@torch.no_grad()
def logits(model: nn.Module, names: EncodedNames) -> Tensor:
    """Returns the logits (number of names, num_classes), on the CPU; see `probabilities`."""
    scored = ((indices, model(packed).float().cpu()) for indices, packed in _batches(model, names))
    order, scores = map(torch.cat, zip(*scored, strict=True))
    return torch.empty_like(scores).index_copy_(0, order, scores)


def _batches(model: nn.Module, names: EncodedNames) -> Iterator[tuple[Tensor, PackedSequence]]:
    """Yields the indices and the packed names of batches of bounded size."""
    device = next(model.parameters()).device
    indices, longest = torch.arange(len(names)), int(names.lengths.max())
    if len(names) * longest <= _BATCH_CHARACTERS:
        yield indices, names.pack(indices, device)
        return
    if device.type == "cpu" and _shares_prefixes(model):
        short = names.lengths <= _SHARED_LENGTH
        size = _SHARED_CHARACTERS // min(longest, _SHARED_LENGTH)
        order = names.by_length(names.by_beginning(indices[short]), size)
        # Not strict: if `order` is empty, `split` returns one tensor, but `pack_each` yields none.
        yield from zip(order.split(size), names.pack_each(order, size, device), strict=False)
        indices = indices[~short]
    order = names.by_length(indices)
    begin = 0
    while begin < len(order):
        longest = int(names.lengths[order[begin]])
        end = begin + max(_BATCH_CHARACTERS // longest, 1)
        yield order[begin:end], names.pack(order[begin:end], device)
        begin = end


def _shares_prefixes(model: nn.Module) -> bool:
    """Returns whether every network of a model can share the states of common prefixes."""
    members = model.members if isinstance(model, NameEnsemble) else [model]
    return all(
        isinstance(member, NameClassifier) and member.shares_prefixes() for member in members
    )
