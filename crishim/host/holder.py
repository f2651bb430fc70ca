"""A process that holds a PID namespace: a tiny static init, confined, in an empty read-only place.

A PID namespace cannot be pinned as a file without a living init (pid_namespaces(7)). The thread that
starts it has given everything up before: the holder is nobody, without capabilities, in a root that holds
nothing but itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from crishim.errors import HostFailure
from crishim.host import libc
from crishim.host.threads import run_in_own_thread

_HOLDER_ID = 0xFFFFFFF1
"""A user that nobody else is: not even a container's "nobody" can look at the holder or signal it."""
_LAST_CAPABILITY = 63


@dataclass(frozen=True)
class Holder:
    """What to start: the init's program, the directory that will be its root, namespaces to enter first."""

    program: str
    root: Path
    namespaces: tuple[Path, ...]

    def prepare(self) -> None:
        """Copy the program into its root, once for all holders."""
        target = self.root / "init"
        if target.exists():
            return
        self.root.mkdir(parents=True, exist_ok=True, mode=0o755)
        temporary = self.root / f".init-{os.getpid()}"
        try:
            shutil.copyfile(self.program, temporary)
        except OSError as err:
            raise HostFailure(f"cannot use runtime.holder {self.program}: {err.strerror}") from err
        temporary.chmod(0o111)  # a program that its user cannot read is not dumpable: proc_pid_maps stays shut
        temporary.rename(target)

    def start(self) -> int:
        """Start it as PID 1 of a new namespace; the result is its PID here. Blocks for milliseconds."""
        self.prepare()
        process = run_in_own_thread(self._start)
        process.returncode = 0  # waited for by pidfd
        return process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        # the host's paths are out of reach after the pivot: open everything first
        opened = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self.namespaces]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            for fd in opened:
                libc.setns(fd, 0)
            libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWPID)
            libc.pivot_to(self.root)
            libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
            for capability in range(_LAST_CAPABILITY + 1):
                with contextlib.suppress(OSError):
                    libc.prctl(libc.PR_CAPBSET_DROP, capability)
            libc.become_in_thread(_HOLDER_ID)
            # vfork, which Popen uses without user= and preexec_fn=: fork would run gRPC's handlers, and
            # a thread with another PID namespace for its children cannot start threads
            return subprocess.Popen(
                ["/init", "-P"],
                stdin=null,
                stdout=null,
                stderr=null,
                env={},
                start_new_session=True,
            )
        except OSError as err:
            raise HostFailure(f"cannot start {self.program} to hold a PID namespace: {err.strerror}") from err
        finally:
            for fd in (*opened, null):
                os.close(fd)
