"""Trains RecurrentPPO of sb3-contrib without a Python loop over the steps of a sequence.

    python examples/recurrent_ppo.py

`nn.LSTM` cannot reset its states inside a sequence. So if an episode starts inside a minibatch,
which is nearly always the case, sb3-contrib calls `nn.LSTM` once per step. The policy below
overrides that method: it calls a layer once for all steps, with `reset=`. Roll-outs call it for one
step at a time, with layers that are prepared before each roll-out. The environment is CartPole
without velocities, where only a policy with memory can balance the pole for long.

The script checks that the results and gradients of the first minibatch are as accurate as with the
loop. It prints the speed-ups of a pass over the minibatch, of a roll-out and of a whole update on
this machine. Then it trains both policies from the same seed, and prints their losses and rewards.
It takes about a minute. Install sb3-contrib with `pip install "namernn_fast[examples]"`.
"""

try:
    import gymnasium
    from gymnasium.wrappers import TransformObservation
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

from namernn_fast import replace_rnn
from namernn_fast.testing import assert_within_budget

ENVIRONMENTS, STEPS, MINIBATCH, UPDATES = 8, 128, 256, 4


class FusedPolicy(RecurrentActorCriticPolicy):
    """The policy of RecurrentPPO, with LSTMs that reset their states when an episode starts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        replace_rnn(self)
        self.prepared = {}  # a plain dictionary, so that these copies are not in the state_dict

    def set_training_mode(self, mode):
        """Prepares the layers for roll-outs and predictions, which call this first."""
        super().set_training_mode(mode)
        if not mode:
            for layer in filter(None, (self.lstm_actor, self.lstm_critic)):
                if layer in self.prepared:
                    self.prepared[layer].refresh(layer)
                else:
                    self.prepared[layer] = layer.prepare()

    def _process_sequence(self, features, lstm_states, episode_starts, lstm):
        if not torch.is_grad_enabled():
            lstm = self.prepared.get(lstm, lstm)
        sequences = lstm_states[0].shape[1]
        time_major = features.view(sequences, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.view(sequences, -1).T.bool()
        output, lstm_states = lstm(time_major, lstm_states, reset=starts)
        return output.transpose(0, 1).flatten(end_dim=1), lstm_states


def cart_pole():
    """Returns a CartPole whose observations have the positions, but not the velocities."""
    environment = gymnasium.make("CartPole-v1")
    positions = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return TransformObservation(environment, lambda observation: observation[::2], positions)


def agent(policy, learning_rate):
    """Returns an agent whose initial weights depend only on the seed."""
    environments = make_vec_env(cart_pole, ENVIRONMENTS, seed=0)
    sizes = {"n_steps": STEPS, "batch_size": MINIBATCH}
    return RecurrentPPO(policy, environments, learning_rate, **sizes, seed=0, device="cpu")


class Record(BaseCallback):
    """Records the mean episode reward before each update, and the last loss of the update."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        losses = self.logger.name_to_value
        if "train/loss" in losses:
            rewards = [episode["r"] for episode in self.model.ep_info_buffer]
            self.updates.append((np.mean(rewards), losses["train/loss"]))

    _on_training_end = _on_rollout_start


def learn(policy, batch, dtype=torch.float32):
    """Returns the policy's results for a minibatch, and all gradients as one vector."""
    policy.zero_grad()
    states = tree_map(lambda state: state.to(dtype), batch.lstm_states)
    values, log_probabilities, entropy = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten(), states, batch.episode_starts
    )
    values = values.flatten()
    losses = 0.5 * (batch.returns - values) ** 2 - batch.advantages * log_probabilities
    (losses * batch.mask).mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    results = {"values": values, "log-probabilities": log_probabilities, "entropy": entropy}
    return {name: result.detach() for name, result in results.items()} | {"gradients": gradients}


def pass_over(policy, batch):
    """Runs the actor's LSTM over the sequences of a minibatch, forward and backward."""
    arguments = batch.observations, batch.lstm_states.pi, batch.episode_starts, policy.lstm_actor
    policy._process_sequence(*arguments)[0].sum().backward()


def roll_out(agent):
    """Collects a rollout."""
    agent.rollout_buffer.reset()
    _, callback = agent._setup_learn(10**9, reset_num_timesteps=False)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, STEPS)


def fewest_seconds(run, agents, rounds):
    """Returns the shortest time of `run(agent)` for each agent; the agents take turns."""
    timers = [Timer("run(agent)", globals={"run": run, "agent": each}) for each in agents]
    times = [[timer.timeit(1).mean for timer in timers] for _ in range(rounds)]
    return map(min, zip(*times, strict=True))


def main():
    """Compares both policies, and trains them."""
    # With a learning rate of zero, updates leave the weights unchanged.
    loop, fused = agents = [agent(policy, 0.0) for policy in ("MlpLstmPolicy", FusedPolicy)]
    for each in agents:
        each.learn(1)  # collects a rollout
    batch = next(loop.rollout_buffer.get(MINIBATCH))
    precise = agent("MlpLstmPolicy", 0.0).policy.double()
    precise.features_extractor.register_forward_hook(lambda _, __, features: features.double())
    exact = learn(precise, batch, torch.float64)
    assert_within_budget(learn(fused.policy, batch), learn(loop.policy, batch), exact)
    sequences = batch.lstm_states.pi[0].shape[1]
    print(f"a minibatch: {sequences} sequences of up to {len(batch.mask) // sequences} steps")
    print(f"{', '.join(exact)}: within the error budget of the loop")
    slow, fast = fewest_seconds(lambda each: pass_over(each.policy, batch), agents, 50)
    print(
        f"a pass over its sequences is {slow / fast:.2f} times as fast as the loop on this machine"
    )
    slow, fast = fewest_seconds(roll_out, agents, 3)
    print(f"a roll-out is {slow / fast:.2f} times as fast")
    slow, fast = fewest_seconds(RecurrentPPO.train, agents, 3)
    print(
        f"an update takes {fast:.2f} s, with the loop {slow:.2f} s: {slow / fast:.2f} times as fast"
    )

    records = []
    for policy in ("MlpLstmPolicy", FusedPolicy):
        records.append(Record())
        agent(policy, 1e-3).learn(UPDATES * STEPS * ENVIRONMENTS, callback=records[-1])
    for number, ((reward, loss), (own_reward, own_loss)) in enumerate(
        zip(*(record.updates for record in records), strict=True), 1
    ):
        print(
            f"update {number:2}: loss {own_loss:8.4f}, loop {loss:8.4f}; "
            f"reward {own_reward:5.1f}, loop {reward:5.1f}"
        )


if __name__ == "__main__":
    main()
