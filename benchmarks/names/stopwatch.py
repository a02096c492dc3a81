"""Times data loading and the forward, backward and optimizer steps of a training loop."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from benchmarks.names.programs import Program

PARTS = DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
REST, TOTAL = "rest", "total"


def time_training(program: Program, order: Tensor, batch_size: int) -> dict[str, float]:
    """Trains on names in the given order. Returns the seconds of each part, REST and TOTAL.

    The data part lasts from the loop's request for a batch until the batch arrives. The forward
    pass is the call of the model. The backward pass includes the loss and ends at the optimizer
    step. The rest of the total is the loop itself, which counts correct labels. Hooks on the model
    and the optimizer find where the parts start and end.

    Raises:
        RuntimeError: The hooks did not see every part.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    begin = mark = time.perf_counter()

    def start(*_: object) -> None:
        nonlocal mark
        mark = time.perf_counter()

    def end(part: str) -> Callable[..., None]:
        def lap(*_: object) -> None:
            nonlocal mark
            now = time.perf_counter()
            seconds[part] += now - mark
            mark = now

        return lap

    def watched() -> Iterator[Any]:
        start()
        for batch in program.batches(order, batch_size):
            end(DATA)()
            yield batch
            start()

    hooks = (
        program.model.register_forward_pre_hook(start),
        program.model.register_forward_hook(end(FORWARD)),
        program.optimizer.register_step_pre_hook(end(BACKWARD)),
        program.optimizer.register_step_post_hook(end(OPTIMIZER)),
    )
    program.train(watched())
    total = time.perf_counter() - begin
    for hook in hooks:
        hook.remove()
    if not all(seconds.values()):
        raise RuntimeError(f"the hooks missed a part of {program.name}'s training: {seconds}")
    return {**seconds, REST: total - sum(seconds.values()), TOTAL: total}
