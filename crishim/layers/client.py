"""The daemon's side of the unpack worker: starts it when needed, hands it layers, reads its reports."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import msgspec

import crishim
from crishim.errors import BadImage, HostFailure
from crishim.host import process
from crishim.host.pidfd import wait_readable

IDLE_SECONDS = 20.0
_PIPE_BYTES = 1 << 20
_REPORT_LIMIT = 64 << 20
_ERROR_LIMIT = 1000  # characters: the worker may not be ours any more

Pump = Callable[[int], None]
"""Writes the compressed bytes of one layer to a descriptor, from a thread; verifies what it wrote."""


class Report(msgspec.Struct, frozen=True):
    """What the worker says of a layer it has written. Paths are bytes in hexadecimal, the root is empty."""

    diff_id: str
    size: int
    entries: int
    unpacked: int
    opaque: list[str]
    implicit: list[str]


class _Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    error: str
    host: bool = False


class _Began(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pid: int


@dataclass(frozen=True)
class Limits:
    """What one layer may be."""

    max_bytes: int
    max_entries: int


class UnpackWorkers:
    """The worker's parent process, from the first layer until none has come for a while, and requests to it."""

    def __init__(self, limits: Limits, pumps: Executor) -> None:
        """``pumps`` runs the threads that feed layers."""
        self._request = msgspec.json.encode({"max_bytes": limits.max_bytes, "max_entries": limits.max_entries})
        self._pumps = pumps
        self._parent: subprocess.Popen[bytes] | None = None  # noqa: TID251
        self._socket: socket.socket | None = None
        self._under_way = 0
        self._idle: asyncio.TimerHandle | None = None

    async def unpack(self, directory: Path, pump: Pump) -> Report:
        """Unpack one layer into ``directory``; an error of the pump counts before one of the worker.

        Once this has returned or raised, nothing writes into ``directory`` any more.
        """
        with self._busy():
            report, data = self._begin(directory)
            child = _Child(report)
            try:
                return await _attend(child, _start_feeding(self._pumps, pump, data))
            finally:
                await asyncio.shield(child.end())

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._under_way += 1
        self._keep()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.close)

    def _keep(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def close(self) -> None:
        """Let the worker end; those that still unpack are killed."""
        self._keep()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._parent is not None:
            self._parent.kill()
            self._parent.wait()
            self._parent = None

    def _begin(self, directory: Path) -> tuple[int, int]:
        """Have a child started; descriptors to read its report from and to write the layer to."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                layer = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                theirs.callback(os.close, layer)
                data_read, data_write = _pipe(theirs, ours)
                report_read, report_write = _pipe(ours, theirs)
            except OSError as err:
                raise HostFailure(f"cannot unpack into {directory}: {err.strerror}") from err
            with contextlib.suppress(OSError):
                fcntl.fcntl(data_write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._send([layer, data_read, report_write])
            ours.pop_all()
        return report_read, data_write

    def _send(self, fds: list[int]) -> None:
        for attempt in range(2):
            try:
                socket.send_fds(self._connect(), [self._request], fds)
                return
            except OSError as err:
                gone = isinstance(err, ConnectionError)
                if gone:
                    self.close()
                if attempt or not gone:
                    raise HostFailure(f"cannot reach the unpack worker: {err.strerror}") from err

    def _connect(self) -> socket.socket:
        if self._parent is not None and self._parent.poll() is not None:
            self.close()
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as unless_started:
                unless_started.callback(ours.close)
                self._parent = process.start(
                    [sys.executable, "-P", "-m", "crishim.layers.worker", str(theirs.fileno())],
                    env={**os.environ, "PYTHONPATH": str(Path(crishim.__file__).parent.parent)},
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
                unless_started.pop_all()
            self._socket = ours
        return self._socket


class _Child:
    """One worker child, known by what it reports."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._began = False
        self._unwanted = False
        self._pidfd = -1
        os.set_blocking(fd, False)
        self.report = asyncio.ensure_future(self._read())
        """Its last line, once it has ended; empty if it died."""

    async def _read(self) -> bytes:
        while True:
            await wait_readable(self._fd)
            chunk = os.read(self._fd, 1 << 18)
            if not chunk:
                break
            if len(self._data) > _REPORT_LIMIT:
                self.kill()
                continue
            self._data += chunk
            if not self._began and b"\n" in self._data:
                self._began = True
                self._hold(bytes(self._data).partition(b"\n")[0])
        lines = bytes(self._data).split(b"\n")
        return next((line for line in lines if line and not line.startswith(b'{"pid"')), b"")

    def _hold(self, line: bytes) -> None:
        """The first line comes before the child reads anything of the layer: it can be believed."""
        with contextlib.suppress(msgspec.MsgspecError, OSError):
            self._pidfd = os.pidfd_open(msgspec.json.decode(line, type=_Began).pid)
        if self._unwanted:
            self.kill()

    def kill(self) -> None:
        """Kill it, now or as soon as its process is known."""
        self._unwanted = True
        if self._pidfd >= 0 and not self.report.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it unless it has ended, wait until it has, and give the descriptors back."""
        if not self.report.done():
            self.kill()
            await asyncio.wait((self.report,))
        for fd in (self._fd, self._pidfd):
            if fd >= 0:
                os.close(fd)


async def _attend(child: _Child, feeding: asyncio.Future[bool]) -> Report:
    await asyncio.wait((child.report, feeding), return_when=asyncio.FIRST_COMPLETED)
    if feeding.done() and _fault(feeding) is not None:
        child.kill()  # what it has unpacked so far is not what was asked for
    await asyncio.wait((child.report, feeding))
    fault = _fault(feeding)
    if fault is not None:
        raise fault
    report = _report(child.report.result())
    if not feeding.result():
        raise HostFailure("the unpack worker answered before it had read the layer")
    return report


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, read)
    writer.callback(os.close, write)
    return read, write


def _start_feeding(pumps: Executor, pump: Pump, fd: int) -> asyncio.Future[bool]:
    try:
        feeding = asyncio.get_running_loop().run_in_executor(pumps, _feed, pump, fd)
    except RuntimeError as err:
        os.close(fd)
        raise HostFailure(f"cannot read the layer: {err}") from err
    # when nobody waits for it any more, the pump gets EPIPE at its next write
    feeding.add_done_callback(lambda done: os.close(fd) if done.cancelled() else done.exception())
    return feeding


def _feed(pump: Pump, fd: int) -> bool:
    """Whether the pump has written everything: the worker may have left before."""
    try:
        pump(fd)
    except BrokenPipeError:
        if _has_reader(fd):
            raise  # from a connection of the pump's own
        return False
    finally:
        os.close(fd)
    return True


def _has_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return not poll.poll(0)


def _fault(feeding: asyncio.Future[bool]) -> BaseException | None:
    if feeding.cancelled():
        return HostFailure("the daemon ends: the layer is not read any more")
    return feeding.exception()


def _report(line: bytes) -> Report:
    if not line:
        raise HostFailure("the unpack worker died; it may have been out of memory")
    try:
        answer = msgspec.json.decode(line, type=Report)
        for path in (*answer.opaque, *answer.implicit):
            bytes.fromhex(path)
    except (msgspec.MsgspecError, ValueError):
        raise _failure(line) from None
    return answer


def _failure(line: bytes) -> BadImage | HostFailure:
    try:
        failed = msgspec.json.decode(line, type=_Failed)
    except msgspec.MsgspecError:
        return HostFailure("the unpack worker answered nonsense")
    return (HostFailure if failed.host else BadImage)(failed.error[:_ERROR_LIMIT])
