"""Fused vanilla (Elman) RNNs, GRUs and LSTMs for PyTorch: a whole sequence in one operator."""

from importlib.metadata import PackageNotFoundError, version

from .machine import requirements  # noqa: F401 - first, to reject a torch that is too old

# isort: split
from .call.options import batch_invariant
from .functional import gru, last_state, lstm, rnn
from .machine.scratch_memory import empty_cache, memory_reserved
from .nn import (
    FusedGRU,
    FusedGRUCell,
    FusedLSTM,
    FusedLSTMCell,
    FusedRNN,
    FusedRNNCell,
    PreparedCell,
    PreparedLayer,
    Stream,
    TokenGRU,
    TokenLSTM,
    TokenRNN,
    explain,
    prepare_rnn,
    replace_rnn,
    restore_rnn,
)

try:
    __version__ = version("namernn_fast")
except PackageNotFoundError:  # not installed: `make bench-gpu` runs the checkout itself
    __version__ = "0+checkout"

__all__ = [
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedRNN",
    "FusedRNNCell",
    "PreparedCell",
    "PreparedLayer",
    "Stream",
    "TokenGRU",
    "TokenLSTM",
    "TokenRNN",
    "__version__",
    "batch_invariant",
    "empty_cache",
    "explain",
    "gru",
    "last_state",
    "lstm",
    "memory_reserved",
    "prepare_rnn",
    "replace_rnn",
    "restore_rnn",
    "rnn",
]
