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
from .layer_norm_gru import FusedLayerNormGRU, FusedLayerNormGRUCell, TokenLayerNormGRU
from .layer_norm_lstm import FusedLayerNormLSTM, FusedLayerNormLSTMCell, TokenLayerNormLSTM
from .leaky import FusedLeakyRNN, FusedLeakyRNNCell, TokenLeakyRNN
from .lstm import FusedLSTM, FusedLSTMCell, TokenLSTM
from .replacing import prepare_rnn, replace_rnn, restore_rnn
from .slstm import FusedSLSTM, FusedSLSTMCell, TokenSLSTM
from .vanilla import FusedRNN, FusedRNNCell, TokenRNN
from .weights import CLASSES

__all__ = [
    "EquationCell",
    "EquationLayer",
    "FusedGRU",
    "FusedGRUCell",
    "FusedLSTM",
    "FusedLSTMCell",
    "FusedLayerNormGRU",
    "FusedLayerNormGRUCell",
    "FusedLayerNormLSTM",
    "FusedLayerNormLSTMCell",
    "FusedLeakyRNN",
    "FusedLeakyRNNCell",
    "FusedRNN",
    "FusedRNNCell",
    "FusedSLSTM",
    "FusedSLSTMCell",
    "PreparedCell",
    "PreparedLayer",
    "RecurrentCell",
    "Stream",
    "TokenEquationLayer",
    "TokenGRU",
    "TokenLSTM",
    "TokenLayerNormGRU",
    "TokenLayerNormLSTM",
    "TokenLeakyRNN",
    "TokenRNN",
    "TokenSLSTM",
    "explain",
    "prepare_rnn",
    "recurrent_cell",
    "replace_rnn",
    "restore_rnn",
]

allow_tracing(FusedLayer)
make_leaves(*CLASSES.values())
count_flops()
