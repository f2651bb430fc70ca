"""Attach: a client on the streams of a container's first process, by way of conmon.

conmon (conn_sock.c, ctr_stdio.c) listens on the seqpacket socket ``attach`` in the bundle. Every packet that it
sends begins with a byte that says which stream the rest is of; every packet that it gets goes to stdin. When a
connection ends its sending, conmon closes the container's stdin unless it was told to leave it open. It writes
to its clients one after the other and waits for each: a client that reads nothing would stop the container's
output and log. So what conmon sends is always read here, and a client that does not keep up is dismissed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from crishim.containers.client import Client, Size
from crishim.containers.exec_stream import check_running
from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import FailedPrecondition, ResourceExhausted
from crishim.host.pump import CHUNK, HEADROOM, Outlet, Writer, scratch

STALL_SECONDS = 10.0
"""How long a client may keep conmon, and with it the container, waiting."""
LAST_WORDS_SECONDS = 0.3
"""How long output is still handed on after a client has ended its stdin, where that ends the session."""
_LARGEST_PACKET = 64 << 10
"""Room that is left for a packet; conmon's have at most 8 KiB and a byte (STDIO_BUF_SIZE)."""
_DISCARDED_PACKETS = 24
_PACKET_BYTES = 8 << 10
"""Bytes of stdin in one packet; conmon takes at most 32 KiB (CONN_SOCK_BUF_SIZE)."""
_STDOUT, _STDERR = 2, 3


