"""Combines concurrent requests into batches, each served by one call to the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from .responder import JsonObject

MAX_BATCH_NAMES = 4096
"""The maximum number of names in one call to the model, unless one request has more."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Asked:
    """The names of one request, and the future that receives the results."""

    names: Sequence[str]
    top: int
    results: asyncio.Future[list[JsonObject]]


class Batcher:
    """Runs a model in a worker thread, where one call serves several requests.

    A call serves the requests that arrived during the previous call. If the model is idle, a
    request is served at once; no request waits for a batch to fill.

    Args:
        predict: a function that is called as `predict(names, top)` in the worker thread and returns
            one result per name. The "languages" of a result, if any, start with the `top` most
            probable languages, in descending order of probability.
        max_names: the maximum number of names in a call, unless a single request has more.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[str], int], list[JsonObject]],
        max_names: int = MAX_BATCH_NAMES,
    ) -> None:
        self._predict = predict
        self._max_names = max_names
        self._waiting: deque[_Asked] = deque()
        self._running: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="names-model")

    async def predict(self, names: Sequence[str], top: int) -> list[JsonObject]:
        """Returns the results for the names of one request, in the order of the names.

        Raises:
            Exception: the error that `predict` raised for the names of this request alone.
        """
        asked = _Asked(names, top, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._respond_to_all())
        return await asked.results

    async def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Runs `function` in the worker thread, between two batches, and returns the result."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def close(self) -> None:
        """Waits until the worker thread has finished its work, and stops the thread."""
        self._worker.shutdown()

    async def _respond_to_all(self) -> None:
        while batch := self._take():
            try:
                await self._respond(batch)
            except Exception as error:
                if len(batch) == 1:
                    _set(batch[0], error)
                    continue
                # One of these requests made the model fail, so serve each request separately.
                for asked in batch:
                    try:
                        await self._respond([asked])
                    except Exception as single_error:
                        _set(asked, single_error)

    def _take(self) -> list[_Asked]:
        """Removes and returns the waiting requests that fit in the next call."""
        batch: list[_Asked] = []
        names = 0
        while self._waiting:
            asked = self._waiting[0]
            if batch and names + len(asked.names) > self._max_names:
                break
            self._waiting.popleft()
            if not asked.results.done():  # nobody waits for a future that is done
                batch.append(asked)
                names += len(asked.names)
        return batch

    async def _respond(self, batch: Sequence[_Asked]) -> None:
        names = [name for asked in batch for name in asked.names]
        results = await self.call(self._predict, names, max(asked.top for asked in batch))
        if len(results) != len(names):
            raise RuntimeError(f"{len(results)} results for {len(names)} names")
        begin = 0
        for asked in batch:
            end = begin + len(asked.names)
            _set(asked, [_with_fewer(result, asked.top) for result in results[begin:end]])
            begin = end


def _with_fewer(result: JsonObject, top: int) -> JsonObject:
    return {key: each[:top] if key == "languages" else each for key, each in result.items()}


def _set(asked: _Asked, outcome: list[JsonObject] | Exception) -> None:
    """Passes the results or the error to a request, unless the request was cancelled."""
    if asked.results.done():
        return
    if isinstance(outcome, Exception):
        asked.results.set_exception(outcome)
    else:
        asked.results.set_result(outcome)
