"""The steps of training: batches, one step, one epoch, and validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim.lr_scheduler import LRScheduler

from .prediction import logits
from .recipes import Recipe
from .splitting import LabelledNames

# Maximum number of logits that an epoch collects before it computes their losses in one call.
_KEPT_NUMBERS = 1_000_000


class Batch(NamedTuple):
    """The names of one step, or the subset of them that one process trains on."""

    names: PackedSequence
    """Character ids, packed."""
    targets: Tensor
    """int64 (batch), the index of each name's language; or float (batch, languages), the
    probabilities of the languages."""
    weight: float = 1.0
    """The weight of this batch's mean loss in the mean over all processes."""


def batches(
    data: LabelledNames,
    order: Tensor,
    batch_size: int,
    device: str | torch.device = "cpu",
    *,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Yields the batches of one epoch, or the subset of each batch for process `rank`.

    Within a batch, names and targets are sorted from the longest name to the shortest, so that the
    packed batch needs no reordering.

    Args:
        data: the names.
        order: int64 (number of names), the indices of the names in the order of the batches.
        batch_size: the number of names per batch over all processes; the last batch may have fewer.
        device: where to put the results.
        rank: the rank of this process.
        processes: the number of processes.
    """
    order = data.names.by_length(order, batch_size)
    counts = [len(indices) for indices in order.split(batch_size)]
    share, size = order, batch_size
    if processes > 1:
        # A process with no names in a batch must still run the step, on a dummy name with weight 0.
        share = torch.cat(
            [
                indices[rank::processes] if rank < len(indices) else indices[:1]
                for indices in order.split(batch_size)
            ]
        )
        size = max(len(range(rank, batch_size, processes)), 1)
    targets = data.labels[share].to(device).split(size)
    packed = data.names.pack_each(share, size, device)
    for names, labels, count in zip(packed, targets, counts, strict=True):
        weight = len(range(rank, count, processes)) * processes / count
        yield Batch(names, labels, weight)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Takes one step of the optimizer on the mean cross-entropy of a batch.

    Args:
        model: the classifier.
        optimizer: the optimizer of the model's parameters.
        batch: the names to train on.
        recipe: the recipe, which sets the label smoothing and the clipping.

    Returns:
        The loss before the step, and the number of names whose language was predicted correctly:
        detached scalars on the model's device, so that the caller decides when to synchronize with
        the device.
    """
    scores = _step(model, optimizer, batch, recipe)
    loss = F.cross_entropy(scores, batch.targets, label_smoothing=recipe.label_smoothing)
    return loss, _hits(scores, batch.targets)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe
) -> Tensor:
    """Takes the step of `train_step`; returns the logits before the step, (batch, languages).

    The logits are detached. The caller computes the loss: `train_epoch` computes the losses of many
    steps in one call, because the overhead of operators matters in small batches.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for parameter in parameters:
        parameter.grad = None
    scores: Tensor = model(batch.names)
    logits = scores.detach()
    scores.backward(_loss_gradient(logits, batch, recipe.label_smoothing))
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    optimizer.step()
    return logits


def _loss_gradient(scores: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Returns the gradient of a batch's loss with respect to its logits, (batch, languages).

    The loss is the mean cross-entropy times the weight of the batch. Its gradient is proportional
    to the predicted distribution minus the smoothed targets; autograd would need about twenty
    operators to compute the gradient.
    """
    names, languages = scores.shape
    gradient = scores.softmax(1).sub_(smoothing / languages)
    if batch.targets.ndim == 1:
        shares = scores.new_full((names, 1), smoothing - 1)
        gradient.scatter_add_(1, batch.targets.unsqueeze(1), shares)
    else:
        gradient.sub_(batch.targets, alpha=1 - smoothing)
    return gradient.mul_(batch.weight / names)


def _hits(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns the number of correct predictions; the most probable target counts as the label."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (scores.argmax(1) == labels).sum()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Batch],
    recipe: Recipe,
    scheduler: LRScheduler | None = None,
) -> tuple[float, float]:
    """Takes a step on each batch, and returns the mean loss and the accuracy over all names.

    Args:
        model, optimizer, recipe: as in `train_step`.
        steps: the batches.
        scheduler: the schedule of the learning rate, which advances after each step; None keeps the
            rate constant.
    """
    model.train()
    sums: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    numbers = 0
    for batch in steps:
        scores = _step(model, optimizer, batch, recipe)
        if scheduler is not None:
            scheduler.step()
        if batch.weight:
            kept.append((scores, batch.targets))
            numbers += scores.numel()
        if numbers > _KEPT_NUMBERS:
            sums.append(_sums(kept, recipe.label_smoothing))
            kept, numbers = [], 0
    if kept:
        sums.append(_sums(kept, recipe.label_smoothing))
    # Copy all sums to the CPU at once, because each copy from a GPU waits for the GPU. Compute the
    # total on the CPU, because some devices lack float64.
    total = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(3).double()
    if process()[1] > 1:
        total = total.to(scores.device)  # NCCL sums only tensors on a GPU
        dist.all_reduce(total)
    loss_sum, hit_sum, count_sum = total.tolist()
    return loss_sum / count_sum, hit_sum / count_sum


def _sums(steps: Sequence[tuple[Tensor, Tensor]], smoothing: float) -> Tensor:
    """Returns a tensor (3): the total loss, the number of hits and the number of names."""
    scores, targets = (torch.cat(values) for values in zip(*steps, strict=True))
    loss = F.cross_entropy(scores, targets, label_smoothing=smoothing, reduction="sum")
    return torch.stack([loss, _hits(scores, targets).to(loss), loss.new_tensor(len(scores))])


def validate(model: nn.Module, data: LabelledNames) -> tuple[float, float]:
    """Returns the mean loss and the accuracy on `data`; leaves the model in evaluation mode."""
    model.eval()
    scores = logits(model, data.names)
    loss = F.cross_entropy(scores, data.labels)
    return loss.item(), _hits(scores, data.labels).item() / len(data)


def process() -> tuple[int, int]:
    """Returns the rank of this process, and the number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
