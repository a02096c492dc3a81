"""The leaky integrator, which computational neuroscience uses to model networks of neurons.

Each step computes::

    v_t = (1 - a) * v_{t-1} + a * (W_ih x_t + b_ih + W_hh r_{t-1} + b_hh) + noise_t
    r_t = act(v_t),  where act is tanh, relu, sigmoid or softplus, and a = sigmoid(rate)

The output is r. See H. F. Song, G. R. Yang, X.-J. Wang: Training Excitatory-Inhibitory Recurrent
Neural Networks for Cognitive Tasks, PLoS Computational Biology 12(2), 2016.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Input, LayerWeights, Parameter, State, Step, usual_parameters

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda v: torch.logaddexp(v, torch.zeros_like(v)),  # F.softplus is linear above 20
}


def make_step(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step that computes r_t and v_t.

    The step takes two tensors: W_ih x_t + b_ih + b_hh, followed by the noise if there is any; and
    the previous states, r_{t-1} followed by v_{t-1}.
    """
    weight_hh, a = weights["weight_hh"].t(), weights["rate"].sigmoid()
    act = ACTIVATIONS[nonlinearity]

    def step(x: Tensor, states: Tensor) -> Tensor:
        r, v = states.chunk(2, 1)
        x, *noise = x.split(len(a), 1)
        v = (1 - a) * v + a * torch.addmm(x, r, weight_hh)
        if noise:
            v = v + noise[0]
        return torch.cat([act(v), v], 1)

    return step


LARGEST_LOGIT = 40.0
"""A finite logit whose sigmoid is 1 in every dtype."""


def logits_of(rate: Any, hidden_size: int) -> Tensor:
    """Returns the logits of the rates, (hidden_size), in float64.

    Args:
        rate: a number, or (hidden_size) numbers, above 0 and at most 1.
        hidden_size: the number of units.

    Raises:
        ValueError: rate has another shape, or is out of range.
    """
    given = torch.as_tensor(rate, dtype=torch.float64, device="cpu")
    if given.shape not in ((), (hidden_size,)):
        raise ValueError(
            f"rate must be one number or {hidden_size} numbers, one per unit, got shape "
            f"{tuple(given.shape)}"
        )
    if (wrong := given[~((given > 0) & (given <= 1))]).numel():
        raise ValueError(f"rate must be above 0 and at most 1, got {wrong[0]:g}")
    return given.logit().clamp(max=LARGEST_LOGIT).expand(hidden_size)


def equation(nonlinearity: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the step of programs."""
    act = ACTIVATIONS[nonlinearity]

    def step(
        x: Sequence[Tensor], u: Sequence[Tensor], r: Tensor, v: Tensor, rate: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        a = torch.sigmoid(rate)
        v = (1 - a) * v + a * (x[0] + u[0]) + noise
        return act(v), v

    return step


LEAKY = Cell(
    name="leaky",
    number=3,
    layer="FusedLeakyRNN",
    gates=1,
    kept=2,
    make_step=make_step,
    equation=equation,
    parameters=usual_parameters(Parameter("rate", ("hidden",), init=logits_of)),
    inputs=(Input("noise"),),
    states=(State("h", "projected"), State("v")),
    nonlinearities=(*ACTIVATIONS,),
)
