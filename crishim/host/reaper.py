"""Orphans of our programs become our children (we are their subreaper); the forgotten ones are reaped here.

Whoever starts a process waits for it by pidfd. What is still a zombie long after that belongs to nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

from crishim.host import libc
from crishim.host.pidfd import start_time

_AGE_SECONDS = 10.0
_INTERVAL = 5.0


def become_subreaper() -> None:
    """From now on orphaned descendants become children of this process: prctl(2)."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)


async def reap_forgotten() -> None:
    """Reap zombies that nobody has waited for in a while, for ever."""
    seen: dict[int, float] = {}
    while True:
        await asyncio.sleep(_INTERVAL)
        now = time.monotonic()
        zombies = set(_zombies())
        seen = {pid: seen.get(pid, now) for pid in zombies}
        for pid in [pid for pid, since in seen.items() if now - since >= _AGE_SECONDS]:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not block
            del seen[pid]


def _zombies() -> list[int]:
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            children += (task / "children").read_text().split()
    return [int(pid) for pid in children if start_time(int(pid)) == 0]
