"""The long short-term memory.

As in `torch.nn.LSTM`, each step computes::

    i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
    f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
    g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
    o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)

With projections, h_t = W_hr (o * tanh(c_t)).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .cell import (
    Cell,
    LayerWeights,
    OnnxNode,
    State,
    Step,
    TorchCounterpart,
    usual_parameters,
)


def make_step(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step that computes h_t and c_t.

    The step takes x = W_ih x_t + b_ih + b_hh, and the previous states, h_{t-1} followed by c_{t-1}.
    """
    weight_hh, weight_hr = weights["weight_hh"].t(), weights.get("weight_hr")

    def step(x: Tensor, states: Tensor) -> Tensor:
        h, c = states.tensor_split([weight_hh.shape[0]], 1)
        i, f, g, o = torch.addmm(x, h, weight_hh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return torch.cat([h if weight_hr is None else linear(h, weight_hr), c], 1)

    return step


def equation(nonlinearity: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the step of programs, which knows no projections."""

    def step(
        x: Sequence[Tensor], u: Sequence[Tensor], h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        i, f, o = (torch.sigmoid(x[k] + u[k]) for k in (0, 1, 3))
        c = f * c + i * torch.tanh(x[2] + u[2])
        return o * torch.tanh(c), c

    return step


LSTM = Cell(
    name="lstm",
    number=2,
    layer="FusedLSTM",
    gates=4,
    kept=5,
    make_step=make_step,
    equation=equation,
    parameters=usual_parameters(projects=True),
    states=(State("h", "projected"), State("c")),
    fp32_precision="rnn",
    torch=TorchCounterpart(
        nn.LSTM,
        nn.LSTMCell,
        steps={"tanh": torch.lstm_cell},
        onnx=OnnxNode(
            "LSTM",
            gates=(0, 3, 1, 2),  # i, o, f, g
            int8_operator="com.microsoft::DynamicQuantizeLSTM",
        ),
        operator=torch.lstm,
        autocasts_only_products=frozenset({"packed", "projected"}),
    ),
)
