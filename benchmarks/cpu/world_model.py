"""The recurrent state-space model of Dreamer: a GRU with a norm, and a Gaussian posterior.

The posterior of a step is an input of the next step, so training loops over the steps. Sizes are
those of a small DreamerV3 (https://arxiv.org/abs/2301.04104): 16 sequences of 64 steps, 512 units.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.turns import Run
from namernn_fast import FusedLayerNormGRUCell

STEPS, BATCH, HIDDEN = 64, 16, 512
OBSERVED, ACTIONS, LATENT = 64, 6, 32
EPSILON = 1e-3
"""Added to the variance in every norm."""


class NormedGRUCell(nn.Module):
    """Dreamer's GRU in torch's operators, with a single matrix for x and h."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.sizes = input_size, hidden_size
        self.linear = nn.Linear(sum(self.sizes), 3 * hidden_size, bias=False)
        self.norm = nn.LayerNorm(3 * hidden_size, eps=EPSILON)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Runs one step."""
        sums = self.norm(self.linear(torch.cat([x, h], -1)))
        reset, candidate, update = sums.chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h


def step_module(cell: NormedGRUCell) -> FusedLayerNormGRUCell:
    """Returns a fused step module with the weights of a cell."""
    ours = FusedLayerNormGRUCell(*cell.sizes, bias=False, eps=EPSILON)
    weight_ih, weight_hh = cell.linear.weight.split(cell.sizes, 1)
    norms = {"gain": cell.norm.weight, "shift": cell.norm.bias}
    own = {name: values.view(3, -1) for name, values in norms.items()}
    ours.load_state_dict({"weight_ih": weight_ih, "weight_hh": weight_hh, **own})
    return ours


def mlp(inputs: int, outputs: int) -> nn.Module:
    """Returns a network with one hidden layer."""
    hidden = nn.Linear(inputs, HIDDEN, bias=False)
    norm = nn.LayerNorm(HIDDEN, eps=EPSILON)
    return nn.Sequential(hidden, norm, nn.SiLU(), nn.Linear(HIDDEN, outputs))


def gaussian(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of a latent state."""
    mean, deviation = parameters.chunk(2, -1)
    return mean, F.softplus(deviation) + 0.1


class WorldModel(nn.Module):
    """Predicts observations from latent states, which it infers step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(OBSERVED, HIDDEN)
        self.inputs = mlp(LATENT + ACTIONS, HIDDEN)
        self.cell: nn.Module = NormedGRUCell(HIDDEN, HIDDEN)
        self.posterior = mlp(2 * HIDDEN, 2 * LATENT)
        self.prior = mlp(HIDDEN, 2 * LATENT)
        self.decoder = mlp(HIDDEN + LATENT, OBSERVED)

    def forward(self, observed: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Returns the loss: the error of the reconstruction, and the posterior's divergence."""
        embedded = self.encoder(observed)
        h, z = observed.new_zeros(BATCH, HIDDEN), observed.new_zeros(BATCH, LATENT)
        states, latents, posteriors = list[Tensor](), list[Tensor](), list[Tensor]()
        unrolled: Any = getattr(self.cell, "unrolled", contextlib.nullcontext)
        with unrolled():
            for embedding, action, draw in zip(embedded, actions, noise, strict=True):
                h = self.cell(self.inputs(torch.cat([z, action], -1)), h)
                posteriors.append(self.posterior(torch.cat([h, embedding], -1)))
                mean, deviation = gaussian(posteriors[-1])
                z = mean + deviation * draw
                states.append(h)
                latents.append(z)
        h = torch.stack(states)
        mean, deviation = gaussian(torch.stack(posteriors))
        expected, scale = gaussian(self.prior(h))
        ratio = (deviation**2 + (mean - expected) ** 2) / (2 * scale**2)
        divergence = (torch.log(scale / deviation) + ratio - 0.5).sum(-1).mean()
        decoded = self.decoder(torch.cat([h, torch.stack(latents)], -1))
        return F.mse_loss(decoded, observed) + divergence


def world_model(is_fused: bool, dtype: torch.dtype = torch.float32) -> Run:
    """Returns a function that trains the model for a step and returns the loss."""
    torch.manual_seed(0)
    model = WorldModel()
    draws = [torch.randn(STEPS, BATCH, size).to(dtype) for size in (OBSERVED, ACTIONS, LATENT)]
    if is_fused:
        assert isinstance(model.cell, NormedGRUCell)
        model.cell = step_module(model.cell)
    model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(*draws)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
