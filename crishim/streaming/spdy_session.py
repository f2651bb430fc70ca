"""A SPDY session on a link: joins the codec with the streams."""

from __future__ import annotations

import logging
from collections.abc import Callable

from crishim.host.pump import HEADROOM
from crishim.streaming.spdy.endpoint import Bounds, Endpoint, ProtocolError, Role
from crishim.streaming.spdy.events import DataReceived, Event, StreamOpened, StreamReset, WindowOpened
from crishim.streaming.spdy.frames import HEADER_BYTES, GoAwayStatus, ResetStatus
from crishim.streaming.streams import QUEUE_BYTES, Queued, Stream, Waiting
from crishim.streaming.wire import Link

_log = logging.getLogger(__name__)

BOUNDS = Bounds(streams=2048, window=QUEUE_BYTES // 2, session_window=QUEUE_BYTES)


class SpdySession:
    """The server's end. ``accept`` says of each new stream whether it is wanted."""

    def __init__(self, link: Link, accept: Callable[[Stream], bool]) -> None:
        self._link, self._accept = link, accept
        self._endpoint = Endpoint(Role.SERVER, BOUNDS)
        self._streams: dict[int, Stream] = {}
        self._pending: dict[int, bytearray] = {}
        self._finishing: set[int] = set()
        self._waiting = Waiting()
        self._queue = Queued(link.hold, link.release)
        self._flush()

    # of the link

    def received(self, data: memoryview) -> None:
        """Bytes of the client."""
        try:
            for event in self._endpoint.receive(data):
                self._on_event(event)
        except ProtocolError as err:
            _log.info("a client broke the SPDY protocol: %s", err)
            self._flush()
            self._link.close()
            self.gone()
            return
        self._flush()

    def free(self) -> None:
        """The link takes data again."""
        self._waiting.wake()

    def gone(self) -> None:
        """The client has left."""
        for stream in list(self._streams.values()):
            stream.ended(lost=True)
        self._streams.clear()
        self._pending.clear()
        self._waiting.wake()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._link.touch()
            stream = self._streams.get(event.stream_id)
            if stream is None:
                self._endpoint.consumed(event.stream_id, len(event.data))
                return
            if event.data:
                stream.arrived(event.data)
            if event.fin:
                stream.ended()
                self._forget_if_done(stream)
        elif isinstance(event, StreamOpened):
            self._link.touch()
            self._on_opened(event)
        elif isinstance(event, StreamReset):
            stream = self._streams.pop(event.stream_id, None)
            if stream is not None:
                self._pending.pop(event.stream_id, None)
                stream.ended(lost=True)
                self._waiting.wake()
        elif isinstance(event, WindowOpened):
            self._send_pending()

    def _on_opened(self, event: StreamOpened) -> None:
        stream = Stream(self, event.stream_id, event.headers)
        self._streams[event.stream_id] = stream
        if not event.one_way and self._accept(stream):
            self._endpoint.reply(event.stream_id)
            if event.fin:
                stream.ended()
        else:
            del self._streams[event.stream_id]
            self._endpoint.reset(event.stream_id, ResetStatus.PROTOCOL_ERROR)

    def _flush(self) -> None:
        self._link.send_bytes(self._endpoint.take())

    # of the streams

    def send(self, stream: Stream, buffer: bytearray, end: int) -> bool:
        """Send data, as far as the peer's windows let it; the rest is kept."""
        self._link.touch()
        length = end - HEADROOM
        allowed = self._endpoint.allowance(stream.id)
        if stream.id in self._pending or allowed < length:
            self._pending.setdefault(stream.id, bytearray()).extend(memoryview(buffer)[HEADROOM:end])
            self._send_pending()
            return False
        return self._send(stream.id, buffer, end)

    def _send(self, stream_id: int, buffer: bytearray, end: int) -> bool:
        start = HEADROOM - HEADER_BYTES
        self._flush()
        buffer[start:HEADROOM] = self._endpoint.data_header(stream_id, end - HEADROOM)
        return self._link.send(buffer, start, end)

    def _send_pending(self) -> None:
        for stream_id, data in list(self._pending.items()):
            count = min(self._endpoint.allowance(stream_id), len(data))
            if count:
                self._send(stream_id, bytearray(HEADROOM) + data[:count], HEADROOM + count)
                del data[:count]
            if not data:
                del self._pending[stream_id]
                if stream_id in self._finishing:
                    self._finish(stream_id)
                    self._forget_if_done(self._streams[stream_id])
        self._waiting.wake()

    def finish(self, stream: Stream) -> None:
        """Half-close."""
        if stream.id in self._pending:
            self._finishing.add(stream.id)
        else:
            self._finish(stream.id)
        self._forget_if_done(stream)

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.done and stream.id not in self._pending:
            self._streams.pop(stream.id, None)

    def _finish(self, stream_id: int) -> None:
        self._finishing.discard(stream_id)
        self._flush()
        self._link.send_bytes(self._endpoint.data_header(stream_id, 0, fin=True))

    def reset(self, stream: Stream) -> None:
        """Kill a stream."""
        self._streams.pop(stream.id, None)
        self._pending.pop(stream.id, None)
        self._endpoint.reset(stream.id)
        self._flush()

    def full(self, stream: Stream) -> bool:
        """Whether data should wait: for the link, or for the peer's window."""
        return self._link.full or stream.id in self._pending

    def when_free(self, stream: Stream, resume: Callable[[], None]) -> None:
        """Go on later."""
        self._waiting.add(stream, resume)

    def consumed(self, stream: Stream, count: int) -> None:
        """Open the peer's window again."""
        self._endpoint.consumed(stream.id, count)
        self._flush()

    def queued(self, delta: int) -> None:
        """Count what is kept."""
        self._queue.add(delta)

    @property
    def unsent(self) -> bool:
        """Whether data waits for windows of the peer."""
        return bool(self._pending)

    def close(self) -> None:
        """Say goodbye and close."""
        self._endpoint.go_away(GoAwayStatus.OK)
        self._flush()
        self._link.close()
