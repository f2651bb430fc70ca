"""The demo's own daemon: ``crishim serve`` as a child process, talked to over its socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import crishim
from crishim.cli.showcase.place import Place
from crishim.cri.client import Client
from crishim.errors import HostFailure
from crishim.host import process

_READY_SECONDS = 30.0
_STOP_SECONDS = 20.0


def start(place: Place) -> process.Started:
    """Start it with the configuration that was written; it logs to a file."""
    with place.log.open("ab") as log:
        return process.start(
            [sys.executable, "-P", "-m", "crishim", "serve", "--config", str(place.config)],
            stdout=log.fileno(),
            stderr=log.fileno(),
            env={**os.environ, "PYTHONPATH": str(Path(crishim.__file__).parent.parent), "NO_PROXY": "127.0.0.1"},
        )


async def ready(started: process.Started, client: Client) -> None:
    """Wait until it answers; :class:`HostFailure` if it ends instead."""
    answering = asyncio.ensure_future(client.ready(_READY_SECONDS))
    ending = asyncio.ensure_future(process.wait_exit(started))
    try:
        await asyncio.wait((answering, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            raise HostFailure(f"the daemon ended with status {ending.result()} instead of serving")
        await answering
    finally:
        for task in (answering, ending):
            task.cancel()
        await asyncio.gather(answering, ending, return_exceptions=True)


async def stop(started: process.Started) -> None:
    """Ask it to end, and kill it if it does not."""
    with contextlib.suppress(ProcessLookupError):
        started.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait_exit(started)
    except TimeoutError:
        raise HostFailure(f"the daemon did not end within {_STOP_SECONDS:g} s of being asked to") from None
    finally:
        process.kill_group(started)


def log_tail(place: Place, lines: int) -> Iterator[str]:
    """The last lines that it said."""
    try:
        text = place.log.read_text(errors="replace")
    except OSError:
        return
    yield from text.splitlines()[-lines:]
