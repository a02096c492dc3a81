"""Swaps the fused layer into a model that was written with `torch.nn.RNN`.

    python examples/swap_in.py

`replace_rnn` only changes the class of every `nn.RNN` in a model. The script checks that outputs
and gradients are as accurate as with `nn.RNN`, and that each model loads the checkpoints of the
other. It prints how much faster the model is on this machine. It takes a few seconds.
"""

import copy

import torch
from torch import nn
from torch.utils.benchmark import Timer

from namernn_fast import replace_rnn
from namernn_fast.testing import assert_within_budget, max_error

VOCABULARY, TAGS, STEPS, BATCH = 200, 12, 32, 16


class Tagger(nn.Module):
    """Tags every token of a sentence. Any model with an `nn.RNN` works the same way."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.rnn = nn.RNN(64, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, TAGS)

    def forward(self, tokens):
        output, _ = self.rnn(self.embedding(tokens))
        return self.head(output)


def train_step(model, tokens, tags):
    """Runs both passes, and returns the scores and all gradients, flattened into one vector."""
    model.zero_grad()
    scores = model(tokens)
    nn.functional.cross_entropy(scores.flatten(0, 1), tags.flatten()).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {"scores": scores.detach(), "gradients": gradients}


def main():
    """Compares a model before and after the swap."""
    torch.manual_seed(0)
    before = Tagger()
    after = replace_rnn(copy.deepcopy(before))  # without the copy, `before` itself would change
    print(f"the layer was {type(before.rnn).__name__} and is {type(after.rnn).__name__}")

    tokens = torch.randint(VOCABULARY, (BATCH, STEPS))
    tags = torch.randint(TAGS, (BATCH, STEPS))
    ours, theirs = train_step(after, tokens, tags), train_step(before, tokens, tags)
    precise = train_step(copy.deepcopy(before).double(), tokens, tags)
    assert_within_budget(ours, theirs, precise)
    for name, exact in precise.items():
        errors = [max_error(results[name], exact) for results in (ours, theirs)]
        print("error of {}: {:.1e}, with nn.RNN {:.1e}; within budget".format(name, *errors))

    assert before.state_dict().keys() == after.state_dict().keys()
    for source, target in ((before, after), (after, before)):
        target.load_state_dict(source.state_dict())
    print(f"checkpoints: {len(after.state_dict())} tensors of equal names load both ways")

    for what, statement in (
        ("a forward pass", "with torch.no_grad(): model(tokens)"),
        ("a training step", "train_step(model, tokens, tags)"),
    ):
        names = {**globals(), **locals()}
        timers = [Timer(statement, globals={**names, "model": model}) for model in (before, after)]
        rounds = [[timer.timeit(5).mean for timer in timers] for _ in range(7)]  # timers take turns
        slow, fast = map(min, zip(*rounds, strict=True))
        print(f"{what} is {slow / fast:.2f} times as fast on this machine")


if __name__ == "__main__":
    main()
