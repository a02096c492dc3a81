"""New processes, which import and run nothing before the measurement."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_new_process(task: Callable[..., Result], *arguments: object) -> Result:
    """Returns the result of `task(*arguments)` in a process that has only imported its module."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(task, *arguments).result()
