"""The layers, step modules and token layers, the replacement of torch's modules, and `explain`."""

import sys

from .. import cells
from ..integrations.compile import allow_tracing
from ..integrations.flops import count_flops
from ..integrations.fx import make_leaves
from . import layers, step_modules, token_layers
from .explaining import explain
from .gru import FusedGRU, FusedGRUCell, TokenGRU
from .leaky import FusedLeakyRNN, FusedLeakyRNNCell, TokenLeakyRNN
from .lstm import FusedLSTM, FusedLSTMCell, TokenLSTM
from .prepared import PreparedCell, PreparedLayer
from .replacing import prepare_rnn, replace_rnn, restore_rnn
from .streams import Stream
from .vanilla import FusedRNN, FusedRNNCell, TokenRNN
from .weights import CLASSES

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

allow_tracing(layers.FusedLayer)
make_leaves(*CLASSES.values())
count_flops()

# A pickle names the module that defines a class. Older pickles name these modules.
sys.modules["namernn_fast.step_modules"] = step_modules
sys.modules["namernn_fast.token_rnn"] = token_layers
for older in (cells, layers, step_modules, token_layers):
    vars(older).update(CLASSES)
