"""Times the parts of any training loop."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.classifier.program import Program

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)
REST, TOTAL = "rest", "total"


class Stopwatch:
    """Times a program with hooks on its model and optimizer.

    The data part is the time from the loop's request for a batch until it arrives; the forward pass
    is the call of the model; the backward pass lasts from there to the optimizer step, loss
    included. The rest of the total is the loop itself, which counts hits.

    Args:
        program: The program whose model and optimizer get the hooks.
    """

    def __init__(self, program: Program):
        self.program = program
        self.recorded: list[dict[str, float]] = []
        """The seconds of each part and in total, for each trained stretch."""
        self._mark = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        model, optimizer = program.model, program.optimizer
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._start()),
            model.register_forward_hook(lambda *_: self._lap(FORWARD)),
            optimizer.register_step_pre_hook(lambda *_: self._lap(BACKWARD)),
            optimizer.register_step_post_hook(lambda *_: self._lap(OPTIMIZER)),
        ]

    def remove(self) -> None:
        """Removes the hooks, which keep this stopwatch alive."""
        for hook in self._hooks:
            hook.remove()

    def train(self, order: Tensor, batch_size: int) -> None:
        """Trains the program on a stretch of an epoch and records the time of each part."""
        self._parts = dict.fromkeys(PARTS, 0.0)
        begin = time.perf_counter()
        self.program.train(self._watched(self.program.batches(order, batch_size)))
        total = time.perf_counter() - begin
        if not all(self._parts.values()):
            raise RuntimeError(f"{self.program.name} trains past the hooks: {self._parts}")
        rest = total - sum(self._parts.values())
        self.recorded.append({**self._parts, REST: rest, TOTAL: total})

    def _watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        self._start()
        for batch in batches:
            self._lap(DATA)
            yield batch
            self._start()

    def _start(self) -> None:
        self._mark = time.perf_counter()

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._mark
        self._mark = now
