"""New processes, which have imported and run nothing before what is measured in them."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_new_process(task: Callable[..., Result], *arguments: object) -> Result:
    """Returns what `task(*arguments)` returns in a process that imports its module and runs it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(task, *arguments).result()
