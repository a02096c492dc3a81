"""Times a training epoch of the surname classifier as a user runs it, with batches and Adam."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.grid import BASELINE, EPOCH_WORKLOADS, FUSED, ROLES, Workload
from benchmarks.names.data import names
from namernn_fast import FusedRNN
from namernn_fast.bench.race import TimedCall
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


def classifier(workload: Workload, rnn_class: type[nn.RNN]) -> NameClassifier:
    """Returns a classifier of the workload's sizes, with the same weights for either class."""
    torch.manual_seed(0)
    return NameClassifier(
        len(names().languages), workload.input_size, workload.hidden_size, rnn_class=rnn_class
    )


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


@pytest.fixture(scope="module")
def calls(workload: Workload) -> dict[str, TimedCall]:
    train = split(names(), folding=ASCII).train
    build = partial(classifier, workload)
    models = {BASELINE: build(nn.RNN), FUSED: build(FusedRNN)}
    # Weights diverge once the optimizer divides by tiny gradients, so the gate checks only one
    # batch.
    first = next(iter(batches(train, torch.arange(len(train)), workload.batch)))
    oracle = look(build(nn.RNN).double(), first)
    assert_within_budget(look(models[FUSED], first), look(models[BASELINE], first), oracle)
    return {name: epoch(model, train, workload.batch) for name, model in models.items()}


@pytest.mark.parametrize("workload", EPOCH_WORKLOADS, ids=str, scope="module")
@pytest.mark.parametrize("role", ROLES)
def test_epoch(workload: Workload, role: str, publish: Callable[[Workload, str], None]) -> None:
    publish(workload, role)
