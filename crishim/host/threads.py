"""Threads that are thrown away: for work that changes the thread's own namespaces or directory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
