"""Port-forward: connects a client's stream to a port on the loopback address of a pod."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from crishim.errors import CrishimError, FailedPrecondition, HostFailure, Unavailable
from crishim.host import namespaces
from crishim.host.pump import Inlet, Outlet, Reader, Writer
from crishim.host.threads import in_thread
from crishim.model.records import SandboxState
from crishim.pods.network import is_pinned
from crishim.pods.room import Room
from crishim.pods.table import Sandbox

CONNECT_SECONDS = 5.0
LINGER_SECONDS = 1.0
"""How long a client may still send after the pod's side has ended; Kubernetes' clients stop at once."""
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Duplex(Inlet, Outlet, Protocol):
    """A client's stream, both ways."""

    @property
    def broken(self) -> asyncio.Future[None]:
        """Done once the client has reset it or left."""


def check_ready(sandbox: Sandbox) -> None:
    """:class:`FailedPrecondition` unless the sandbox is ready."""
    if sandbox.record.state is not SandboxState.READY:
        raise FailedPrecondition(f"pod sandbox {sandbox.record.id} is not ready")


async def forward(room: Room, sandbox: Sandbox, port: int, client: Duplex) -> None:
    """Forward one connection until both sides have ended, or one of them has broken off."""
    check_ready(sandbox)
    with await _connect(room, sandbox, port) as connection:
        session = _Session(connection, client)
        try:
            await session.run()
        finally:
            session.close()


async def _connect(room: Room, sandbox: Sandbox, port: int) -> socket.socket:
    """Connect to the port by IPv4, else by IPv6."""
    sockets = await in_thread(lambda: _sockets(_namespace(room, sandbox)))
    reasons: list[str] = []
    try:
        for (_, address), connection in zip(_LOOPBACK, sockets, strict=False):
            connection.setblocking(False)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await asyncio.get_running_loop().sock_connect(connection, (address, port))
            except (OSError, TimeoutError) as err:
                reasons.append(f"{address}: {_cause(err).lower()}")
            else:
                sockets.remove(connection)
                return connection
    finally:
        for connection in sockets:
            connection.close()
    raise Unavailable(f"cannot connect to port {port} of pod sandbox {sandbox.record.id}: {', '.join(reasons)}")


def _namespace(room: Room, sandbox: Sandbox) -> list[Path]:
    if sandbox.record.host_network:
        return []
    path = room.containers.paths.namespaces(sandbox.record.id) / "net"
    if not is_pinned(path):
        raise FailedPrecondition(f"pod sandbox {sandbox.record.id} has lost its network namespace")
    return [path]


def _sockets(paths: Iterable[Path]) -> list[socket.socket]:
    """One socket of each family, made inside the namespaces: it stays theirs, whoever uses it. Blocks."""

    def make() -> list[socket.socket]:
        made = []
        for family, _ in _LOOPBACK:
            with contextlib.suppress(OSError):  # a kernel without IPv6
                made.append(socket.socket(family, socket.SOCK_STREAM))
        return made

    try:
        return namespaces.enter(paths, make)
    except OSError as err:
        raise HostFailure(f"cannot enter the network namespace: {err.strerror}") from err


class _Session:
    """Moves the bytes of one forwarded connection."""

    def __init__(self, connection: socket.socket, client: Duplex) -> None:
        self._connection, self._client = connection, client
        self._loop = asyncio.get_running_loop()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = Reader(connection.fileno(), client)
        self._writer = Writer(connection.fileno(), client, self._on_client_end)
        self._client_ended: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Until both have ended. A client that resets its stream ends both."""
        self._reader.start()
        self._writer.start()
        either: tuple[asyncio.Future[Any], ...] = (self._reader.ended, self._client_ended)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._reader.ended.done():  # the client has half-closed: the pod may still answer
            either = (self._reader.ended, self._client.broken)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        elif not self._client_ended.done():
            await asyncio.wait([self._client_ended], timeout=LINGER_SECONDS)
        error = self._reader.ended.result() if self._reader.ended.done() else None
        if error is not None and error.errno not in (errno.ECONNRESET, errno.EPIPE):
            raise _failure(error)

    def _on_client_end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR if self._client.broken.done() else socket.SHUT_WR)
        if not self._client_ended.done():
            self._client_ended.set_result(None)

    def close(self) -> None:
        """Let go of the connection, without closing it."""
        self._writer.close()
        self._reader.close()


def _cause(error: OSError) -> str:
    """The kernel's words: asyncio has its own, with the address in them. A timeout has no number."""
    return os.strerror(error.errno) if error.errno else "timed out"


def _failure(error: OSError) -> CrishimError:
    return HostFailure(f"the connection to the pod broke: {_cause(error)}")
