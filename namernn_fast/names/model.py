"""The classifier: from a name's characters, by a recurrent layer's last state, to a language."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN

from .text import ALPHABET, encode_names


class NameClassifier(nn.Module):
    """Scores of languages for names: `nn.Embedding`, a vanilla RNN, `nn.Linear`.

    The attribute `config` holds every argument but `num_classes` and `rnn_class`.

    Args:
        num_classes: the number of languages.
        embedding_size: features of an embedded character, the `input_size` of the RNN.
        hidden_size, num_layers, bidirectional, nonlinearity, dropout: as in `torch.nn.RNN`.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison. Both have the same `state_dict`
            keys and, from the same seed, the same initial weights.

    Raises:
        ValueError, TypeError: as of `rnn_class`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 64,
        hidden_size: int = 256,
        num_layers: int = 1,
        bidirectional: bool = False,
        nonlinearity: str = "tanh",
        dropout: float = 0.0,
        rnn_class: type[nn.RNN] = FusedRNN,
    ) -> None:
        super().__init__()
        self.config = {
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "nonlinearity": nonlinearity,
            "dropout": dropout,
        }
        self.num_directions = 2 if bidirectional else 1
        self.embedding = nn.Embedding(len(ALPHABET), embedding_size)
        self.rnn = rnn_class(
            embedding_size,
            hidden_size,
            num_layers,
            nonlinearity=nonlinearity,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        self.classifier = nn.Linear(self.num_directions * hidden_size, num_classes)

    def forward(self, names: PackedSequence) -> Tensor:
        """Returns the logits (batch, num_classes), in the order in which the names were given.

        Args:
            names: a packed batch of character ids, int64.

        Raises:
            TypeError: names is no PackedSequence.
        """
        if not isinstance(names, PackedSequence):
            raise TypeError(f"names must be a PackedSequence, not {type(names).__name__}")
        _, h_n = self.rnn(names._replace(data=self.embedding(names.data)))
        # h_n is (num_layers * num_directions, batch, hidden_size), and its end has the states of
        # the last layer. The last state of the second direction is at the first character, so it
        # too has read the whole name.
        last = h_n[-self.num_directions :].transpose(0, 1).flatten(1)
        logits: Tensor = self.classifier(last)
        return logits


@torch.no_grad()
def predict(model: NameClassifier, names: Sequence[str]) -> Tensor:
    """Returns the probabilities of the languages (number of names, num_classes), on the CPU.

    The model is in evaluation mode during the call.

    Args:
        model: the classifier.
        names: as text.

    Raises:
        InputError: there is no name, or a name holds no usable character.
    """
    encoded = encode_names(names)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        logits = model(encoded.pack(torch.arange(len(encoded)), device))
    finally:
        model.train(training)
    return logits.softmax(1).cpu()
