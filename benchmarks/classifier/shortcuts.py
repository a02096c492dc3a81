"""The application before, with the shortcuts of `FusedRNN` one at a time and together."""

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from benchmarks.classifier.before import Before, Classifier


class _Table(Classifier):
    def _last_state(self, names: PackedSequence) -> Tensor:
        _, h_n = self.rnn(names, embedding=self.embedding.weight)
        return h_n


class _LastState(Classifier):
    def _last_state(self, names: PackedSequence) -> Tensor:
        return self.rnn.last_state(names._replace(data=self.embedding(names.data)))


class _Both(Classifier):
    share_prefixes = False

    def _last_state(self, names: PackedSequence) -> Tensor:
        return self.rnn.last_state(
            names, embedding=self.embedding.weight, share_prefixes=self.share_prefixes
        )


class _Shared(_Both):
    share_prefixes = True


class TokenTable(Before):
    name = "before, token table"
    classifier = _Table
    token_table = True


class LastState(Before):
    name = "before, last state alone"
    classifier = _LastState


class Both(Before):
    name = "before, table and last state"
    classifier = _Both
    token_table = True


class SharedPrefixes(Before):
    name = "before, both, shared prefixes"
    classifier = _Shared
    token_table = True
    shared_prefixes = True
