"""Takes a stream of bytes apart into frames, however it is cut into pieces.

Control frames are collected until they are whole; data is passed on as it comes, so a frame of 16 MiB costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from crishim.streaming.spdy.frames import FLAG_FIN, HEADER_BYTES, VERSION, FrameError, FrameHeader, parse_header

MAX_CONTROL = 16 << 10
"""Most bytes of a control frame: our clients' headers have some hundred."""


class DataPart(NamedTuple):
    """Some data of a data frame; ``fin`` is with the last part of it."""

    stream_id: int
    data: memoryview
    fin: bool


class ControlFrame(NamedTuple):
    """A whole control frame."""

    kind: int
    flags: int
    payload: bytes


class FrameReader:
    """What is known of a frame that is not whole."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._control: FrameHeader | None = None
        self._data = (0, 0, False)

    def feed(self, view: memoryview) -> Iterator[DataPart | ControlFrame]:
        """The frames in ``view``; :class:`FrameError` if it cannot be one."""
        while view:
            if self._data[1]:
                part, view = self._data_part(view)
                yield part
            elif self._control is not None:
                frame, view = self._collect(view, self._control)
                if frame is not None:
                    yield frame
            else:
                header, view = self._header(view)
                empty = self._begin(header) if header is not None else None
                if empty is not None:
                    yield empty

    def _data_part(self, view: memoryview) -> tuple[DataPart, memoryview]:
        stream_id, left, fin = self._data
        count = min(left, len(view))
        self._data = (stream_id, left - count, fin)
        return DataPart(stream_id, view[:count], fin and count == left), view[count:]

    def _collect(self, view: memoryview, header: FrameHeader) -> tuple[ControlFrame | None, memoryview]:
        missing = header.length - len(self._partial)
        self._partial += view[:missing]
        if len(self._partial) < header.length:
            return None, view[missing:]
        payload = bytes(self._partial)
        self._partial.clear()
        self._control = None
        return ControlFrame(header.kind, header.flags, payload), view[missing:]

    def _header(self, view: memoryview) -> tuple[FrameHeader | None, memoryview]:
        if not self._partial and len(view) >= HEADER_BYTES:
            return parse_header(view[:HEADER_BYTES]), view[HEADER_BYTES:]
        missing = HEADER_BYTES - len(self._partial)
        self._partial += view[:missing]
        if len(self._partial) < HEADER_BYTES:
            return None, view[missing:]
        header = parse_header(self._partial)
        self._partial.clear()
        return header, view[missing:]

    def _begin(self, header: FrameHeader) -> DataPart | ControlFrame | None:
        """A frame whose header is here; the frame itself, if there is nothing more to it."""
        if header.kind == 0:
            if header.stream_id == 0:
                raise FrameError("data on stream 0")
            fin = bool(header.flags & FLAG_FIN)
            self._data = (header.stream_id, header.length, fin)
            return DataPart(header.stream_id, memoryview(b""), fin) if fin and not header.length else None
        if header.version != VERSION:
            raise FrameError(f"control frame of version {header.version}")
        if header.length > MAX_CONTROL:
            raise FrameError(f"control frame of {header.length} bytes")
        if not header.length:
            return ControlFrame(header.kind, header.flags, b"")
        self._control = header
        return None
