"""Operations that belong to the node: a caller that goes away does not stop one, a retry joins it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, TypeVar, cast

from crishim.errors import Unavailable
from crishim.observe.metrics import OPERATIONS

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Operations:
    """All operations under way, each known by a key."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._patient: set[asyncio.Task[Any]] = set()
        self._waiting: Counter[Hashable] = Counter()

    async def join(
        self, key: Hashable, start: Callable[[], Awaitable[T]], *, abandon: bool = False, patient: bool = False
    ) -> T:
        """The result of the operation ``key``: of the one under way, else of a new one.

        Cancelling the caller leaves the operation running. With ``abandon`` the last caller to be cancelled
        stops it and waits for its clean-up: for work that is only a part of other operations. Who comes
        during that clean-up does not join it, but starts anew after it. ``patient`` is as in :meth:`spawn`.
        """
        while (task := self._running.get(key)) is not None and task.cancelling():
            await asyncio.wait([task])
        task = task or self.spawn(key, start, patient=patient)
        self._waiting[key] += 1
        try:
            return cast(T, await asyncio.shield(task))
        except asyncio.CancelledError:
            if task.cancelled() and not abandon:
                raise Unavailable(f"{task.get_name()} was aborted: what it was for is being stopped") from None
            if abandon and self._waiting[key] == 1 and not task.done():
                task.cancel()
                await asyncio.wait([task])
            raise
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    def spawn(self, key: Hashable, start: Callable[[], Awaitable[T]], *, patient: bool = False) -> asyncio.Task[T]:
        """Start the operation ``key`` without waiting for it; it must not be under way.

        A ``patient`` one mostly waits and can be done by a later daemon as well: :meth:`settle` ends it.
        """

        async def body() -> T:
            with OPERATIONS.track_inprogress():
                return await start()

        task = asyncio.create_task(body(), name=_describe(key), context=contextvars.copy_context())
        self._running[key] = task
        if patient:
            self._patient.add(task)
            task.add_done_callback(self._patient.discard)
        task.add_done_callback(lambda done: self._finish(key, done))
        return task

    def count(self) -> int:
        """How many operations are under way."""
        return len(self._running)

    async def finished(self, key: Hashable, *, cancel: bool = False) -> None:
        """Wait until ``key`` is not under way, whatever comes of it; ``cancel`` makes it undo itself."""
        task = self._running.get(key)
        if task is None:
            return
        if cancel:
            task.cancel()
        await asyncio.wait([task])

    def under_way(self, key: Hashable) -> bool:
        """Whether ``key`` is being done now."""
        return key in self._running

    async def settle(self) -> None:
        """Wait until nothing is under way, including what is started meanwhile."""
        for task in self._patient:
            task.cancel()
        while self._running:
            await asyncio.wait(list(self._running.values()))

    def _finish(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if not task.cancelled() and task.exception() is not None:
            level = logging.DEBUG if self._waiting[key] else logging.WARNING
            _log.log(level, "%s failed: %s", task.get_name(), task.exception())


async def to_the_end(work: Coroutine[None, None, T]) -> T:
    """Do ``work`` to its end even if the caller is cancelled, who then waits for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        raise


def _describe(key: Hashable) -> str:
    return " ".join(part for part in key if isinstance(part, str)) if isinstance(key, tuple) else str(key)
