"""Tests that `reset_to=` matches torchrl's modules, which use `is_init` and stored states.

In recurrent mode, torchrl's modules split every sequence at its resets and pad the pieces. `run.py`
runs this file with torch's layers, and again with the fused classes under the same names.
"""

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from namernn_fast import FusedGRU, FusedLSTM

B, T, D, H = 7, 12, 3, 5
KINDS = {
    "gru": (GRUModule, FusedGRU, ["recurrent_state"]),
    "lstm": (LSTMModule, FusedLSTM, ["recurrent_state_h", "recurrent_state_c"]),
}


@pytest.mark.parametrize("often", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("python_based", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_one_call_with_reset_to_matches_the_torchrl_module(name, python_based, num_layers, often):
    torch.manual_seed(0)
    make, fused, keys = KINDS[name]
    sizes = {"input_size": D, "hidden_size": H, "num_layers": num_layers}
    theirs = make(**sizes, python_based=python_based, in_key="x", out_key="y")
    rnn = getattr(theirs, name)
    ours = fused(D, H, num_layers, batch_first=True)
    ours.load_state_dict(rnn.state_dict())

    x = torch.randn(B, T, D, requires_grad=True)
    states = [torch.randn(B, T, num_layers, H, requires_grad=True) for _ in keys]
    is_init = torch.rand(B, T, 1) < often
    batch = {"x": x, "is_init": is_init, **dict(zip(keys, states, strict=True))}
    with set_recurrent_mode(True):
        wanted = theirs(TensorDict(batch, [B, T]))["y"]

    reset = is_init.squeeze(-1).clone()
    reset[:, 0] = True  # torchrl always reads the states of the first step
    output, _ = ours(x, reset=reset, reset_to=tuple(states) if len(states) > 1 else states[0])
    torch.testing.assert_close(output, wanted)
    weights = torch.randn_like(wanted)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(result, [x, *states, *layer.parameters()], weights)
            for result, layer in ((output, ours), (wanted, rnn))
        )
    )
