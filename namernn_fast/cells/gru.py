"""The gated recurrent unit.

As in `torch.nn.GRU`, each step computes::

    r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z) * n + z * h_{t-1}
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .cell import Cell, LayerWeights, OnnxNode, Step, TorchCounterpart


def make_step(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step that computes h_t from x = W_ih x_t + b_ih and h = h_{t-1}."""

    weight_hh, bias_hh = weights["weight_hh"], weights.get("bias_hh")

    def step(x: Tensor, h: Tensor) -> Tensor:
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = linear(h, weight_hh, bias_hh).chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n)

    return step


def equation(nonlinearity: str) -> Callable[..., Tensor]:
    """Returns the step of programs."""

    def step(x: Sequence[Tensor], u: Sequence[Tensor], h: Tensor) -> Tensor:
        r, z = torch.sigmoid(x[0] + u[0]), torch.sigmoid(x[1] + u[1])
        n = torch.tanh(x[2] + r * u[2])
        return n + z * (h - n)

    return step


GRU = Cell(
    name="gru",
    number=1,
    layer="FusedGRU",
    gates=3,
    kept=4,
    make_step=make_step,
    equation=equation,
    separate=1,
    torch=TorchCounterpart(
        nn.GRU,
        nn.GRUCell,
        steps={"tanh": torch.gru_cell},
        # linear_before_reset: the reset gate scales W_hn h + b_hn, as in torch.
        onnx=OnnxNode("GRU", gates=(1, 0, 2), attributes={"linear_before_reset": 1}),
        operator=torch.gru,
        autocasts_only_products=frozenset({"padded", "packed"}),
    ),
)
