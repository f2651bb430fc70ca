"""One connection to a client: an asyncio transport with bounds in both directions.

Sending is bounded because readers of pipes ask :attr:`Wire.full` first, and because nothing more is received
while answers that nobody reads pile up. Receiving is bounded because whoever cannot take more holds the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import Callable
from typing import Protocol, cast

_log = logging.getLogger(__name__)

FULL_BYTES = 256 << 10
"""What waits to be sent before pipes are not read any more."""
CHOKED_BYTES = 1 << 20
"""What waits to be sent before nothing is received any more: pongs and resets for one who does not read them."""
CLOSE_SECONDS = 30.0
"""How long a client may take to read what waits for it when the connection is closed."""
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""Seconds, seconds, probes: a client whose machine died is noticed after two minutes (tcp(7))."""


class Receiver(Protocol):
    """Who understands what a wire receives."""

    def received(self, data: memoryview) -> None:
        """Some bytes, valid during the call."""

    def free(self) -> None:
        """The wire is not full any more."""

    def gone(self) -> None:
        """The client has left, or the connection is lost; called once."""


class Link(Protocol):
    """What a session of streams sends by: a wire, or a WebSocket that carries another protocol."""

    @property
    def full(self) -> bool:
        """Whether data should wait."""

    def send(self, buffer: bytearray, start: int, end: int) -> bool:
        """Send ``buffer[start:end]``, overwriting what is before if it must. True: the buffer is still in use."""

    def send_bytes(self, data: bytes) -> None:
        """Send some bytes of control."""

    def hold(self) -> None:
        """Receive nothing until :meth:`release`."""

    def release(self) -> None:
        """Receive again."""

    def touch(self) -> None:
        """Something happened that counts against idleness."""

    def close(self) -> None:
        """Send what waits, then close."""


_receive_buffer = bytearray(256 << 10)
"""Of all wires: what is received is dealt with before the next one receives."""
_receive_view = memoryview(_receive_buffer)


class Wire(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, connected: Callable[[Wire], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._connected = connected
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._holds = 0
        self._choked = self._gone = self._closing = False
        self._watch: select.epoll | None = None
        self._touched = self._loop.time()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.full = False
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is no more."""
        self.left: asyncio.Future[None] = self._loop.create_future()
        """Done when the client will send nothing more."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=FULL_BYTES, low=FULL_BYTES // 4)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connected(self)

    def receive_by(self, receiver: Receiver) -> None:
        """From now on ``receiver`` gets what is received."""
        self._receiver = receiver
        if self._gone:
            receiver.gone()

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where to receive to."""
        return _receive_view

    def buffer_updated(self, nbytes: int) -> None:
        """Something was received."""
        if self._receiver is None or self._gone:
            return
        try:
            self._receiver.received(_receive_view[:nbytes])
        except Exception:
            _log.exception("a connection is closed")
            self.abort()

    def eof_received(self) -> bool:
        """The client sends nothing more: our clients only do that when they leave."""
        self._on_gone()
        self.close()
        return False

    def connection_lost(self, _exc: Exception | None) -> None:
        """The connection is no more."""
        self._on_gone()
        for timer in self._timers.values():
            timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def _on_gone(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._watch_hangup(on=False)
        if not self.left.done():
            self.left.set_result(None)
        if self._receiver is not None:
            self._receiver.gone()

    def pause_writing(self) -> None:
        """asyncio: too much waits to be sent."""
        self.full = True

    def resume_writing(self) -> None:
        """asyncio: enough of it is sent."""
        self.full = False
        if self._choked:
            self._choked = False
            self.release()
        if self._receiver is not None and not self._gone:
            self._receiver.free()

    @property
    def waiting(self) -> int:
        """Bytes that wait to be sent."""
        return self._transport.get_write_buffer_size() if self._transport is not None and not self._gone else 0

    def send(self, buffer: bytearray, start: int, end: int) -> bool:
        """Send ``buffer[start:end]``; True if the buffer is needed until it is sent."""
        if self._gone or self._closing or self._transport is None:
            return False
        self._transport.write(memoryview(buffer)[start:end])
        return self._transport.get_write_buffer_size() > 0

    def send_bytes(self, data: bytes) -> None:
        """Send some bytes."""
        if self._gone or self._closing or self._transport is None or not data:
            return
        self._transport.write(data)
        if self.full and not self._choked and self._transport.get_write_buffer_size() > CHOKED_BYTES:
            self._choked = True
            self.hold()

    def hold(self) -> None:
        """Receive nothing until each hold is released; that the client leaves is noticed all the same."""
        self._holds += 1
        if self._holds == 1 and self._transport is not None and not self._gone:
            self._transport.pause_reading()
            self._watch_hangup(on=True)

    def release(self) -> None:
        """Take back one hold."""
        self._holds -= 1
        if self._holds == 0 and self._transport is not None and not self._gone:
            self._watch_hangup(on=False)
            self._transport.resume_reading()

    def _watch_hangup(self, *, on: bool) -> None:
        """A paused transport sees no end of file: an epoll descriptor of our own does (EPOLLRDHUP, epoll_ctl(2))."""
        if on and self._transport is not None:
            self._watch = select.epoll()
            self._watch.register(self._transport.get_extra_info("socket").fileno(), select.EPOLLRDHUP)
            self._loop.add_reader(self._watch.fileno(), self._on_hangup)
        elif self._watch is not None:
            self._loop.remove_reader(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _on_hangup(self) -> None:
        self._on_gone()
        self.abort()

    def touch(self) -> None:
        """Not idle."""
        self._touched = self._loop.time()

    def limit_idle(self, seconds: float) -> None:
        """Close the connection when nothing has happened on it for so long."""
        if self._gone:
            return
        left = self._touched + seconds - self._loop.time()
        if left > 0:
            self._timers["idle"] = self._loop.call_later(left, self.limit_idle, seconds)
        else:
            _log.info("closing a connection that was idle for %g s", seconds)
            self.abort()

    def close(self) -> None:
        """Send what waits, then close."""
        if not self._closing and self._transport is not None:
            self._closing = True
            self._transport.close()
            self._timers["close"] = self._loop.call_later(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
