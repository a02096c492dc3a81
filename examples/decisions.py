"""Trains a leaky network on a task of NeuroGym, as computational neuroscience models decisions.

    python examples/decisions.py

In each trial a network sees noisy evidence for one of two choices for two seconds, and then has to
choose. Its units are noisy and leaky, with a time constant of 100 ms. The script checks that the
layer is as accurate as the loop over steps in typical research code. It prints how much faster the
layer trains on this machine, and the accuracy of the choices before and after training. It takes
half a minute. Install NeuroGym 2.3 with `pip install neurogym` in a separate environment, because
this installs older versions of some packages than other examples need.
"""

import copy

try:
    import neurogym
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed; run: pip install neurogym") from error

import torch
from torch import nn
from torch.utils.benchmark import Timer

from namernn_fast import FusedLeakyRNN
from namernn_fast.testing import assert_within_budget

TRIALS, HIDDEN, DT, TAU = 16, 100, 20, 100  # trials at a time, units, milliseconds
NOISE = 0.05


class Network(nn.Module):
    """Maps observations (steps, trials, 3) to the scores (steps, trials, 3) of 3 actions."""

    def __init__(self):
        super().__init__()
        self.rnn = FusedLeakyRNN(3, HIDDEN, nonlinearity="relu", rate=DT / TAU)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, observations, noise):
        return self.head(self.rnn(observations, noise=noise)[0])


class LoopNetwork(Network):
    """Computes the same as `Network`, with a Python loop over the steps."""

    def forward(self, observations, noise):
        rnn, outputs = self.rnn, []
        r = v = observations.new_zeros(observations.shape[1], HIDDEN)
        for x_t, noise_t in zip(observations, noise, strict=True):
            drive = x_t @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + r @ rnn.weight_hh_l0.T
            v = (1 - DT / TAU) * v + DT / TAU * (drive + rnn.bias_hh_l0) + noise_t
            r = torch.relu(v)
            outputs.append(r)
        return self.head(torch.stack(outputs))


def trials(task):
    """Returns the observations, correct actions and unit noise of TRIALS trials."""
    observations, actions = [], []
    for _ in range(TRIALS):
        task.new_trial()
        observations.append(torch.from_numpy(task.ob).float())
        actions.append(torch.from_numpy(task.gt).long())
    observations = torch.stack(observations, 1)
    noise = (2 * DT / TAU) ** 0.5 * NOISE * torch.randn(len(observations), TRIALS, HIDDEN)
    return observations, torch.stack(actions, 1), noise


def learn(network, observations, actions, noise):
    """Runs both passes, and returns the scores and all gradients, flattened into one vector."""
    network.zero_grad()
    scores = network(observations, noise)
    weight = torch.tensor([0.05, 1, 1], dtype=scores.dtype)  # most steps ask for "no choice"
    nn.functional.cross_entropy(scores.flatten(0, 1), actions.flatten(), weight).backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return {"scores": scores.detach(), "gradients": torch.cat(gradients)}


def share_of_right_choices(network, task):
    """Returns the fraction of 400 trials in which the last action is correct."""
    with torch.no_grad():
        right = []
        for _ in range(400 // TRIALS):
            observations, actions, noise = trials(task)
            right.append(network(observations, noise)[-1].argmax(-1) == actions[-1])
    return torch.cat(right).double().mean()


def main():
    """Compares the layer with the loop, and trains the network."""
    torch.set_num_threads(1)  # more threads help little in a model this small
    torch.manual_seed(0)
    task = neurogym.make("PerceptualDecisionMaking-v0", dt=DT).unwrapped
    task.seed(0)
    network, loop = Network(), LoopNetwork()
    loop.load_state_dict(network.state_dict())
    batch = observations, actions, noise = trials(task)
    precise = learn(copy.deepcopy(loop).double(), observations.double(), actions, noise.double())
    assert_within_budget(learn(network, *batch), learn(loop, *batch), precise)
    print(f"{' and '.join(precise)} are within the error budget of the loop")
    timers = [
        Timer("learn(model, *batch)", globals={"model": model, "batch": batch, "learn": learn})
        for model in (loop, network)
    ]
    rounds = [[timer.timeit(5).mean for timer in timers] for _ in range(7)]  # timers take turns
    slow, fast = map(min, zip(*rounds, strict=True))
    print(f"learning from {TRIALS} trials of {len(observations)} steps is {slow / fast:.2f} times")
    print("as fast as the loop on this machine")

    print(f"right choices before training: {share_of_right_choices(network, task):.0%}")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.002)
    for _ in range(400):
        learn(network, *trials(task))
        optimizer.step()
    print(f"right choices after training: {share_of_right_choices(network, task):.0%}")


if __name__ == "__main__":
    main()
