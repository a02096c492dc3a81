"""A fused vanilla (Elman) RNN for PyTorch: the whole sequence in one operator."""

from importlib.metadata import version

from .functional import batch_invariant, explain, rnn
from .nn import FusedRNN, FusedRNNCell, replace_rnn

__version__ = version("namernn_fast")

__all__ = [
    "FusedRNN",
    "FusedRNNCell",
    "__version__",
    "batch_invariant",
    "explain",
    "replace_rnn",
    "rnn",
]
