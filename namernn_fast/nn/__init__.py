"""The modules of this package, functions that replace torch's modules with them, and `explain`."""

from ..integrations.compile import allow_tracing
from ..integrations.flops import count_flops
from ..integrations.fx import make_leaves
from .base.layer import FusedLayer
from .equation import RecurrentCell, recurrent_cell
from .equation_modules import EquationCell, EquationLayer, TokenEquationLayer
from .explaining import explain
from .gru import FusedGRU, FusedGRUCell, TokenGRU
from .inference.prepared import PreparedCell, PreparedLayer
from .inference.stream import Stream
from .leaky import FusedLeakyRNN, FusedLeakyRNNCell, TokenLeakyRNN
from .lstm import FusedLSTM, FusedLSTMCell, TokenLSTM
from .replacing import prepare_rnn, replace_rnn, restore_rnn
from .vanilla import FusedRNN, FusedRNNCell, TokenRNN
from .weights import CLASSES

__all__ = [
    "EquationCell",
    "EquationLayer",
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedLeakyRNN",
    "FusedLeakyRNNCell",
    "FusedRNN",
    "FusedRNNCell",
    "PreparedCell",
    "PreparedLayer",
    "RecurrentCell",
    "Stream",
    "TokenEquationLayer",
    "TokenGRU",
    "TokenLSTM",
    "TokenLeakyRNN",
    "TokenRNN",
    "explain",
    "prepare_rnn",
    "recurrent_cell",
    "replace_rnn",
    "restore_rnn",
]

allow_tracing(FusedLayer)
make_leaves(*CLASSES.values())
count_flops()
