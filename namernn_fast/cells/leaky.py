"""The leaky integrator, with which computational neuroscience models networks of neurons.

Each step computes::

    v_t = (1 - a) * v_{t-1} + a * (W_ih x_t + b_ih + W_hh r_{t-1} + b_hh) + noise_t
    r_t = act(v_t),  where act is tanh, relu, sigmoid or softplus, and a = sigmoid(rate)

The output is r. See H. F. Song, G. R. Yang, X.-J. Wang: Training Excitatory-Inhibitory Recurrent
Neural Networks for Cognitive Tasks, PLoS Computational Biology 12(2), 2016.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .cell import Cell, LayerWeights, Step

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda v: torch.logaddexp(v, torch.zeros_like(v)),  # F.softplus is linear from 20
}


def make_step(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step that computes r_t and v_t.

    The step's inputs are W_ih x_t + b_ih + b_hh, followed by the noise if there is any, and the
    previous states, r_{t-1} and v_{t-1}.
    """
    assert weights.rate is not None
    weight_hh, a, act = weights.weight_hh.t(), weights.rate.sigmoid(), ACTIVATIONS[nonlinearity]

    def step(x: Tensor, states: Tensor) -> Tensor:
        r, v = states.chunk(2, 1)
        x, *noise = x.split(len(a), 1)
        v = (1 - a) * v + a * torch.addmm(x, r, weight_hh)
        if noise:
            v = v + noise[0]
        return torch.cat([act(v), v], 1)

    return step


LEAKY = Cell(
    name="leaky",
    number=3,
    layer="FusedLeakyRNN",
    weight_blocks=1,
    kept_blocks=2,
    make_step=make_step,
    states=("h", "v"),
    nonlinearities=(*ACTIVATIONS,),
    has_rate=True,
)
