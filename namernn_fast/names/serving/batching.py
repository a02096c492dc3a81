"""Batching: concurrent requests for names are answered by one call of the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from .responder import JsonObject

MAX_BATCH_NAMES = 4096
"""The maximum number of names in one call of the model, unless one request has more."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Asked:
    """The names of one request, and the future of their results."""

    names: Sequence[str]
    top: int
    results: asyncio.Future[list[JsonObject]]


class Batcher:
    """Runs a model in a worker thread, for all requests that arrived while it ran.

    A request that finds the model idle is answered at once; nothing waits for a batch to fill.

    Args:
        predict: called as `predict(names, top)` in the worker thread; returns one result per name.
            A result with "languages" lists at least the best `top` of them, the best first.
        max_names: the maximum number of names in a call, unless one request has more.
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
        """Returns the results for the names of one request, in their order.

        Raises:
            Exception: what `predict` raised for these names alone.
        """
        asked = _Asked(names, top, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._respond_to_all())
        return await asked.results

    async def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Returns what `function` returns in the worker thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def close(self) -> None:
        """Ends the worker thread when its work is done."""
        self._worker.shutdown()

    async def _respond_to_all(self) -> None:
        while batch := self._take():
            try:
                await self._respond(batch)
            except Exception as error:
                if len(batch) == 1:
                    _set(batch[0], error)
                    continue
                # One of these requests makes the model fail; serve the others.
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
            if not asked.results.done():  # if done, nobody is waiting any more
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
            _set(asked, [_cut(result, asked.top) for result in results[begin:end]])
            begin = end


def _cut(result: JsonObject, top: int) -> JsonObject:
    if "languages" not in result:
        return result
    return {**result, "languages": result["languages"][:top]}


def _set(asked: _Asked, outcome: list[JsonObject] | Exception) -> None:
    """Gives a request its results or its error, if somebody is still waiting."""
    if asked.results.done():
        return
    if isinstance(outcome, Exception):
        asked.results.set_exception(outcome)
    else:
        asked.results.set_result(outcome)
