"""The vanilla (Elman) cell.

As in `torch.nn.RNN`, each step computes::

    h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh),  where act is tanh or relu
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cell import Cell, LayerWeights, OnnxNode, Step, TorchCounterpart


def make_step(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step that computes h_t from x = W_ih x_t + b_ih + b_hh and h = h_{t-1}."""
    weight_hh = weights["weight_hh"].t()
    add_product = Tensor.addmm_ if in_place else Tensor.addmm
    # Activations run in place: addmm returns a new tensor, and addmm_ may overwrite the sum.
    act = torch.relu_ if nonlinearity == "relu" else torch.tanh_
    return lambda x, h: act(add_product(x, h, weight_hh))


def equation(nonlinearity: str) -> Callable[..., Tensor]:
    """Returns the step of programs."""
    act = torch.relu if nonlinearity == "relu" else torch.tanh
    return lambda x, u, h: act(x[0] + u[0])


VANILLA = Cell(
    name="rnn",
    number=0,
    layer="FusedRNN",
    gates=1,
    kept=0,
    make_step=make_step,
    equation=equation,
    nonlinearities=("tanh", "relu"),
    torch=TorchCounterpart(
        nn.RNN,
        nn.RNNCell,
        steps={"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell},
        onnx=OnnxNode("RNN", gates=(0,)),
    ),
)
