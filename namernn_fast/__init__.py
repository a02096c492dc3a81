"""A fused vanilla (Elman) RNN for PyTorch: the whole sequence in one operator."""

from importlib.metadata import PackageNotFoundError, version

from . import requirements  # noqa: F401 - first: explains why other imports would fail
from .explaining import explain
from .functional import batch_invariant, last_state, rnn
from .nn import FusedRNN, FusedRNNCell
from .replacing import replace_rnn, restore_rnn
from .token_rnn import TokenRNN

try:
    __version__ = version("namernn_fast")
except PackageNotFoundError:  # an uninstalled checkout, as `make bench-gpu` runs it
    __version__ = "0+checkout"

__all__ = [
    "FusedRNN",
    "FusedRNNCell",
    "TokenRNN",
    "__version__",
    "batch_invariant",
    "explain",
    "last_state",
    "replace_rnn",
    "restore_rnn",
    "rnn",
]
