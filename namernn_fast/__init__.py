"""Fused vanilla (Elman) RNNs, GRUs and LSTMs for PyTorch: a whole sequence in one operator."""

from importlib.metadata import PackageNotFoundError, version

from . import requirements  # noqa: F401 - first: explains why other imports would fail
from .explaining import explain
from .functional import gru, last_state, lstm, rnn
from .nn import FusedGRU, FusedLSTM, FusedRNN
from .options import batch_invariant
from .replacing import replace_rnn, restore_rnn
from .step_modules import FusedGRUCell, FusedLSTMCell, FusedRNNCell
from .token_rnn import TokenGRU, TokenLSTM, TokenRNN

try:
    __version__ = version("namernn_fast")
except PackageNotFoundError:  # an uninstalled checkout, as `make bench-gpu` runs it
    __version__ = "0+checkout"

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
    "TokenGRU",
    "TokenLSTM",
    "TokenRNN",
    "__version__",
    "batch_invariant",
    "explain",
    "gru",
    "last_state",
    "lstm",
    "replace_rnn",
    "restore_rnn",
    "rnn",
]
