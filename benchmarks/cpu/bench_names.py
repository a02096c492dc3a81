"""One training epoch of the surname classifier, as `fit` has it: batches and steps of Adam."""

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.harness import gate
from benchmarks.harness.grid import BASELINE, EPOCH_CELLS, FUSED, LAYERS, Cell
from benchmarks.harness.race import Budget, Call
from benchmarks.harness.surnames import names
from namernn_fast import FusedRNN
from namernn_fast.names import LabelledNames, NameClassifier, batches, split, train_epoch


@pytest.fixture(scope="module")
def budget(budget: Budget) -> Budget:
    """An epoch is long, so its rounds are few for their noise: it gets more time than a layer."""
    return dataclasses.replace(budget, seconds=5 * budget.seconds)


def classifier(cell: Cell, rnn_class: type[nn.RNN]) -> NameClassifier:
    torch.manual_seed(0)
    return NameClassifier(
        len(names().languages), cell.input_size, cell.hidden_size, rnn_class=rnn_class
    )


def look(model: NameClassifier, batch: tuple[PackedSequence, Tensor]) -> dict[str, Tensor]:
    """The scores and gradients of one batch, before any step of the optimizer."""
    packed, labels = batch
    scores = model(packed)
    F.cross_entropy(scores, labels).backward()
    gradients = {f"grad {name}": value.grad for name, value in model.named_parameters()}
    return {"scores": scores.detach(), **gradients}


def epoch(model: NameClassifier, train: LabelledNames, batch_size: int) -> Call:
    """A call that trains for one epoch, and goes on where the last one ended."""
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return lambda: train_epoch(model, optimizer, batches(train, order, batch_size))


@pytest.fixture(scope="module")
def calls(cell: Cell) -> dict[str, Call]:
    train, _ = split(names())
    build = partial(classifier, cell)
    models = {BASELINE: build(nn.RNN), FUSED: build(FusedRNN)}
    # Weights drift apart once the optimizer divides by tiny gradients, so the gate is at the first.
    first = next(iter(batches(train, torch.arange(len(train)), cell.batch)))
    oracle = look(build(nn.RNN).double(), first)
    gate.check(look(models[FUSED], first), look(models[BASELINE], first), oracle)
    return {name: epoch(model, train, cell.batch) for name, model in models.items()}


@pytest.mark.parametrize("cell", EPOCH_CELLS, ids=str, scope="module")
@pytest.mark.parametrize("layer", LAYERS)
def test_epoch(cell: Cell, layer: str, publish: Callable[[Cell, str], None]) -> None:
    publish(cell, layer)
