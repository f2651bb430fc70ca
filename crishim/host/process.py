"""Runs programs: the one place that starts a process.

A process here is watched by pidfd. Its end and the end of its output are two things: a child of it that
keeps the pipes open delays nothing but a short drain (containerd#10094 is what happens otherwise).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass

from crishim.errors import HostFailure
from crishim.host.pidfd import wait_readable

DRAIN_SECONDS = 0.2
_DYING_SECONDS = 5.0
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Command:
    """What to run. ``timeout`` is in seconds; ``output_limit`` in bytes for each of stdout and stderr."""

    argv: Sequence[str]
    stdin: bytes = b""
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    timeout: float | None = None
    output_limit: int = 1 << 20

    def describe(self) -> str:
        """The command line, for logs and errors."""
        return " ".join(self.argv)


@dataclass(frozen=True)
class Completed:
    """How a command ended. A negative ``returncode`` is the signal that killed it."""

    argv: Sequence[str]
    returncode: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False

    @property
    def complaint(self) -> str:
        """The last line the program printed on stderr, or how it ended."""
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
        return f"exit status {self.returncode}" if self.returncode >= 0 else f"killed by signal {-self.returncode}"


class Output:
    """What a process prints, collected while it runs."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = (bytearray(), bytearray())
        self._open = 2
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def stdout(self) -> bytes:
        """Standard output so far, up to the limit."""
        return bytes(self._data[0])

    @property
    def stderr(self) -> bytes:
        """Standard error so far, up to the limit."""
        return bytes(self._data[1])

    def take(self, stream: int, chunk: bytes) -> None:
        """Add to stream 0 or 1; an empty chunk ends it."""
        data = self._data[stream]
        data += chunk[: max(0, self._limit - len(data))]
        if not chunk:
            self._open -= 1
            if not self._open and not self._ended.done():
                self._ended.set_result(None)

    async def drained(self) -> None:
        """Wait for the end of both streams, but only shortly: somebody else may hold them open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.shield(self._ended)


Started = subprocess.Popen[bytes]
PIPE = subprocess.PIPE


def start(  # noqa: PLR0913 - it is Popen, for us alone
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; :class:`HostFailure` if there is no such program."""
    try:
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except OSError as err:
        raise HostFailure(f"cannot start {argv[0]}: {err.strerror}") from err


async def run(command: Command) -> Completed:
    """Run ``command`` to its end; its whole process group is killed at the timeout or on cancellation."""
    process = start(
        command.argv,
        stdin=subprocess.PIPE if command.stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=command.env,
        cwd=command.cwd,
    )
    timed_out = False
    async with collecting(process, command.output_limit, command.stdin) as output:
        try:
            async with asyncio.timeout(command.timeout):
                await wait_exit(process)
        except TimeoutError:
            timed_out = True
        finally:
            await end(process)
        await output.drained()
    returncode = process.returncode if process.returncode is not None else -signal.SIGKILL
    return Completed(command.argv, returncode, output.stdout, output.stderr, timed_out)


async def end(process: subprocess.Popen[bytes]) -> None:
    """Kill ``process`` with its group, unless it has ended, and wait a little until it is gone."""
    if process.returncode is not None:
        return
    kill_group(process)
    with contextlib.suppress(TimeoutError, ProcessLookupError):
        async with asyncio.timeout(_DYING_SECONDS):
            await wait_exit(process)


async def wait_exit(process: subprocess.Popen[bytes]) -> int:
    """Wait without polling and without a thread until ``process`` has ended, and reap it."""
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await wait_readable(pidfd)
        finally:
            os.close(pidfd)
    return process.wait()


def disown(process: subprocess.Popen[bytes]) -> None:
    """Leave ``process`` to whoever holds its pidfd: it is neither waited for nor missed here."""
    process.returncode = 0


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill ``process`` with its group, unless it has ended. It is reaped when it is dead, without anyone waiting.

    A process in an uninterruptible system call dies late or never, and must hold nobody up.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _later(_reap(process))


def reap_later(pid: int) -> None:
    """Reap a child that has had SIGKILL, once it is dead."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    _later(_reap_by_fd(pidfd))


_reaping: set[asyncio.Task[None]] = set()


def _later(work: Coroutine[None, None, None]) -> None:
    task = asyncio.get_running_loop().create_task(work, name="reap")
    _reaping.add(task)
    task.add_done_callback(_reaping.discard)


async def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        await wait_exit(process)
    finally:
        process.returncode = process.returncode if process.returncode is not None else -signal.SIGKILL


async def _reap_by_fd(pidfd: int) -> None:
    try:
        await wait_readable(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - it has ended
    finally:
        os.close(pidfd)


@contextlib.asynccontextmanager
async def collecting(process: subprocess.Popen[bytes], limit: int, stdin: bytes = b"") -> AsyncIterator[Output]:
    """Feed stdin and collect both outputs while the body runs; closes all three pipes."""
    loop = asyncio.get_running_loop()
    output = Output(limit)
    reading: set[int] = set()

    def on_readable(fd: int, stream: int) -> None:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            loop.remove_reader(fd)
            reading.discard(fd)
        output.take(stream, chunk)

    for stream, pipe in enumerate((process.stdout, process.stderr)):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        reading.add(pipe.fileno())
        loop.add_reader(pipe.fileno(), on_readable, pipe.fileno(), stream)
    if process.stdin is not None:
        _feed(loop, process.stdin.fileno(), memoryview(stdin))
    try:
        yield output
    finally:
        for fd in reading:
            loop.remove_reader(fd)
        if process.stdin is not None:
            loop.remove_writer(process.stdin.fileno())
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _feed(loop: asyncio.AbstractEventLoop, fd: int, data: memoryview) -> None:
    """Write ``data`` as the pipe takes it, then close: on a duplicate, so that the original stays valid."""
    os.set_blocking(fd, False)
    rest = data

    def on_writable() -> None:
        nonlocal rest
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            return
        except OSError:
            rest = rest[len(rest) :]
        if not rest:
            loop.remove_writer(fd)
            end = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(end, fd, inheritable=False)  # closes the pipe, keeps the number reserved
            os.close(end)

    loop.add_writer(fd, on_writable)
