"""Trains torchrl's recurrent modules on many trajectories per sequence, in one call of a layer.

    python examples/torchrl_modules.py

A batch from a torchrl collector has several trajectories in each row, and `is_init` marks their
first steps. By default, `GRUModule` and `LSTMModule` pad each trajectory to the length of the
longest one. The modules below pack the trajectories instead, and call a fused layer once. They take
the arguments of torchrl's modules and return the same results, including the last states of every
trajectory.

The script checks that results and gradients are as accurate as torchrl's, and prints the speed-ups
of a training step on this machine. Install torchrl with `pip install "namernn_fast[examples]"`.
"""

try:
    from tensordict import TensorDict
    from tensordict.nn import dispatch
    from torchrl.modules import GRUModule, LSTMModule
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.benchmark import Timer

from namernn_fast import FusedGRU, FusedLSTM, replace_rnn
from namernn_fast.testing import assert_within_budget

BATCH, STEPS, TRAJECTORIES, FEATURES, HIDDEN = 32, 64, 3, 64, 128


class PackedTrajectories:
    """Changes a recurrent module of torchrl to run all trajectories of a batch in one call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        replace_rnn(self)

    @dispatch
    def forward(self, tensordict):
        """Runs the layer on each trajectory, from the state that is stored at its first step."""
        rnn = self.lstm if isinstance(self, LSTMModule) else self.gru
        is_ours = self.recurrent_backend == "pad" and isinstance(rnn, FusedGRU | FusedLSTM)
        if not (self.recurrent_mode and is_ours):
            return super().forward(tensordict)
        batch = tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict.flatten(0, -2)
        input, *states = (batch.get(key, None) for key in self.in_keys if key != "is_init")
        rows, is_live, ends = trajectories(batch["is_init"].squeeze(-1))
        order = rows[is_live]
        packed = PackedSequence(input.flatten(0, 1)[order], is_live.sum(1).cpu())
        hx = [
            s.flatten(0, 1)[rows[0]].transpose(0, 1).contiguous() for s in states if s is not None
        ]
        output, h_n = rnn(packed, tuple(hx) if len(hx) > 1 else hx[0] if hx else None)
        last = h_n if isinstance(h_n, tuple) else (h_n,)
        results = [(output.data, order), *((state.transpose(0, 1), ends) for state in last)]
        for key, (values, at) in zip(self.out_keys, results, strict=True):
            whole = values.new_zeros(batch.numel(), *values.shape[1:]).index_copy(0, at, values)
            tensordict.set(key, whole.view(*tensordict.shape, *values.shape[1:]))
        return tensordict


def trajectories(is_init):
    """Finds the trajectories in a batch. Rows count its steps, as in `is_init.flatten()`.

    Returns:
        The rows of the steps of each trajectory, (steps, trajectories), from the longest trajectory
        to the shortest; a mask of the steps that the trajectory has; and the row of its last step.
    """
    starts = is_init.clone()
    starts[:, 0] = True
    starts = starts.flatten().nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([is_init.numel()])])
    lengths, order = (ends - starts).sort(descending=True, stable=True)
    steps = torch.arange(int(lengths[0]), device=is_init.device).unsqueeze(1)
    return starts[order] + steps, steps < lengths, ends[order] - 1


class FusedGRUModule(PackedTrajectories, GRUModule):
    """torchrl's GRUModule on a fused layer."""


class FusedLSTMModule(PackedTrajectories, LSTMModule):
    """torchrl's LSTMModule on a fused layer."""


def batch_of(module, dtype=torch.float32):
    """Returns a batch of observations, `is_init` and stored states."""
    torch.manual_seed(1)
    is_init = torch.zeros(BATCH, STEPS, 1, dtype=torch.bool)
    for row in is_init:
        row[0] = row[1 + torch.randperm(STEPS - 1)[: TRAJECTORIES - 1]] = True
    draws = {key: torch.randn(BATCH, STEPS, 1, HIDDEN) for key in module.in_keys[1:-1]}
    draws["observation"] = torch.randn(BATCH, STEPS, FEATURES)
    draws = {key: values.to(dtype) for key, values in draws.items()}
    return TensorDict({"is_init": is_init, **draws}, [BATCH, STEPS])


def make(cls, dtype=torch.float32):
    """Returns a module with weights that depend only on its sizes."""
    torch.manual_seed(0)
    keys = {"in_key": "observation", "out_key": "features"}
    return cls(FEATURES, HIDDEN, **keys, default_recurrent_mode=True).to(dtype)


def learn(module, batch):
    """Runs forward and backward. Returns the results and the gradients."""
    module.zero_grad()
    results = module(batch)
    results["features"].square().mean().backward()
    named = {key[-1]: results[key].detach() for key in module.out_keys[1:]}
    named["features"] = results["features"].detach()
    return named | {name: p.grad for name, p in module.named_parameters()}


def main():
    """Compares both modules with torchrl's."""
    for theirs, ours in ((GRUModule, FusedGRUModule), (LSTMModule, FusedLSTMModule)):
        modules = make(theirs), make(ours)
        batch = batch_of(modules[0])
        exact = make(theirs, torch.float64)
        expected, found = (learn(module, batch.clone()) for module in modules)
        assert_within_budget(found, expected, learn(exact, batch_of(exact, torch.float64)))
        timers = [
            Timer("learn(m, b)", globals={"learn": learn, "m": m, "b": batch}) for m in modules
        ]
        times = [[timer.timeit(1).mean for timer in timers] for _ in range(20)]
        slow, fast = map(min, zip(*times, strict=True))
        print(
            f"{ours.__name__}: results and gradients are within the error budget of "
            f"{theirs.__name__}; a training step is {slow / fast:.2f} times as fast on this machine"
        )


if __name__ == "__main__":
    main()
