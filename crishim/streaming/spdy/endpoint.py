"""One end of a SPDY/3.1 session: bytes in, events out. It does no I/O and knows no time."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from crishim.streaming.spdy import frames
from crishim.streaming.spdy.events import (
    DataReceived,
    Event,
    GoneAway,
    HeadersReceived,
    PongReceived,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WindowOpened,
)
from crishim.streaming.spdy.flow import ReceiveWindow, SendWindows, WindowError
from crishim.streaming.spdy.frames import FLAG_FIN, FLAG_UNIDIRECTIONAL, FrameError, GoAwayStatus, Kind, ResetStatus
from crishim.streaming.spdy.headers import HeaderDecoder, HeaderEncoder, HeaderError
from crishim.streaming.spdy.reader import ControlFrame, DataPart, FrameReader
from crishim.streaming.spdy.states import FAULTS, TRANSITIONS, Act, Half

MAX_SKIPPED = 256
"""How many stream IDs the peer may leave out and use later."""


class Role(enum.Enum):
    """Which end: the client's streams and pings have odd numbers, the server's even ones."""

    CLIENT = 1
    SERVER = 2


class LocalError(Exception):
    """Our side tried what the protocol forbids."""


class ProtocolError(Exception):
    """The peer broke the protocol beyond one stream: nothing more is understood, GOAWAY is to be sent."""


@dataclass(frozen=True)
class Bounds:
    """``streams`` that the peer may have open at once, bytes of ``window`` for each and of ``session_window``."""

    streams: int = 2048
    window: int = frames.INITIAL_WINDOW
    session_window: int = frames.INITIAL_WINDOW


class _Stream:
    __slots__ = ("ours", "received", "theirs")

    def __init__(self, ours: Half, theirs: Half, window: int) -> None:
        self.ours, self.theirs = ours, theirs
        self.received = ReceiveWindow(window)


class Endpoint:
    """The state of a session."""

    def __init__(self, role: Role, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._next_id = self._next_ping = role.value
        self._peer_parity = 1 if role is Role.SERVER else 0
        self._encoder, self._decoder = HeaderEncoder(), HeaderDecoder()
        self._streams: dict[int, _Stream] = {}
        self._windows = SendWindows()
        self._received = ReceiveWindow(self._bounds.session_window)
        self._last_id = 0
        self._skipped: set[int] = set()
        self._leaving = self._left = self._broken = False
        self._out: list[bytes] = []
        self._reader = FrameReader()
        if self._bounds.session_window > frames.INITIAL_WINDOW:
            self._open_window(0, self._bounds.session_window - frames.INITIAL_WINDOW)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    @property
    def flow_controlled(self) -> bool:
        """Whether the peer has shown that it uses flow control."""
        return self._windows.active

    def take(self) -> bytes:
        """What is to be sent besides data, and forget it: to be called after each other call."""
        if not self._out:
            return b""
        data = b"".join(self._out)
        self._out.clear()
        return data

    # -- our side

    def open(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """Open a stream; the result is its ID."""
        if self._leaving or self._left or self._broken:
            raise LocalError("the session takes no new streams")
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._add(stream_id, Half.CLOSED if fin else Half.OPEN, Half.WAITING)
        block = self._encoder.encode(headers)
        self._out.append(frames.syn_stream(stream_id, block, FLAG_FIN if fin else 0))
        return stream_id

    def reply(self, stream_id: int, headers: Mapping[str, str] | None = None, *, fin: bool = False) -> None:
        """Accept a stream that the peer opened."""
        self._act(stream_id, Act.REPLY, fin=fin)
        block = self._encoder.encode(headers or {})
        self._out.append(frames.with_block(Kind.SYN_REPLY, stream_id, block, FLAG_FIN if fin else 0))

    def send_headers(self, stream_id: int, headers: Mapping[str, str], *, fin: bool = False) -> None:
        """Send more headers."""
        self._act(stream_id, Act.HEADERS, fin=fin)
        block = self._encoder.encode(headers)
        self._out.append(frames.with_block(Kind.HEADERS, stream_id, block, FLAG_FIN if fin else 0))

    def allowance(self, stream_id: int) -> int:
        """Bytes that may be sent on a stream now."""
        return self._windows.allowance(stream_id)

    def data_header(self, stream_id: int, length: int, *, fin: bool = False) -> bytes:
        """What is to be sent before ``length`` bytes of data; the data follows without passing through here.

        What :meth:`take` has must be sent before.
        """
        if length > self._windows.allowance(stream_id):
            raise LocalError(f"{length} bytes on stream {stream_id} are more than its window")
        self._windows_sent(stream_id, length)
        self._act(stream_id, Act.DATA, fin=fin)
        return frames.data_header(stream_id, length, fin=fin)

    def _windows_sent(self, stream_id: int, length: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or (stream.ours, Act.DATA) not in TRANSITIONS:
            raise LocalError(f"stream {stream_id} is not open for data")
        self._windows.sent(stream_id, length)

    def reset(self, stream_id: int, status: ResetStatus = ResetStatus.CANCEL) -> None:
        """Kill a stream; one that is closed already is left alone."""
        if self._streams.pop(stream_id, None) is not None:
            self._windows.drop(stream_id)
            self._out.append(frames.two_words(Kind.RST_STREAM, stream_id, status))

    def consumed(self, stream_id: int, count: int) -> None:
        """Data of a stream was dealt with: the peer may send so much more."""
        if not count:
            return
        self._tell(0, self._received.consumed(count))
        stream = self._streams.get(stream_id)
        if stream is not None and stream.theirs is Half.OPEN:
            self._tell(stream_id, stream.received.consumed(count))

    def ping(self) -> int:
        """Ask for a :class:`PongReceived` with the number that is the result."""
        number, self._next_ping = self._next_ping, self._next_ping + 2
        self._out.append(frames.ping(number))
        return number

    def go_away(self, status: GoAwayStatus = GoAwayStatus.OK) -> None:
        """Say that we take no new streams; repeating it is harmless."""
        if not self._leaving:
            self._leaving = True
            self._out.append(frames.two_words(Kind.GOAWAY, self._last_id, status))

    def update_settings(self, values: Mapping[int, int]) -> None:
        """Send SETTINGS."""
        self._out.append(frames.settings(values))

    def _open_window(self, stream_id: int, delta: int) -> None:
        self._out.append(frames.two_words(Kind.WINDOW_UPDATE, stream_id, delta))

    def _tell(self, stream_id: int, delta: int) -> None:
        if delta:
            self._open_window(stream_id, delta)

    def _add(self, stream_id: int, ours: Half, theirs: Half) -> None:
        self._streams[stream_id] = _Stream(ours, theirs, self._bounds.window)
        self._windows.add(stream_id)

    def _act(self, stream_id: int, act: Act, *, fin: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise LocalError(f"stream {stream_id} is not open")
        for each in (act, Act.FIN) if fin else (act,):
            if (stream.ours, each) not in TRANSITIONS:
                raise LocalError(f"{each.value} on stream {stream_id}, whose half of ours is {stream.ours.value}")
            stream.ours = TRANSITIONS[stream.ours, each]
        self._drop_if_closed(stream_id, stream)

    def _drop_if_closed(self, stream_id: int, stream: _Stream) -> None:
        if stream.ours is stream.theirs is Half.CLOSED:
            del self._streams[stream_id]
            self._windows.drop(stream_id)

    # -- their side

    def receive(self, data: bytes | memoryview) -> Iterator[Event]:
        """What the bytes mean, one by one: each event must be taken before the next one becomes true.

        :class:`ProtocolError` ends the session, :meth:`take` has its GOAWAY then.
        """
        if self._broken:
            raise ProtocolError("the session is broken already")
        try:
            for part in self._reader.feed(memoryview(data)):
                yield from self._on_part(part)
        except (FrameError, HeaderError, WindowError, ProtocolError) as err:
            self._broken = True
            self.go_away(GoAwayStatus.PROTOCOL_ERROR)
            raise ProtocolError(str(err)) from err

    def _on_part(self, part: DataPart | ControlFrame) -> list[Event]:
        events: list[Event] = []
        if isinstance(part, DataPart):
            self._deliver(part, events)
        elif part.kind in self._HANDLERS:  # unknown types are to be ignored (2.2.1)
            self._HANDLERS[part.kind](self, part.payload, part.flags, events)
        return events

    def _deliver(self, part: DataPart, events: list[Event]) -> None:
        if self._peer_acts(part.stream_id, Act.DATA, fin=part.fin, events=events):
            events.append(DataReceived(part.stream_id, part.data, part.fin))
        else:
            self._tell(0, self._received.consumed(len(part.data)))

    def _peer_acts(self, stream_id: int, act: Act, *, fin: bool, events: list[Event]) -> bool:
        """Whether what the peer does on a stream is allowed; if not, the stream is reset or the frame ignored."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if not self._was_known(stream_id):
                self._out.append(frames.two_words(Kind.RST_STREAM, stream_id, ResetStatus.INVALID_STREAM))
            return False  # of a stream that is closed, frames may still be under way
        for each in (act, Act.FIN) if fin else (act,):
            if (stream.theirs, each) not in TRANSITIONS:
                status = FAULTS[stream.theirs, each]
                self.reset(stream_id, status)
                events.append(StreamReset(stream_id, status))
                return False
            stream.theirs = TRANSITIONS[stream.theirs, each]
        self._drop_if_closed(stream_id, stream)
        return True

    def _was_known(self, stream_id: int) -> bool:
        if stream_id % 2 == self._peer_parity:
            return stream_id <= self._last_id and stream_id not in self._skipped
        return stream_id < self._next_id

    def _on_syn_stream(self, payload: bytes, flags: int, events: list[Event]) -> None:
        stream_id, block = frames.parse_syn_stream(payload)
        headers = self._decoder.decode(block)  # whatever comes of the stream: the state goes on
        self._check_new(stream_id)
        if self._leaving or self._left:
            return
        if len(self._streams) >= self._bounds.streams:
            self._out.append(frames.two_words(Kind.RST_STREAM, stream_id, ResetStatus.REFUSED_STREAM))
            return
        fin, one_way = bool(flags & FLAG_FIN), bool(flags & FLAG_UNIDIRECTIONAL)
        if fin and one_way:
            return
        self._add(stream_id, Half.CLOSED if one_way else Half.WAITING, Half.CLOSED if fin else Half.OPEN)
        if self._bounds.window > frames.INITIAL_WINDOW and not fin:
            self._open_window(stream_id, self._bounds.window - frames.INITIAL_WINDOW)
        events.append(StreamOpened(stream_id, headers, fin, one_way))

    def _check_new(self, stream_id: int) -> None:
        """Stream IDs must grow (2.3.2). Go clients that open several at once may swap two: that is let pass."""
        if stream_id % 2 != self._peer_parity or stream_id == 0:
            raise ProtocolError(f"the peer cannot open stream {stream_id}")
        if stream_id <= self._last_id:
            if stream_id not in self._skipped:
                raise ProtocolError(f"stream {stream_id} opened after stream {self._last_id}")
            self._skipped.remove(stream_id)
            return
        first = self._last_id + 2 if self._last_id else 2 - self._peer_parity
        self._skipped.update(range(max(first, stream_id - 2 * MAX_SKIPPED), stream_id, 2))
        if len(self._skipped) > MAX_SKIPPED:
            self._skipped = set(sorted(self._skipped)[-MAX_SKIPPED:])
        self._last_id = stream_id

    def _on_syn_reply(self, payload: bytes, flags: int, events: list[Event]) -> None:
        stream_id, block = frames.parse_with_block(payload)
        headers, fin = self._decoder.decode(block), bool(flags & FLAG_FIN)
        if self._peer_acts(stream_id, Act.REPLY, fin=fin, events=events):
            events.append(StreamReplied(stream_id, headers, fin))

    def _on_headers(self, payload: bytes, flags: int, events: list[Event]) -> None:
        stream_id, block = frames.parse_with_block(payload)
        headers, fin = self._decoder.decode(block), bool(flags & FLAG_FIN)
        if self._peer_acts(stream_id, Act.HEADERS, fin=fin, events=events):
            events.append(HeadersReceived(stream_id, headers, fin))

    def _on_rst_stream(self, payload: bytes, _flags: int, events: list[Event]) -> None:
        stream_id, status = frames.parse_two_words(payload)
        if self._streams.pop(stream_id, None) is not None:
            self._windows.drop(stream_id)
            events.append(StreamReset(stream_id, status))

    def _on_settings(self, payload: bytes, _flags: int, events: list[Event]) -> None:
        size = frames.parse_settings(payload).get(frames.SETTINGS_INITIAL_WINDOW_SIZE)
        if size is not None:
            self._windows.set_initial(size)
            events.append(WindowOpened(0))

    def _on_ping(self, payload: bytes, _flags: int, events: list[Event]) -> None:
        number = frames.parse_ping(payload)
        if number % 2 == self._peer_parity:
            self._out.append(frames.ping(number))
        else:
            events.append(PongReceived(number))

    def _on_go_away(self, payload: bytes, _flags: int, events: list[Event]) -> None:
        last_good, status = frames.parse_two_words(payload)
        self._left = True
        events.append(GoneAway(last_good, status))

    def _on_window_update(self, payload: bytes, _flags: int, events: list[Event]) -> None:
        stream_id, delta = frames.parse_two_words(payload)
        if self._windows.open(stream_id, delta):
            events.append(WindowOpened(stream_id))

    _HANDLERS: ClassVar[Mapping[int, Callable[[Endpoint, bytes, int, list[Event]], None]]] = {
        Kind.SYN_STREAM: _on_syn_stream,
        Kind.SYN_REPLY: _on_syn_reply,
        Kind.RST_STREAM: _on_rst_stream,
        Kind.SETTINGS: _on_settings,
        Kind.PING: _on_ping,
        Kind.GOAWAY: _on_go_away,
        Kind.HEADERS: _on_headers,
        Kind.WINDOW_UPDATE: _on_window_update,
    }
