"""Drives an OCI runtime's command line: runc(8), crun(1), and those that behave like them.

Source: opencontainers/runtime-spec (runtime.md) and the runtimes' own manuals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from crishim.config.settings import HandlerSettings
from crishim.errors import DeadlineExceeded, HostFailure
from crishim.host import process
from crishim.host.pidfd import wait_readable
from crishim.observe.timeline import step
from crishim.runtimes.conmon import reason
from crishim.runtimes.features import Features

COMMAND_SECONDS = 120.0
EXEC_OUTPUT_LIMIT = 16 << 20
"""Bytes of each stream that ExecSync returns: the kubelet's limit."""


@dataclass(frozen=True)
class ExecResult:
    """How a command in a container ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Stdio:
    """Descriptors for a command. From ``complaints``, the other end of ``stderr``, it is read why it cannot start."""

    stdin: int
    stdout: int
    stderr: int
    complaints: int
    console: str = ""
    """Path of the Unix socket that is to receive a terminal; empty for none."""


class ExecProcess:
    """A command in a container: a child that the OCI runtime left to us, since we are its subreaper."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def of(cls, pid_file: Path) -> ExecProcess:
        """The process whose number the runtime wrote; it stays a zombie of ours until it is waited for."""
        return cls(int(pid_file.read_text()))

    @classmethod
    def kill_unknown(cls, pid_file: Path) -> None:
        """Kill the process that a runtime which was interrupted may have started."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for the end; the exit code, 128 and the signal's number for one that was killed."""
        await wait_readable(self._pidfd)
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status

    def close(self) -> None:
        """Give the descriptor back; a process that still runs is left alone."""
        os.close(self._pidfd)


def _complaint(fd: int) -> str:
    """What the runtime printed, from the non-blocking end of its standard error."""
    try:
        return os.read(fd, 1 << 16).decode(errors="replace")
    except OSError:
        return ""


class OciRuntime:
    """One runtime handler's program and its state directory."""

    def __init__(self, name: str, settings: HandlerSettings, root: Path, *, systemd_cgroup: bool) -> None:
        self.name = name
        self.path = settings.path
        self.features = Features()
        """What the runtime said of itself; :meth:`crishim.runtimes.handlers.Handlers.probe` asks."""
        self.arguments = (f"--root={root}", *settings.args, *(["--systemd-cgroup"] if systemd_cgroup else []))
        self._root = root

    async def start(self, container_id: str) -> None:
        """Run the created container's process."""
        with step(f"{self.name} start"):
            await self._run("start", container_id)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Set cgroup limits: the spec's ``resources`` object as JSON; what it leaves out stays."""
        with step(f"{self.name} update"):
            await self._run("update", "--resources", "-", container_id, stdin=resources)

    async def delete(self, container_id: str) -> None:
        """Forget the container and its cgroup, killing what is left in it; one unknown is fine."""
        if not (self._root / container_id).exists():
            return
        with step(f"{self.name} delete"):
            await self._run("delete", "--force", container_id)

    async def exec_sync(self, container_id: str, spec: bytes, timeout: float | None, scratch: Path) -> ExecResult:
        """Run a command in the container to its end; at the timeout its process group is killed.

        ``spec`` is the runtime-spec's ``process`` object as JSON.

        The runtime only starts the process (``--detach``): it becomes our child, we are its subreaper. So
        no copy of the runtime waits beside it, and a background child that keeps the output open cannot
        hold the call.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        spec_file, pid_file = scratch / "process.json", scratch / "pid"
        try:
            spec_file.write_bytes(spec)
            command = [
                self.path, *self.arguments, "exec", "--detach",
                "--process", str(spec_file), "--pid-file", str(pid_file), container_id,
            ]  # fmt: skip
            return await _Exec(command, pid_file, timeout).run()
        finally:
            for path in (spec_file, pid_file):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                scratch.rmdir()

    async def exec_start(self, container_id: str, spec: bytes, scratch: Path, stdio: Stdio) -> ExecProcess:
        """Start a command in the container and leave it running, as a child of ours.

        ``spec`` is as for :meth:`exec_sync`. The command has the descriptors of ``stdio``, which the caller
        closes afterwards; with a console socket it has a terminal instead.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        spec_file, pid_file = scratch / "process.json", scratch / "pid"
        command = [
            self.path, *self.arguments, "exec", "--detach", "--process", str(spec_file), "--pid-file", str(pid_file),
            *(["--console-socket", stdio.console] if stdio.console else []), container_id,
        ]  # fmt: skip
        try:
            spec_file.write_bytes(spec)
            started = process.start(command, stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr)
            try:
                async with asyncio.timeout(COMMAND_SECONDS):
                    status = await process.wait_exit(started)
            except BaseException:
                process.kill_group(started)
                ExecProcess.kill_unknown(pid_file)
                raise
            if status != 0:
                raise HostFailure(f"cannot run the command: {reason(_complaint(stdio.complaints))}")
            return ExecProcess.of(pid_file)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} exec did not finish within {COMMAND_SECONDS:g} s") from None
        finally:
            for path in (spec_file, pid_file):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                scratch.rmdir()

    async def _run(self, *arguments: str, stdin: bytes = b"") -> None:
        command = process.Command([self.path, *self.arguments, *arguments], stdin=stdin, timeout=COMMAND_SECONDS)
        done = await process.run(command)
        if done.timed_out:
            raise DeadlineExceeded(f"{self.name} {arguments[0]} did not finish within {COMMAND_SECONDS:g} s")
        if done.returncode != 0:
            raise HostFailure(f"{self.name} {arguments[0]} failed: {reason(done.stderr.decode(errors='replace'))}")


class _Exec:
    """One command in a container: starts, collects, ends or kills."""

    def __init__(self, command: list[str], pid_file: Path, timeout: float | None) -> None:
        self._command = command
        self._pid_file = pid_file
        self._timeout = timeout
        self._pidfd = -1
        self._pid = 0

    async def run(self) -> ExecResult:
        started = process.start(self._command, stdout=process.PIPE, stderr=process.PIPE)
        async with process.collecting(started, EXEC_OUTPUT_LIMIT) as output:
            try:
                async with asyncio.timeout(self._timeout):
                    status = await process.wait_exit(started)
                    code = await self._process_end() if status == 0 else -1
            except TimeoutError:
                raise DeadlineExceeded(f"command timed out after {self._timeout:g} s") from None
            finally:
                process.kill_group(started)
                self._kill()
            await output.drained()
        if status != 0:
            raise HostFailure(f"cannot run the command: {reason(output.stderr.decode(errors='replace'))}")
        return ExecResult(code, output.stdout, output.stderr)

    async def _process_end(self) -> int:
        """Wait for the process that the runtime left behind; it stays a zombie of ours until then."""
        self._pid = int(self._pid_file.read_text())
        self._pidfd = os.pidfd_open(self._pid)
        await wait_readable(self._pidfd)
        ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
        assert ended is not None
        self._pid = 0
        return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status

    def _kill(self) -> None:
        """Kill what was started and has not ended, with its process group, and reap it."""
        if not self._pid and self._pidfd < 0:
            with contextlib.suppress(OSError, ValueError):
                self._pid = int(self._pid_file.read_text())
        if self._pid:
            with contextlib.suppress(OSError):
                if os.getpgid(self._pid) == self._pid:
                    os.killpg(self._pid, signal.SIGKILL)
                else:
                    os.kill(self._pid, signal.SIGKILL)
            process.reap_later(self._pid)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
