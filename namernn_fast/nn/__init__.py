"""The layers, step modules and token layers, the replacement of torch's modules, and `explain`."""

import sys

from . import step_modules, token_layers
from .explaining import explain
from .layers import FusedGRU, FusedLeakyRNN, FusedLSTM, FusedRNN
from .prepared import PreparedCell, PreparedLayer
from .replacing import prepare_rnn, replace_rnn, restore_rnn
from .step_modules import FusedGRUCell, FusedLeakyRNNCell, FusedLSTMCell, FusedRNNCell
from .streams import Stream
from .token_layers import TokenGRU, TokenLeakyRNN, TokenLSTM, TokenRNN

__all__ = [
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
    "Stream",
    "TokenGRU",
    "TokenLSTM",
    "TokenLeakyRNN",
    "TokenRNN",
    "explain",
    "prepare_rnn",
    "replace_rnn",
    "restore_rnn",
]

# A pickle names the module that defines a class. Older pickles name the modules step_modules and
# token_layers by earlier paths.
sys.modules["namernn_fast.step_modules"] = step_modules
sys.modules["namernn_fast.token_rnn"] = token_layers
