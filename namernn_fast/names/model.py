"""The classifier. A recurrent layer reads a name; a linear layer scores the languages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from namernn_fast import FusedRNN

from .folding import ASCII

POOLINGS = ("last", "last+mean+max")

# Rows in the table of trigrams; trigram n uses row n modulo this number.
_TRIGRAM_ROWS = 8192


class NameClassifier(nn.Module):
    """Scores the languages of names with `nn.Embedding`, a vanilla RNN and `nn.Linear`.

    The attribute `config` holds every argument except `num_classes`, `rnn_class` and
    `alphabet_size`.

    Args:
        num_classes: the number of languages.
        embedding_size: the number of features of an embedded character, the RNN's `input_size`.
        hidden_size, num_layers, bidirectional, nonlinearity, dropout: as in `torch.nn.RNN`.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison. Both have the same `state_dict`
            keys and, from the same seed, the same initial weights.
        pooling: the input of the linear layer: "last", the last state of each direction; or
            "last+mean+max", which adds the mean and the maximum over all states of the last layer.
        state_dropout: the dropout probability for the input of the linear layer.
        character_dropout: the probability of hiding each character in training. The embedding of a
            hidden character is zero, and n-grams contain the symbol for an unknown character.
        ngrams: whether to add the embeddings of the n-grams around a character (see
            `NgramEmbedding`) to the character's embedding.
        alphabet_size: the number of distinct character ids (the length of a folding's alphabet).

    Raises:
        ValueError: `pooling` is not one of `POOLINGS`, or `rnn_class` rejects a value.
        TypeError: `rnn_class` rejects the type of a value.
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
        *,
        pooling: str = "last",
        state_dropout: float = 0.0,
        character_dropout: float = 0.0,
        ngrams: bool = False,
        alphabet_size: int = len(ASCII.alphabet),
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, not {pooling!r}")
        self.config: dict[str, Any] = {
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "nonlinearity": nonlinearity,
            "dropout": dropout,
            "pooling": pooling,
            "state_dropout": state_dropout,
            "character_dropout": character_dropout,
            "ngrams": ngrams,
        }
        self.num_directions = 2 if bidirectional else 1
        self.embedding = nn.Embedding(alphabet_size, embedding_size)
        self.ngrams = NgramEmbedding(embedding_size, alphabet_size) if ngrams else None
        self.rnn = rnn_class(
            embedding_size,
            hidden_size,
            num_layers,
            nonlinearity=nonlinearity,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        self.state_dropout = nn.Dropout(state_dropout)
        states = self.num_directions * (1 if pooling == "last" else 3)
        self.classifier = nn.Linear(states * hidden_size, num_classes)

    def forward(self, names: PackedSequence | Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns the logits (batch, num_classes), in the order in which the names were given.

        Args:
            names: a packed batch of character ids, int64; or padded ids, int64 (batch, longest).
            lengths: int64 (batch), the number of characters of each padded name, at least 1; None
                for packed ids. Padding must be valid ids, such as 0; it does not affect the result.

        Raises:
            TypeError: `names` is neither packed nor a tensor, or `lengths` is missing for padded
                ids or given for packed ids.
        """
        if isinstance(names, PackedSequence):
            if lengths is not None:
                raise TypeError("lengths must be None if names is a PackedSequence")
            if self.ngrams is not None:  # n-grams need adjacent characters, as in padded names
                return self.forward(*pad_packed_sequence(names, batch_first=True))
        elif isinstance(names, Tensor) and isinstance(lengths, Tensor):
            lengths = lengths.to(names.device)
        else:
            raise TypeError(
                "names must be a PackedSequence, or a tensor with a tensor of lengths, not "
                f"{type(names).__name__} with {type(lengths).__name__}"
            )
        read = self._read_ids if self._takes_ids() else self._read_embedded
        logits: Tensor = self.classifier(self.state_dropout(read(names, lengths)))
        return logits

    def shares_prefixes(self) -> bool:
        """Returns whether names in a batch can share the states of their common prefixes."""
        return self._takes_ids() and self.num_directions == 1 and self.config["pooling"] == "last"

    def states(self, name: Tensor) -> Tensor:
        """Returns the states of the last layer after each character of one name.

        Args:
            name: character ids, int64 (length).

        Returns:
            (length, num_directions * hidden_size).
        """
        if self._takes_ids():
            output: Tensor = self.rnn(name, embedding=self.embedding.weight)[0]
            return output
        lengths = torch.tensor([len(name)], device=name.device)
        output = self.rnn(self._embed(name.unsqueeze(0), lengths)[0])[0]
        return output

    def _takes_ids(self) -> bool:
        """Returns whether the recurrent layer reads character ids instead of embeddings."""
        return self.ngrams is None and isinstance(self.rnn, FusedRNN)

    def _read_ids(self, names: Any, lengths: Tensor | None) -> Tensor:
        """Runs the recurrent layer on character ids; returns the input of the linear layer."""
        packed = isinstance(names, PackedSequence)
        ids, embedding = names.data if packed else names, self.embedding.weight
        if (unknown := self._unknown(ids)) is not None:
            # Hidden characters use an additional row of zeros.
            ids = ids.masked_fill(unknown, len(embedding))
            embedding = F.pad(embedding, (0, 0, 0, 1))
        ids = names._replace(data=ids) if packed else ids.transpose(0, 1)
        if self.config["pooling"] == "last":
            last_state: Any = self.rnn.last_state  # attributes of modules have no types
            return self._last(last_state(ids, lengths=lengths, embedding=embedding))
        output, h_n = self.rnn(ids, lengths=lengths, embedding=embedding)
        return self._pool(output, h_n, lengths)

    def _read_embedded(self, names: Any, lengths: Tensor | None) -> Tensor:
        """Runs the recurrent layer on embeddings; returns the input of the linear layer."""
        if lengths is None:
            output, h_n = self.rnn(names._replace(data=self._embed(names.data)))
            return self._pool(output, h_n, None)
        embedded = self._embed(names, lengths).transpose(0, 1)
        if isinstance(self.rnn, FusedRNN):
            output, h_n = self.rnn(embedded, lengths=lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths.cpu(), enforce_sorted=False)
            output, h_n = self.rnn(packed)
        return self._pool(output, h_n, lengths)

    def _unknown(self, ids: Tensor) -> Tensor | None:
        """Returns a random mask of the characters to hide in this step, or None to hide none."""
        probability = self.config["character_dropout"] if self.training else 0.0
        return torch.rand(ids.shape, device=ids.device) < probability if probability else None

    def _embed(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns the embeddings (…, embedding_size) of character ids (…).

        With n-grams, the ids must be (batch, longest), and their `lengths` (batch) must be given.
        """
        embedded: Tensor = self.embedding(ids)
        if (unknown := self._unknown(ids)) is not None:
            embedded = embedded.masked_fill(unknown.unsqueeze(-1), 0)
        if self.ngrams is not None:
            embedded = embedded + self.ngrams(ids, lengths, unknown)
        return embedded

    def _last(self, h_n: Tensor) -> Tensor:
        """Returns the last states of the last layer: (batch, num_directions * hidden_size).

        The reverse direction ends at the first character, so its last state also depends on the
        whole name.
        """
        # h_n is (num_layers * num_directions, batch, hidden_size); the last layer comes last.
        if self.num_directions == 1:
            return h_n[-1]
        return h_n[-2:].transpose(0, 1).flatten(1)

    def _pool(self, output: Tensor | PackedSequence, h_n: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns the input of the linear layer: (batch, features)."""
        last = self._last(h_n)
        if self.config["pooling"] == "last":
            return last
        if isinstance(output, PackedSequence):
            output, lengths = pad_packed_sequence(output)
        assert lengths is not None  # checked in `forward`
        lengths = lengths.to(output.device)
        steps = torch.arange(output.shape[0], device=output.device)
        absent = (steps.unsqueeze(1) >= lengths).unsqueeze(2)  # (longest, batch, 1)
        mean = output.sum(0) / lengths.unsqueeze(1)
        largest = output.masked_fill(absent, -torch.inf).amax(0)
        return torch.cat([last, mean, largest], 1)


class NameEnsemble(nn.Module):
    """Several classifiers whose logits are averaged.

    Args:
        members: the classifiers, all for the same languages.

    Raises:
        ValueError: `members` is empty.
    """

    def __init__(self, members: Iterable[NameClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise ValueError("an ensemble must have at least one member")

    @property
    def config(self) -> list[dict[str, Any]]:
        """The options of each member."""
        return [member.config for member in self.members]  # type: ignore[misc]

    def forward(self, names: PackedSequence | Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns the mean logits (batch, num_classes); see `NameClassifier.forward`."""
        return torch.stack([member(names, lengths) for member in self.members]).mean(0)


class NgramEmbedding(nn.Module):
    """Sums the embeddings of the n-grams that contain a character.

    The n-grams are the bigram that ends at the character, the bigram that starts at the character,
    and the trigram around the character. Each name is padded with a mark at its start and at its
    end.

    Args:
        embedding_size: the number of features of each embedding.
        alphabet_size: the number of distinct character ids.
    """

    def __init__(self, embedding_size: int, alphabet_size: int) -> None:
        super().__init__()
        self.mark = alphabet_size  # the id of the padding at both ends of a name
        self.unknown = alphabet_size + 1
        self.symbols = alphabet_size + 2
        self.before = nn.Embedding(self.symbols**2, embedding_size)
        self.after = nn.Embedding(self.symbols**2, embedding_size)
        self.around = nn.Embedding(_TRIGRAM_ROWS, embedding_size)
        for table in (self.before, self.after, self.around):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor, lengths: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Returns the summed embeddings (batch, longest, embedding_size).

        Args:
            ids: int64 (batch, longest), padded character ids.
            lengths: int64 (batch), the number of characters of each name.
            unknown: bool (batch, longest), true for characters to hide; None to hide none.
        """
        if unknown is not None:
            ids = torch.where(unknown, self.unknown, ids)
        steps = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(steps < lengths.unsqueeze(1), ids, self.mark)
        previous = F.pad(ids[:, :-1], (1, 0), value=self.mark)
        following = F.pad(ids[:, 1:], (0, 1), value=self.mark)
        before = previous * self.symbols + ids
        after = ids * self.symbols + following
        around = (before * self.symbols + following) % _TRIGRAM_ROWS
        embedded: Tensor = self.before(before) + self.after(after) + self.around(around)
        return embedded
