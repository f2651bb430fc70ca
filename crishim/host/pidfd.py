"""Processes that are not our children, held by pidfd: pidfd_open(2), pidfd_send_signal(2)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


async def wait_readable(fd: int) -> None:
    """Wait until ``fd`` is readable; a pidfd is from the moment that its process has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, on_ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def start_time(pid: int) -> int:
    """When ``pid`` began, in clock ticks since boot, or 0 if it is gone or a zombie: proc_pid_stat(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


@dataclass
class ProcessHandle:
    """One process, safe against reuse of its number by the start time recorded with it."""

    pid: int
    started: int
    fd: int

    @classmethod
    def open(cls, pid: int, started: int | None = None) -> ProcessHandle | None:
        """A handle on ``pid``, or None if it has ended or is another process than the one recorded."""
        if pid <= 0:
            return None
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return None
        now = start_time(pid)
        if now == 0 or (started is not None and started != now):
            os.close(fd)
            return None
        return cls(pid, now, fd)

    async def wait(self) -> None:
        """Wait until the process has ended."""
        await wait_readable(self.fd)

    def send(self, signum: int) -> bool:
        """Send a signal; False if the process has ended."""
        try:
            signal.pidfd_send_signal(self.fd, signum)
        except ProcessLookupError:
            return False
        return True

    def reap(self) -> int | None:
        """The wait status if the process ended as a child of ours (we are its subreaper), else None."""
        with contextlib.suppress(OSError):
            result = os.waitid(os.P_PIDFD, self.fd, os.WEXITED | os.WNOHANG)
            if result is not None:
                return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
        return None

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
