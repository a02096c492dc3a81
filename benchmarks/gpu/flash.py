"""FlashRNN, a rival on GPUs that is timed if it is installed."""

from torch import nn
from torch.nn.functional import linear

FLASH = "FlashRNN"
# FlashRNN rounds differently; a wrong formula has a far larger error.
FLASH_ERROR = 0.05
# Approximate seconds that FlashRNN takes to compile for one workload.
FLASH_COMPILES = 120


class FlashElman(nn.RNN):
    """An `nn.RNN` that runs FlashRNN's `elman` on its own parameters. Takes dense input.

    FlashRNN takes the projected input, so the projection is a separate product.
    """

    def forward(self, input, hx=None):
        from flashrnn import flashrnn

        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        projected = linear(input, weight_ih, bias_ih).transpose(0, 1)
        states, last = flashrnn(
            projected[:, :, None, None],  # batch, steps, gates, heads, features
            weight_hh[None, None],
            bias_hh[None, None],
            function="elman",
            backend="cuda_fused",
            dtype=str(input.dtype).removeprefix("torch."),
        )
        return states[0, :, :, 0].transpose(0, 1), last[0, :, :, 0].transpose(0, 1)
