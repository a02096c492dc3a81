"""Cells that are written as equations, for tests.

Each of `TWINS` has the equation of a cell of the package. `MORE` have what only equations have.
"""

import torch

from namernn_fast import recurrent_cell
from namernn_fast.nn.layer_norm_gru import layer_norm_gru
from namernn_fast.nn.layer_norm_lstm import layer_norm_lstm
from namernn_fast.nn.slstm import slstm_cell


@recurrent_cell(gates=1)
def rnn_equation(x, u, h):
    return torch.tanh(x[0] + u[0])


@recurrent_cell(gates=3)
def gru_equation(x, u, h):
    r, z = torch.sigmoid(x[0] + u[0]), torch.sigmoid(x[1] + u[1])
    n = torch.tanh(x[2] + r * u[2])
    return n + z * (h - n)


@recurrent_cell(gates=4, states=2)
def lstm_equation(x, u, h, c):
    i, f, o = (torch.sigmoid(x[k] + u[k]) for k in (0, 1, 3))
    c = f * c + i * torch.tanh(x[2] + u[2])
    return o * torch.tanh(c), c


@recurrent_cell(gates=1, states=2, parameters={"rate": 0.5}, inputs=["noise"])
def leaky_equation(x, u, r, v, rate, noise):
    a = torch.sigmoid(rate)
    v = (1 - a) * v + a * (x[0] + u[0]) + noise
    return torch.tanh(v), v


TWINS = {
    "rnn_equation": (rnn_equation, "rnn"),
    "gru_equation": (gru_equation, "gru"),
    "lstm_equation": (lstm_equation, "lstm"),
    "leaky_equation": (leaky_equation, "leaky"),
}
"""Each cell, and the name of the cell of the package with the same equation."""


@recurrent_cell(
    gates=2,
    states=4,
    heads=True,
    parameters={"rate": 0.3},
    gate_parameters={"shift": 0.1},
    inputs=["drive"],
    number_inputs=["attention"],
)
def everything(x, u, h, c, n, m, rate, shift, drive, attention):
    """The equation of the cell `with_means` of `tested_cells`."""
    z = torch.cat([x[0] + u[0], x[1] + u[1]], -1)
    z_i, z_g = (z - z.mean(-1, keepdim=True)).chunk(2, -1)
    i, g = torch.sigmoid(z_i + shift[0]), torch.tanh(z_g + shift[1])
    c = i * c + (1 - i) * g * 0.5
    n = (n + i) * 0.5
    m = g * m + h * 0.5 + drive
    mean = (0.0625 - c).mean(-1, keepdim=True)
    return torch.tanh(c + mean + (torch.sigmoid(rate) * m + attention) * n), c, n, m


@recurrent_cell(gates=2, states=2, weight_hh=False)
def independent_equation(x, h, c):
    c = torch.sigmoid(x[0]) * c + x[1]
    return torch.tanh(c), c


# A large eps keeps the gradients of a row with equal values finite in 16 bits.
NAMED = layer_norm_lstm(eps=0.01), layer_norm_gru(eps=0.01), slstm_cell()
"""Cells of the package that are equations."""
MORE = {cell.__name__: cell for cell in (everything, independent_equation, *NAMED)}
