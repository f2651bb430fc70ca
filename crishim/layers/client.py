"""The daemon's side of the unpack worker: starts it when needed, hands it layers, reads its reports."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import msgspec

import crishim
from crishim.errors import BadImage, HostFailure
from crishim.host import process
from crishim.host.pidfd import wait_readable

_log = logging.getLogger(__name__)
_PIPE_BYTES = 1 << 20
_REPORT_LIMIT = 64 << 20

Pump = Callable[[int], None]
"""Writes the compressed bytes of one layer to a descriptor, from a thread; verifies what it wrote."""


class Report(msgspec.Struct, frozen=True):
    """What the worker says of a layer it has written."""

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
        self._parent: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._under_way = 0
        self._idle: asyncio.TimerHandle | None = None

    async def unpack(self, directory: Path, pump: Pump) -> Report:
        """Unpack one layer into ``directory``; an error of the pump counts before one of the worker.

        When this returns or raises, nothing writes into ``directory`` any more.
        """
        with self._busy():
            report, data = self._request_unpack(directory)
            child = _Child(report)
            try:
                feeding = asyncio.get_running_loop().run_in_executor(self._pumps, _feed, pump, data)
            except BaseException:
                os.close(data)
                await child.end()
                raise
            feeding.add_done_callback(lambda done: os.close(data) if done.cancelled() else done.exception())
            try:
                return await _attend(child, feeding)
            finally:
                await asyncio.shield(child.end())

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._under_way += 1
        self._stay()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.close)

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def close(self) -> None:
        """Let the worker end; those that still unpack are killed."""
        self._stay()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._parent is not None:
            self._parent.kill()
            self._parent.wait()
            self._parent = None

    def _request_unpack(self, directory: Path) -> tuple[int, int]:
        """Descriptors to read the report from and to write the layer to."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                layer = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                theirs.callback(os.close, layer)
                data_read, data_write = _pipe(theirs, ours)
                report_write, report_read = _pipe(theirs, ours)[::-1]
            except OSError as err:
                raise HostFailure(f"cannot unpack into {directory}: {err.strerror}") from err
            with contextlib.suppress(OSError):
                fcntl.fcntl(data_write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._send([layer, data_read, report_write])
            ours.pop_all()
        return report_read, data_write

def _feed(pump: Pump, fd: int) -> None:
    try:
        pump(fd)
    finally:
        os.close(fd)


def _report(line: bytes) -> Report:
    if not line:
        raise HostFailure("the unpack worker died; it may have been out of memory")
    try:
        answer = msgspec.json.decode(line, type=Report)
    except msgspec.MsgspecError:
        try:
            failure = msgspec.json.decode(line, type=_Failed).error
        except msgspec.MsgspecError as err:
            raise HostFailure("the unpack worker answered nonsense") from err
        raise BadImage(failure) from None
    return answer
