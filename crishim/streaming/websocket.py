"""WebSocket on a wire (RFC 6455): channels for exec and attach, or a tunnel for SPDY.

Receiving, handshake and control frames are wsproto's. Data frames that we send are written here, since their
header goes into the free bytes before the data, without a copy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from crishim.host.pump import HEADROOM
from crishim.streaming.channels import ChannelDecoder, ChannelError, Dialect, binary_header, text_message
from crishim.streaming.streams import Queued, Stream, Waiting
from crishim.streaming.wire import Receiver, Wire

_log = logging.getLogger(__name__)


class MessageReceiver(Protocol):
    """Who understands the messages."""

    def message(self, data: bytes, *, finished: bool) -> None:
        """A part of a message. :class:`ChannelError` closes the connection."""

    def free(self) -> None:
        """The wire is not full any more."""

    def gone(self) -> None:
        """The client has left."""


class WebSocket:
    """The server's end of a connection whose handshake is done."""

    def __init__(self, wire: Wire, connection: Connection) -> None:
        self.wire = wire
        self._connection = connection
        self._receiver: MessageReceiver | None = None
        self._closed = False

    def receive_by(self, receiver: MessageReceiver) -> None:
        """From now on ``receiver`` gets the messages."""
        self._receiver = receiver
        self.wire.receive_by(self)

    def received(self, data: memoryview) -> None:
        """Bytes of the client."""
        if self._closed:
            return
        try:
            self._connection.receive_data(data)  # type: ignore[arg-type]  # it only appends them to a bytearray
            for event in self._connection.events():
                self._on_event(event)
        except RemoteProtocolError as err:
            _log.info("a client broke the WebSocket protocol: %s", err)
            self.close(CloseReason.PROTOCOL_ERROR)
        except ChannelError as err:
            _log.info("a client broke the channel protocol: %s", err)
            self.close(CloseReason.PROTOCOL_ERROR, str(err))

    def _on_event(self, event: object) -> None:
        if isinstance(event, BytesMessage | TextMessage) and self._receiver is not None:
            data = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
            self._receiver.message(data, finished=event.message_finished)
        elif isinstance(event, Ping):
            self._send_event(event.response())
        elif isinstance(event, CloseConnection):
            self._send_event(event.response())
            self._closed = True
            self.wire.close()
            self.gone()

    def _send_event(self, event: Pong | CloseConnection) -> None:
        with contextlib.suppress(LocalProtocolError):
            self.wire.send_bytes(bytes(self._connection.send(event)))

    def free(self) -> None:
        """The wire takes data again."""
        if self._receiver is not None:
            self._receiver.free()

    def gone(self) -> None:
        """The client has left."""
        self._closed = True
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.gone()

    def send(self, buffer: bytearray, start: int, end: int) -> bool:
        """Send ``buffer[start:end]`` as one binary message, its header is put before it."""
        header = binary_header(end - start)
        begin = start - len(header)
        buffer[begin:start] = header
        return self.wire.send(buffer, begin, end)

    def close(self, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Say why and close once it is sent."""
        self.say_close(code, reason)
        self.wire.close()
        self.gone()

    def say_close(self, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Begin the closing handshake: what the client still sends is not looked at."""
        self._send_event(CloseConnection(code=code, reason=reason[:120] or None))


class Tunnel:
    """The link of a SPDY session whose bytes are the client's binary messages (KEP-4006)."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._session: Receiver | None = None

    def receive_by(self, session: Receiver) -> None:
        """Join with the session."""
        self._session = session
        self._socket.receive_by(self)

    def message(self, data: bytes, *, finished: bool) -> None:
        """Some of the session's bytes; where messages end means nothing."""
        if self._session is not None:
            self._session.received(memoryview(data))

    def free(self) -> None:
        """The wire takes data again."""
        if self._session is not None:
            self._session.free()

    def gone(self) -> None:
        """The client has left."""
        if self._session is not None:
            self._session.gone()

    @property
    def full(self) -> bool:
        """Whether data should wait."""
        return self._socket.wire.full

    def send(self, buffer: bytearray, start: int, end: int) -> bool:
        """Send the session's bytes."""
        return self._socket.send(buffer, start, end)

    def send_bytes(self, data: bytes) -> None:
        """Send the session's control frames."""
        if data:
            self._socket.wire.send_bytes(binary_header(len(data)) + data)

    def hold(self) -> None:
        """Receive nothing for now."""
        self._socket.wire.hold()

    def release(self) -> None:
        """Receive again."""
        self._socket.wire.release()

    def touch(self) -> None:
        """Not idle: there was data, not only pings of the session inside."""
        self._socket.wire.touch()

    def close(self) -> None:
        """Close."""
        self._socket.close()


class ChannelSession:
    """Channels as streams. ``readable`` are those that the client may send on."""

    def __init__(self, socket: WebSocket, dialect: Dialect, channels: int, readable: Iterable[int]) -> None:
        self._socket, self._dialect = socket, dialect
        self._decoder = ChannelDecoder(dialect)
        self._readable = frozenset(readable)
        self._waiting = Waiting()
        self._queue = Queued(socket.wire.hold, socket.wire.release)
        self.streams = [Stream(self, number, {}) for number in range(channels)]

    def message(self, data: bytes, *, finished: bool) -> None:
        """A part of a message of the client; what is for no channel to be read is ignored."""
        self._socket.wire.touch()
        piece = self._decoder.receive(data, message_finished=finished)
        if piece is None:
            return
        if piece.channel in self._readable:
            stream = self.streams[piece.channel]
            if piece.closed:
                stream.ended()
            else:
                stream.arrived(piece.data)

    def free(self) -> None:
        """The wire takes data again."""
        self._waiting.wake()

    def gone(self) -> None:
        """The client has left."""
        for stream in self.streams:
            stream.ended(lost=True)
        self._waiting.wake()

    def send(self, stream: Stream, buffer: bytearray, end: int) -> bool:
        """Send data on a channel."""
        self._socket.wire.touch()
        if self._dialect.base64:
            self._socket.wire.send_bytes(text_message(stream.id, memoryview(buffer)[HEADROOM:end]))
            return False
        buffer[HEADROOM - 1] = stream.id
        return self._socket.send(buffer, HEADROOM - 1, end)

    def finish(self, stream: Stream) -> None:
        """Servers do not close channels: the end of the connection does."""

    def reset(self, stream: Stream) -> None:
        """As little."""

    def full(self, _stream: Stream) -> bool:
        """Whether data should wait."""
        return self._socket.wire.full

    def when_free(self, stream: Stream, resume: Callable[[], None]) -> None:
        """Go on later."""
        self._waiting.add(stream, resume)

    def consumed(self, stream: Stream, count: int) -> None:
        """There is no flow control but TCP's."""

    def queued(self, delta: int) -> None:
        """Count what is kept."""
        self._queue.add(delta)
