"""Threads that are thrown away.

One for work that changes the thread's own namespaces or directory; one for blocking work that a hung file
system may hold for ever. A pool would do for neither: a few stuck threads would stop everybody else's work, and
the interpreter would wait for them at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from crishim.errors import DeadlineExceeded, ResourceExhausted

T = TypeVar("T")

MOST_THREADS = 512
_PATIENCE_SECONDS = 10.0
_running = 0
_lock = threading.Lock()


def run_in_own_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a new thread and wait for it; the thread's attributes die with it.

    Blocks the caller: call it from a worker thread, not from the event loop.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as err:
            failure.append(err)

    thread = threading.Thread(target=body, name="crishim-own", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


async def in_thread(work: Callable[[], T], *, what: str = "", timeout: float | None = None) -> T:
    """Run blocking ``work`` in a thread of its own, with the caller's context variables.

    A cancelled caller waits for the work all the same, so that it can undo it; not for ever. At the
    ``timeout`` (seconds) the thread is left to itself and ``what`` is named in :class:`DeadlineExceeded`:
    give one only for work that acquires nothing.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    _start(loop, done, contextvars.copy_context(), work)
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.shield(done)
    except TimeoutError:
        if done.done():
            raise
        raise DeadlineExceeded(f"{what} did not answer within {timeout:g} s") from None
    except asyncio.CancelledError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS if timeout is None else 0):
                await asyncio.wait([done])
        raise


def _start(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], context: contextvars.Context, work: Callable[[], T]
) -> None:
    def body() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = context.run(work)
        except BaseException as err:
            failure = err
        finally:
            _count(-1)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(_tell, done, result, failure)

    _count(1)
    threading.Thread(target=body, name="crishim-work", daemon=True).start()


def _tell(done: asyncio.Future[T], result: T | None, failure: BaseException | None) -> None:
    if done.done():
        return
    if failure is not None:
        done.set_exception(failure)
        done.exception()  # whoever waits gets it; nobody may wait any more
    else:
        done.set_result(result)  # type: ignore[arg-type]


def _count(change: int) -> None:
    global _running  # noqa: PLW0603 - threads are the process's, so is their count
    with _lock:
        if change > 0 and _running >= MOST_THREADS:
            raise ResourceExhausted(f"{MOST_THREADS} threads are waiting for the file system")
        _running += change
