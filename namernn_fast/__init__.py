"""Fused vanilla (Elman) RNNs and GRUs for PyTorch: a whole sequence in one operator."""

from importlib.metadata import PackageNotFoundError, version

from . import requirements  # noqa: F401 - first: explains why other imports would fail
from .cells import FusedGRUCell, FusedRNNCell
from .explaining import explain
from .functional import batch_invariant, gru, last_state, rnn
from .nn import FusedGRU, FusedRNN
from .replacing import replace_rnn, restore_rnn
from .token_rnn import TokenGRU, TokenRNN

try:
    __version__ = version("namernn_fast")
except PackageNotFoundError:  # an uninstalled checkout, as `make bench-gpu` runs it
    __version__ = "0+checkout"

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedRNN",
    "FusedRNNCell",
    "TokenGRU",
    "TokenRNN",
    "__version__",
    "batch_invariant",
    "explain",
    "gru",
    "last_state",
    "replace_rnn",
    "restore_rnn",
    "rnn",
]
