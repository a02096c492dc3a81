"""Fused RNNs, GRUs, LSTMs and leaky RNNs for PyTorch: a whole sequence in one operator."""

from importlib.metadata import PackageNotFoundError, version

from .machine import requirements  # noqa: F401 - first, to reject a torch that is too old

# isort: split
from . import (
    gpu_backend,  # noqa: F401 - registers the operators on GPUs
    nn,
)
from .call.options import batch_invariant
from .functional import last_state
from .machine.scratch_memory import empty_cache, memory_reserved
from .nn import *  # noqa: F403
from .nn.gru import gru
from .nn.leaky import leaky
from .nn.lstm import lstm
from .nn.slstm import slstm
from .nn.vanilla import rnn

try:
    __version__ = version("namernn_fast")
except PackageNotFoundError:  # `make bench-gpu` runs a checkout that is not installed
    __version__ = "0+checkout"

__all__ = [
    "__version__",
    "batch_invariant",
    "empty_cache",
    "gru",
    "last_state",
    "leaky",
    "lstm",
    "memory_reserved",
    "rnn",
    "slstm",
]
__all__ += nn.__all__

for _name in nn.__all__:
    # Let pickles refer to this package, so that a class can move to another submodule later.
    globals()[_name].__module__ = __name__
