"""Times the parts of a training loop, whoever wrote the loop."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.classifier.program import Program

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)
REST, TOTAL = "rest", "total"


class Stopwatch:
    """Hooks of the model and of the optimizer of a program, which take the time.

    The data are timed from the loop's question for a batch to the batch, the forward pass from the
    call of the model to its scores, the backward pass from there to the optimizer, with the loss in
    it, and the optimizer its step. What remains of the total is the loop itself: it counts hits.

    Args:
        program: whose model and optimizer get the hooks.
    """

    def __init__(self, program: Program):
        self.program = program
        self.recorded: list[dict[str, float]] = []
        """The seconds of the parts and of all together, for each stretch that was trained."""
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
        """Removes the hooks, by which the program refers to this stopwatch."""
        for hook in self._hooks:
            hook.remove()

    def train(self, order: Tensor, batch_size: int) -> None:
        """Trains the program on a stretch of an epoch and records how long each part took."""
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
