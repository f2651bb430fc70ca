"""Port-forward for one client: pairs of streams over SPDY, or pairs of channels over WebSocket.

Source: k8s.io/kubelet, cri/streaming/portforward. A pair is an ``error`` and a ``data`` stream with the same
``requestid``; of old clients without it, the error stream comes first and the data stream has the next ID.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from crishim.errors import CrishimError
from crishim.streaming.channels import FORWARD_DIALECTS
from crishim.streaming.handshake import Upgraded, is_tunnel
from crishim.streaming.spdy_session import SpdySession
from crishim.streaming.streams import Stream
from crishim.streaming.websocket import ChannelSession, Tunnel, WebSocket
from crishim.streaming.wire import Link, Wire

_log = logging.getLogger(__name__)

MAX_PAIRS = 1000
"""Forwarded connections of one client at once."""


@dataclass(frozen=True)
class ForwardJob:
    """What a token of port-forward is for: ``connect`` forwards a stream to a port until either ends."""

    connect: Callable[[int, Stream], Awaitable[None]]
    ports: tuple[int, ...] = ()
    """Only of use to clients with channels; others name ports with each pair."""


class _Pair:
    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: dict[str, Stream] = {}
        self.timer: asyncio.TimerHandle | None = None


class Pairs:
    """Brings streams together and forwards each pair in a task of its own."""

    def __init__(self, job: ForwardJob, creation_timeout: float) -> None:
        self._job, self._timeout = job, creation_timeout
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, _Pair] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, stream: Stream) -> bool:
        """Whether a new stream is half of a pair."""
        kind, port = stream.headers.get("streamtype", ""), _port(stream.headers.get("port", ""))
        if kind not in ("error", "data") or port is None or len(self._waiting) + len(self._tasks) >= MAX_PAIRS:
            return False
        number = stream.headers.get("requestid", "") or f"#{stream.id - (2 if kind == 'data' else 0)}"
        pair = self._waiting.get(number)
        if pair is None:
            pair = self._waiting[number] = _Pair(port)
            pair.timer = self._loop.call_later(self._timeout, self._expire, number)
        if kind in pair.streams or port != pair.port:
            return False
        pair.streams[kind] = stream
        if len(pair.streams) == 2:
            self._begin(number, pair)
        return True

    def _expire(self, number: str) -> None:
        for stream in self._waiting.pop(number).streams.values():
            stream.reset()

    def _begin(self, number: str, pair: _Pair) -> None:
        del self._waiting[number]
        assert pair.timer is not None
        pair.timer.cancel()
        task = self._loop.create_task(forward(self._job, pair.port, pair.streams["data"], pair.streams["error"]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End everything."""
        for pair in self._waiting.values():
            assert pair.timer is not None
            pair.timer.cancel()
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _port(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text[:6]) <= 65535 and len(text) < 6 else None


async def forward(job: ForwardJob, port: int, data: Stream, error: Stream) -> None:
    """Forward one connection; why it failed goes to the error stream."""
    try:
        await job.connect(port, data)
    except CrishimError as err:
        _log.info("port-forward: %s", err.message)
        error.send(err.message.encode(errors="replace"))
    except Exception as err:
        _log.exception("port-forward failed unexpectedly")
        error.send(f"unexpected {type(err).__name__}: {err}".encode())
    finally:
        for stream in (data, error):
            stream.finish()
            stream.ignore()


async def serve_spdy(wire: Wire, trailing: bytes, job: ForwardJob, creation_timeout: float) -> None:
    """Serve a client that speaks SPDY."""
    pairs = Pairs(job, creation_timeout)
    session = SpdySession(wire, pairs.accept)
    wire.receive_by(session)
    session.received(memoryview(trailing))
    await _until_left(wire, session, pairs)


async def serve_websocket(
    wire: Wire, trailing: bytes, job: ForwardJob, upgraded: Upgraded, creation_timeout: float
) -> None:
    """Serve a client that speaks WebSocket, in either of the two ways."""
    socket = WebSocket(wire, upgraded.connection)
    if not is_tunnel(upgraded.protocol):
        await _serve_channels(socket, trailing, job, upgraded.protocol)
        return
    tunnel, pairs = Tunnel(socket), Pairs(job, creation_timeout)
    session = SpdySession(tunnel, pairs.accept)
    tunnel.receive_by(session)
    socket.received(memoryview(trailing))
    await _until_left(wire, session, pairs)


async def _until_left(wire: Wire, session: SpdySession, pairs: Pairs) -> None:
    try:
        await asyncio.wait([wire.left])
    finally:
        session.close()
        await pairs.close()


async def _serve_channels(socket: WebSocket, trailing: bytes, job: ForwardJob, protocol: str) -> None:
    """Channel 2n carries the data and 2n+1 the errors of the n-th port; the port comes first, as two bytes."""
    count = len(job.ports)
    session = ChannelSession(socket, FORWARD_DIALECTS[protocol], 2 * count, range(0, 2 * count, 2))
    socket.receive_by(session)
    for number, port in enumerate(job.ports):
        for stream in session.streams[2 * number : 2 * number + 2]:
            stream.send(struct.pack("<H", port))
    socket.received(memoryview(trailing))
    ends = [
        forward(job, port, session.streams[2 * number], session.streams[2 * number + 1])
        for number, port in enumerate(job.ports)
    ]
    try:
        await asyncio.gather(*ends)
    finally:
        socket.close()


__all__ = ["ForwardJob", "Link", "Pairs", "forward", "serve_spdy", "serve_websocket"]
