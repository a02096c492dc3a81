"""Trains all networks of an ensemble together, with `torch.func.vmap` over their stacked weights.

    python examples/ensemble.py

Each member learns to predict the next value of a noisy wave. `vmap` rejects `nn.RNN`, because
torch's operator has no batching rule, but runs the fused layer once for each member. The script
checks losses and gradients against a loop over the members, and prints the speed-up over the loop
on this machine. After training it prints the error of the mean prediction, which is smaller than
the average error of a member. It takes a few seconds.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Timer

from namernn_fast import FusedRNN, restore_rnn

MEMBERS, HIDDEN, STEPS, BATCH = 6, 24, 30, 32


class Forecaster(nn.Module):
    """Predicts the next value at each step of waves (STEPS, BATCH, 1)."""

    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(1, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def draw():
    """Returns noisy waves with random phases and frequencies, and the next value at each step."""
    start, speed = 6.3 * torch.rand(BATCH, 1), 0.2 + 0.5 * torch.rand(BATCH, 1)
    wave = torch.sin(start + speed * torch.arange(STEPS + 1.0)[:, None, None])
    wave += 0.1 * torch.randn_like(wave)
    return wave[:-1], wave[1:]


def errors(predictions, y):
    """Returns the mean squared error of each member's predictions (MEMBERS, STEPS, BATCH, 1)."""
    return (predictions - y).square().mean((-3, -2, -1))


def step_by_loop(members, x, y):
    """Returns each member's loss and the gradients of each parameter, computed in a loop."""
    losses, gradients = [], []
    for member in members:
        losses.append(errors(member(x), y))
        gradients.append(torch.autograd.grad(losses[-1], list(member.parameters())))
    return torch.stack(losses), [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def step_by_vmap(predict, stacked, x, y):
    """Returns the same as `step_by_loop`, computed for all members at once."""
    losses = errors(predict(stacked, x), y)
    return losses, torch.autograd.grad(losses.sum(), list(stacked.values()))


def main():
    """Compares vmap with a loop, and trains the ensemble."""
    torch.set_num_threads(1)  # more threads do not help in a model this small
    torch.manual_seed(0)
    members = [Forecaster() for _ in range(MEMBERS)]
    stacked, _ = stack_module_state(members)  # one tensor (MEMBERS, ...) for each parameter

    def predict(stacked, x):
        return vmap(lambda own: functional_call(members[0], own, x))(stacked)

    x, y = draw()
    by_loop, by_vmap = step_by_loop(members, x, y), step_by_vmap(predict, stacked, x, y)
    torch.testing.assert_close(by_vmap[0], by_loop[0])
    torch.testing.assert_close([*by_vmap[1]], by_loop[1])
    print(f"losses and gradients of {MEMBERS} members: vmap and a loop agree")
    plain = restore_rnn(nn.ModuleList(copy.deepcopy(members)))  # with torch.nn.RNN
    names = {**globals(), **locals()}
    steps = "loop(members, x, y)", "loop(plain, x, y)", "vmap(predict, stacked, x, y)"
    timers = [Timer(f"step_by_{step}", globals=names) for step in steps]
    rounds = [[timer.timeit(20).mean for timer in timers] for _ in range(7)]  # timers take turns
    loop, rnn_loop, mapped = map(min, zip(*rounds, strict=True))
    print(f"a step is {loop / mapped:.2f} times as fast as the loop on this machine")
    print(f"a step is {rnn_loop / mapped:.2f} times as fast as a loop over nn.RNN on this machine")

    optimizer = torch.optim.Adam(stacked.values(), lr=0.01)
    for _ in range(150):
        x, y = draw()
        _, gradients = step_by_vmap(predict, stacked, x, y)
        for parameter, gradient in zip(stacked.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.no_grad():
        x, y = draw()
        predictions = predict(stacked, x)
        print(f"error of a member, on average: {errors(predictions, y).mean():.4f}")
        print(f"error of the mean prediction: {errors(predictions.mean(0), y):.4f}")


if __name__ == "__main__":
    main()
