"""FlashRNN, a rival for GPUs that is raced where it is installed."""

from torch import nn
from torch.nn.functional import linear

FLASH = "FlashRNN"
# FlashRNN rounds in ways of its own; a wrong formula is off by far more.
FLASH_ERROR = 0.05
# Seconds that FlashRNN takes to compile itself for one cell, about.
FLASH_COMPILES = 120


class FlashElman(nn.RNN):
    """FlashRNN's `elman` over the parameters of `nn.RNN`, for dense input.

    FlashRNN takes the projected input, so the projection is a product by itself.
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
