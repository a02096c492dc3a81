"""Classifies sequences of different lengths, without packing them.

    python examples/lengths.py

The toy task is to recall the first symbol of a sequence of 2 to 20 symbols. The batches are padded
with NaN, to show that padding is never read. `last_state(..., lengths=...)` takes the padded batch,
with the sequences in any order. The script checks that results are as accurate as with `nn.RNN` and
`pack_padded_sequence`. It prints the accuracy after training, and the speed-up of a training step
on this machine. It takes a few seconds.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.benchmark import Timer

from namernn_fast import FusedRNN, restore_rnn
from namernn_fast.testing import assert_within_budget, max_error

SYMBOLS, HIDDEN, LONGEST = 4, 48, 20


class Classifier(nn.Module):
    """Reads one-hot symbols (batch, steps, SYMBOLS) and predicts the first one."""

    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(SYMBOLS, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, x, lengths):
        return self.head(self.rnn.last_state(x, lengths=lengths)[-1])


class PackedClassifier(Classifier):
    """Computes the same as `Classifier`, with `nn.RNN`, which needs a packed sequence."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, h_n = self.rnn(packed)
        return self.head(h_n[-1])


def draw(batch):
    """Returns padded sequences, their lengths in any order, and their first symbols."""
    symbols = torch.randint(SYMBOLS, (batch, LONGEST))
    lengths = torch.randint(2, LONGEST + 1, (batch,))
    x = nn.functional.one_hot(symbols, SYMBOLS).float()
    x[torch.arange(LONGEST) >= lengths[:, None]] = float("nan")
    return x, lengths, symbols[:, 0]


def train_step(model, x, lengths, first):
    """Runs both passes, and returns the scores and all gradients, flattened into one vector."""
    model.zero_grad()
    scores = model(x, lengths)
    nn.functional.cross_entropy(scores, first).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {"scores": scores.detach(), "gradients": gradients}


def main():
    """Compares the results with packing, trains the model, and measures the speed-up."""
    torch.set_num_threads(1)  # more threads do not help in a model this small
    torch.manual_seed(0)
    model = Classifier()
    packed = PackedClassifier()
    packed.load_state_dict(model.state_dict())
    restore_rnn(packed)  # replaces the fused layer with torch.nn.RNN

    x, lengths, first = batch = draw(256)
    ours, theirs = train_step(model, *batch), train_step(packed, *batch)
    precise = train_step(copy.deepcopy(packed).double(), x.double(), lengths, first)
    assert_within_budget(ours, theirs, precise)
    for name, exact in precise.items():
        errors = [max_error(results[name], exact) for results in (ours, theirs)]
        print("error of {}: {:.1e}, packed {:.1e}; within budget".format(name, *errors))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(600):
        train_step(model, *draw(128))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    x, lengths, first = draw(2000)
    with torch.no_grad():
        right = (model(x, lengths).argmax(1) == first).double().mean()
    print(f"accuracy of the first symbol after training: {right:.3f}, by chance {1 / SYMBOLS}")

    timers = [
        Timer("step(model, *batch)", globals={"step": train_step, "model": model, "batch": batch})
        for model in (packed, model)
    ]
    rounds = [[timer.timeit(20).mean for timer in timers] for _ in range(7)]  # timers take turns
    slow, fast = map(min, zip(*rounds, strict=True))
    print(f"a training step is {slow / fast:.2f} times as fast as packing on this machine")


if __name__ == "__main__":
    main()
