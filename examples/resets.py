"""Trains a recurrent policy on rollouts that contain several episodes, with gymnasium.

    python examples/resets.py

The environment shows a cue at the first step of an episode and asks for it some steps later. So a
policy needs a memory, which must be cleared when the next episode starts. A rollout runs several
environments for a fixed number of steps, and `reset=` marks the steps where an episode starts. The
script checks that one call for a rollout is as accurate as a loop over its steps with `nn.RNN`. It
prints the speed-up of the call on this machine, and the mean reward of an episode before and after
training. It takes a few seconds. Install gymnasium with `pip install "namernn_fast[examples]"`.
"""

import copy
import itertools

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, SyncVectorEnv
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical
from torch.utils.benchmark import Timer

from namernn_fast import FusedRNN, restore_rnn
from namernn_fast.testing import assert_within_budget

ENVIRONMENTS, STEPS, HIDDEN = 32, 32, 32


class Recall(gymnasium.Env):
    """Shows a cue of -1 or 1, then 0 for some steps, then rewards the answer with 1 or -1."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)  # the cue, 1 if asked
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = self.np_random.integers(2), self.np_random.integers(2, 8)
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        asked = self.left == 0
        reward = (1.0 if action == self.cue else -1.0) if asked else 0.0
        self.left -= 1
        return np.array([0, self.left == 0], np.float32), reward, bool(asked), False, {}


class Policy(nn.Module):
    """Maps observations (steps, ENVIRONMENTS, 2) to distributions of actions, and a new state."""

    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(2, HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, observations, begins, hx):
        output, h_n = self.rnn(observations, hx, reset=begins)
        return Categorical(logits=self.head(output)), h_n


class LoopPolicy(Policy):
    """Computes the same as `Policy`, with a loop over steps, because `nn.RNN` has no resets."""

    def forward(self, observations, begins, hx):
        outputs = []
        for observation, begin in zip(observations, begins, strict=True):
            hx = hx.masked_fill(begin[:, None], 0)
            output, hx = self.rnn(observation[None], hx)
            outputs.append(output)
        return Categorical(logits=self.head(torch.cat(outputs))), hx


def rollouts(policy):
    """Yields each rollout's first state, observations, episode starts, actions and rewards."""
    environments = SyncVectorEnv([Recall] * ENVIRONMENTS, autoreset_mode=AutoresetMode.SAME_STEP)
    observation, _ = environments.reset(seed=0)
    begins, hx = np.ones(ENVIRONMENTS, bool), torch.zeros(1, ENVIRONMENTS, HIDDEN)
    while True:
        first, steps = hx, []
        for _ in range(STEPS):
            seen = torch.from_numpy(observation), torch.from_numpy(begins)
            with torch.no_grad():
                distribution, hx = policy(seen[0][None], seen[1][None], hx)
            action = distribution.sample()[0]
            # With autoreset, the observation after the last step of an episode starts the next one.
            observation, reward, begins, _, _ = environments.step(action.numpy())
            steps.append((*seen, action, torch.tensor(reward)))
        yield first, *map(torch.stack, zip(*steps, strict=True))


def learn(policy, hx, observations, begins, actions, rewards):
    """Returns a rollout's log-probabilities, and its REINFORCE gradients as one vector."""
    policy.zero_grad()
    distribution, _ = policy(observations.to(hx.dtype), begins, hx)
    log_probabilities = distribution.log_prob(actions)
    # Each reward belongs to the action of the same step, so nothing is discounted.
    (-(log_probabilities * rewards.to(hx.dtype)).mean()).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    return {"log-probabilities": log_probabilities.detach(), "gradients": gradients}


def main():
    """Compares the policy with the loop, and trains it."""
    torch.set_num_threads(1)  # more threads do not help in a model this small
    torch.manual_seed(0)
    policy, loop = Policy(), LoopPolicy()
    loop.load_state_dict(policy.state_dict())
    restore_rnn(loop)  # replaces the fused layer with torch.nn.RNN
    experience = rollouts(policy)
    next(experience)
    hx, *rest = rollout = next(experience)  # starts in the middle of episodes
    precise = learn(copy.deepcopy(loop).double(), hx.double(), *rest)
    assert_within_budget(learn(policy, *rollout), learn(loop, *rollout), precise)
    print(
        f"{int(rest[1].sum())} episodes begin in {ENVIRONMENTS} environments within {STEPS} steps"
    )
    print(f"{' and '.join(precise)} are within the error budget of the loop")
    timers = [
        Timer(
            "learn(model, *rollout)", globals={"model": model, "rollout": rollout, "learn": learn}
        )
        for model in (loop, policy)
    ]
    rounds = [[timer.timeit(20).mean for timer in timers] for _ in range(7)]  # timers take turns
    slow, fast = map(min, zip(*rounds, strict=True))
    print(f"learning from a rollout is {slow / fast:.2f} times as fast as the loop on this machine")

    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)
    earned = []
    for rollout in itertools.islice(experience, 100):
        learn(policy, *rollout)
        optimizer.step()
        rewards = rollout[-1]
        earned.append(rewards[rewards != 0].mean())  # one reward for each episode
    for when, part in (("at first", earned[:10]), ("at last", earned[-10:])):
        print(f"an episode earns {torch.stack(part).mean():+.2f} {when}")


if __name__ == "__main__":
    main()
