"""How a container's end is learned: pidfds of its process and of conmon, and conmon's exit file.

Nothing is polled. conmon writes the exit file when it has drained the output, then ends, so its end is the
event and the file is the answer. If conmon was killed, the container is an orphan of ours or of init.
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from crishim.host.pidfd import ProcessHandle

UNKNOWN_EXIT_CODE = 255
_MONITOR_SECONDS = 10.0


@dataclass(frozen=True)
class Exit:
    """The end of a container."""

    code: int
    finished_at: int
    """Nanoseconds since 1970."""
    known: bool = True
    """False if nobody is left who knows the code."""


def read_exit_file(path: Path) -> Exit | None:
    """conmon's record, if it is there and whole."""
    try:
        text, finished_at = path.read_text().strip(), path.stat().st_mtime_ns
    except OSError:
        return None
    return Exit(int(text), finished_at) if text.removeprefix("-").isdigit() else None


async def wait_exit(container: ProcessHandle | None, monitor: ProcessHandle | None, exit_file: Path) -> Exit:
    """Wait for the end of the container; closes both handles. None stands for a process that has ended.

    The monitor normally ends last. If it is killed, its container is waited for itself; if it lingers after
    the container (something keeps the output open), it is ended.
    """
    try:
        if container is not None:
            await container.wait()
        if monitor is not None:
            try:
                async with asyncio.timeout(_MONITOR_SECONDS):
                    await monitor.wait()
            except TimeoutError:
                monitor.send(signal.SIGKILL)
        return read_exit_file(exit_file) or _without_monitor(container)
    finally:
        for handle in (container, monitor):
            if handle is not None:
                handle.reap()
                handle.close()


def _without_monitor(container: ProcessHandle | None) -> Exit:
    """The container was orphaned: as its subreaper we may be its parent now, and know the code."""
    code = container.reap() if container is not None else None
    return Exit(UNKNOWN_EXIT_CODE if code is None else code, time.time_ns(), known=code is not None)
