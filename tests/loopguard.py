"""Catches tests that block the event loop: one blocked callback stops every pod of a node.

asyncio in debug mode measures each callback and logs those that took too long; here that log becomes a
failure. The time is wall-clock time, so the limit leaves room for a busy machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import pytest

LIMIT_SECONDS = 0.5


class _Blocked(logging.Handler):
    """Keeps what asyncio says of callbacks that took too long (``Executing %s took %.3f seconds``)."""

    def __init__(self, limit: float) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self._limit = limit

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith("Executing ") or not isinstance(record.args, tuple):
            return
        took = record.args[-1]
        if isinstance(took, float) and took > self._limit:  # others may watch with a limit of their own
            self.found.append(record.getMessage())


@contextlib.contextmanager
def watching(loop: asyncio.AbstractEventLoop, limit: float = LIMIT_SECONDS) -> Iterator[list[str]]:
    """Collect the callbacks of ``loop`` that run for more than ``limit`` seconds during the body."""
    handler, log = _Blocked(limit), logging.getLogger("asyncio")
    debug, slow = loop.get_debug(), loop.slow_callback_duration
    disabled, level = log.disabled, log.level
    log.addHandler(handler)
    log.disabled = False
    log.setLevel(logging.WARNING)
    loop.set_debug(True)
    loop.slow_callback_duration = min(limit, slow) if debug else limit
    try:
        yield handler.found
    finally:
        loop.set_debug(debug)
        loop.slow_callback_duration = slow
        log.disabled = disabled
        log.setLevel(level)
        log.removeHandler(handler)


@contextlib.contextmanager
def guarding(loop: asyncio.AbstractEventLoop, limit: float = LIMIT_SECONDS) -> Iterator[None]:
    """Fail the test if its body blocks ``loop`` for more than ``limit`` seconds."""
    with watching(loop, limit) as blocked:
        yield
    if blocked:
        pytest.fail("the event loop was blocked: " + "; ".join(blocked), pytrace=False)
