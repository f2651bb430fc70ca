"""Threads that are thrown away: what they return, and that nobody waits for a stuck one."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest

from crishim.errors import DeadlineExceeded
from crishim.host.threads import in_thread, run_in_own_thread

_who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="")


async def test_result_and_failure_come_back() -> None:
    assert await in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_the_caller_s_context_comes_along() -> None:
    _who.set("me")
    assert await in_thread(_who.get) == "me"


async def test_a_stuck_thread_is_left_at_the_deadline() -> None:
    stuck = threading.Event()
    try:
        with pytest.raises(DeadlineExceeded, match=r"^the hung path did not answer within 0\.05 s$"):
            await in_thread(stuck.wait, what="the hung path", timeout=0.05)
        assert await in_thread(lambda: "another") == "another"
    finally:
        stuck.set()


async def test_many_stuck_threads_stop_nobody() -> None:
    """A pool of the interpreter's usual size would be full."""
    stuck = threading.Event()
    waiting = [asyncio.create_task(in_thread(stuck.wait)) for _ in range(64)]
    try:
        async with asyncio.timeout(2):
            assert await in_thread(lambda: 1) == 1
    finally:
        stuck.set()
        await asyncio.gather(*waiting)


async def test_a_cancelled_caller_waits_for_the_work() -> None:
    """So that what the work acquires can be given back after it."""
    done: list[str] = []

    def work() -> None:
        time.sleep(0.1)
        done.append("acquired")

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["acquired"]


def test_own_thread() -> None:
    assert run_in_own_thread(lambda: threading.current_thread().name) == "crishim-own"
    with pytest.raises(ZeroDivisionError):
        run_in_own_thread(lambda: 1 // 0)
