"""Trains the surname classifier for an epoch as a user would, in batches with Adam."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.grid import Workload
from benchmarks.names.data import names
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.timed_calls import CLASSES
from namernn_fast.names import (
    ASCII,
    Batch,
    LabelledNames,
    NameClassifier,
    Recipe,
    batches,
    split,
    train_epoch,
)
from namernn_fast.testing import assert_within_budget


def look(model: NameClassifier, batch: Batch) -> dict[str, Tensor]:
    """Returns the scores and gradients of one batch, before any optimizer step."""
    scores = model(batch.names)
    F.cross_entropy(scores, batch.targets).backward()
    gradients = {f"grad {name}": value.grad for name, value in model.named_parameters()}
    return {"scores": scores.detach(), **gradients}


def epoch(model: NameClassifier, train: LabelledNames, batch_size: int) -> TimedCall:
    """Returns a call that trains for one epoch, starting where the previous call ended."""
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return lambda: train_epoch(model, optimizer, batches(train, order, batch_size), Recipe())


def calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns an epoch with torch's layer and one with the fused layer, from equal weights.

    Weights diverge once the optimizer divides by tiny gradients, so the gate checks only one batch.
    """
    train = split(names(), folding=ASCII).train

    def build(layer: type) -> NameClassifier:
        torch.manual_seed(0)
        sizes = len(names().languages), workload.input_size, workload.hidden_size
        return NameClassifier(*sizes, rnn_class=layer)

    baseline, fused = CLASSES[workload.cell]
    models = dict(zip(workload.layers, map(build, (baseline, fused)), strict=True))
    first = next(iter(batches(train, torch.arange(len(train)), workload.batch)))
    oracle = look(build(baseline).double(), first)
    theirs, ours = (look(model, first) for model in models.values())
    assert_within_budget(ours, theirs, oracle)
    return {name: epoch(model, train, workload.batch) for name, model in models.items()}