class Parking:
    """Connections to conmon that must stay open although their clients have left.

    A client without stdin must not end the stdin of a container with stdin_once, and conmon cannot tell it from
    one with stdin. So its connection is kept, read and discarded, until the next such client takes it over.
    """

    def __init__(self) -> None:
        self._idle: dict[str, list[socket.socket]] = {}

    def take(self, container_id: str) -> socket.socket | None:
        """A connection of the container that nobody uses."""
        idle = self._idle.get(container_id)
        if not idle:
            return None
        connection = idle.pop()
        asyncio.get_running_loop().remove_reader(connection.fileno())
        return connection

    def park(self, container_id: str, connection: socket.socket) -> None:
        """Keep a connection until the container has ended."""
        self._idle.setdefault(container_id, []).append(connection)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._discard, container_id, connection)

    def _discard(self, container_id: str, connection: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_DISCARDED_PACKETS):
                if not _receive(connection, scratch.space):
                    self._drop(container_id, connection)
                    return

    def _drop(self, container_id: str, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()
        left = self._idle[container_id]
        left.remove(connection)
        if not left:
            del self._idle[container_id]

    def close(self) -> None:
        """Close everything."""
        for container_id, idle in list(self._idle.items()):
            for connection in list(idle):
                self._drop(container_id, connection)


async def attach(room: Room, container: Container, client: Client, parking: Parking) -> None:
    """Serve a client until the container ends, or until the client has ended a stdin that others may use again."""
    check_running(container)
    config = container.record.config
    bundle = room.paths.bundle(container.record.id)
    bystander = config.stdin and config.stdin_once and client.stdin is None
    connection = (parking.take(bundle.name) if bystander else None) or _connect(bundle)
    session = _Session(connection, client)
    try:
        if config.tty:
            client.sizes.listen(lambda size: _resize(bundle, size))
        session.start(stdin=config.stdin, once=config.stdin_once, tty=config.tty)
        await session.over
    finally:
        client.sizes.listen(None)
        session.close()
        if bystander and not session.ended:
            parking.park(bundle.name, connection)
        else:
            connection.close()


def _resize(bundle: Path, size: Size) -> None:
    """conmon refuses sizes above 1000 together with all that came in the same read."""
    with contextlib.suppress(FailedPrecondition):
        control(bundle, f"1 {min(size.height, 1000)} {min(size.width, 1000)}")


def control(bundle: Path, message: str) -> None:
    """Write a line to conmon's control fifo: ``1 HEIGHT WIDTH`` or ``2 0 0`` (ctrl.c)."""
    try:
        fd = os.open(bundle / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, f"{message}\n".encode())
        finally:
            os.close(fd)
    except OSError as err:
        raise FailedPrecondition(f"cannot reach the monitor of container {bundle.name}: {err.strerror}") from err


def _connect(bundle: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        folder = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{folder}/attach")  # paths of sockets are limited to 107 bytes
        finally:
            os.close(folder)
    except OSError as err:
        connection.close()
        raise FailedPrecondition(f"cannot attach to container {bundle.name}: {err.strerror}") from err
    connection.setblocking(False)
    return connection


def _receive(connection: socket.socket, space: memoryview) -> int:
    """The length of a packet, 0 at the end; :class:`BlockingIOError` if there is none yet."""
    try:
        return connection.recv_into(space)
    except ConnectionError:
        return 0


class _Session:
    """One client on its connection to conmon."""

    def __init__(self, connection: socket.socket, client: Client) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection, self._client = connection, client
        self._outlets = {_STDOUT: client.stdout, _STDERR: client.stderr}
        self._writer: Writer | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self.ended = False
        """Whether conmon ended the connection, since the container has ended."""
        self.over: asyncio.Future[None] = self._loop.create_future()
        client.gone.add_done_callback(self._finish)

    def start(self, *, stdin: bool, once: bool, tty: bool) -> None:
        """Move bytes."""
        if self._client.stdin is not None:
            at_end = self._on_input_end(stdin=stdin, once=once, tty=tty)
            self._writer = Writer(self._connection.fileno(), self._client.stdin, at_end, most=_PACKET_BYTES)
            if not stdin:
                self._writer.close()  # takes everything and writes nothing
            self._writer.start()
        self._loop.add_reader(self._connection.fileno(), self._on_readable)

    def _on_input_end(self, *, stdin: bool, once: bool, tty: bool) -> Callable[[], None]:
        """What the client's end of stdin means; the peers do the same."""
        if stdin and once:
            return self._shut
        if stdin and not tty:
            return lambda: self._later(LAST_WORDS_SECONDS, self._finish)
        return lambda: None

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self._loop.call_later(seconds, what)

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _finish(self, _gone: object = None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _on_readable(self) -> None:
        """Read packets into one buffer, each over the last byte of the one before, which is put back then."""
        tag, end = 0, HEADROOM
        while end < HEADROOM + CHUNK - _LARGEST_PACKET:
            kept = scratch.buffer[end - 1]
            try:
                count = _receive(self._connection, memoryview(scratch.buffer)[end - 1 :])
            except BlockingIOError:
                break
            if not count:
                self.ended = True
                break
            found, scratch.buffer[end - 1] = scratch.buffer[end - 1], kept
            if found != tag and end > HEADROOM:
                data = scratch.buffer[end : end + count - 1]
                self._write(tag, end)
                scratch.buffer[HEADROOM : HEADROOM + len(data)] = data
                end = HEADROOM
            tag, end = found, end + count - 1
        self._write(tag, end)
        if self.ended:
            self._finish()
        else:
            self._pause_if_full(self._outlets.get(tag))

    def _write(self, tag: int, end: int) -> None:
        outlet = self._outlets.get(tag)
        if outlet is not None and end > HEADROOM and outlet.write(scratch.buffer, end):
            scratch.renew()

    def _pause_if_full(self, outlet: Outlet | None) -> None:
        if outlet is not None and outlet.full and not self.over.done():
            self._loop.remove_reader(self._connection.fileno())
            self._stalled = self._loop.call_later(STALL_SECONDS, self._dismiss)
            outlet.when_free(self._resume)

    def _resume(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if not self.over.done():
            self._loop.add_reader(self._connection.fileno(), self._on_readable)

    def _dismiss(self) -> None:
        if not self.over.done():
            problem = f"the client has read nothing for {STALL_SECONDS:g} s, the container cannot wait for it"
            self.over.set_exception(ResourceExhausted(problem))

    def close(self) -> None:
        """Let go of the connection, without closing it."""
        self._client.gone.remove_done_callback(self._finish)
        self._loop.remove_reader(self._connection.fileno())
        if self._stalled is not None:
            self._stalled.cancel()
        if self._writer is not None:
            self._writer.close()
        if not self.over.done():
            self.over.cancel()
