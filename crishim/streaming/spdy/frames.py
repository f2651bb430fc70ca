"""The frames of SPDY/3.1 as bytes: section 2.2 (framing) and 2.6 (control frames) of the draft.

A frame begins with two words of 32 bits. Of a data frame: stream ID, then 8 bits of flags and 24 of length.
Of a control frame: the top bit, 15 bits of version and 16 of type, then flags and length.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import NamedTuple

VERSION = 3
HEADER_BYTES = 8
MAX_LENGTH = (1 << 24) - 1
"""Most bytes that a frame can hold after its header."""
INITIAL_WINDOW = 64 << 10
"""Bytes that may be on their way to an endpoint before it has said anything (2.6.8)."""
MAX_WINDOW = (1 << 31) - 1
MAX_STREAM_ID = (1 << 31) - 1

FLAG_FIN = 0x01
FLAG_UNIDIRECTIONAL = 0x02
_CONTROL_BIT = 1 << 31

_WORDS = struct.Struct("!II")
_WORD = struct.Struct("!I")
_SYN_STREAM = struct.Struct("!IIBB")
_SETTING = struct.Struct("!II")


class Kind(enum.IntEnum):
    """Types of control frames. 5 (NOOP) and 10 (CREDENTIAL) are not of version 3.1."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class ResetStatus(enum.IntEnum):
    """Why a stream is reset (2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    FRAME_TOO_LARGE = 11


class GoAwayStatus(enum.IntEnum):
    """Why a session ends (2.6.6)."""

    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


SETTINGS_INITIAL_WINDOW_SIZE = 7


class FrameHeader(NamedTuple):
    """The first eight bytes of a frame; ``kind`` is 0 for data, ``stream_id`` is 0 for control."""

    kind: int
    stream_id: int
    flags: int
    length: int
    version: int


class FrameError(Exception):
    """A control frame is not of the form that its type has."""


def parse_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """The header of a frame from its eight bytes."""
    first, second = _WORDS.unpack(data)
    flags, length = second >> 24, second & MAX_LENGTH
    if first & _CONTROL_BIT:
        return FrameHeader(first & 0xFFFF, 0, flags, length, (first >> 16) & 0x7FFF)
    return FrameHeader(0, first, flags, length, VERSION)


def data_header(stream_id: int, length: int, *, fin: bool = False) -> bytes:
    """What comes before ``length`` bytes of data."""
    return _WORDS.pack(stream_id, (FLAG_FIN << 24 if fin else 0) | length)


def control(kind: int, payload: bytes, flags: int = 0) -> bytes:
    """A whole control frame."""
    return _WORDS.pack(_CONTROL_BIT | VERSION << 16 | kind, flags << 24 | len(payload)) + payload


def syn_stream(stream_id: int, block: bytes, flags: int = 0) -> bytes:
    """Opens a stream; ``block`` are compressed headers. Priority and slot are 0."""
    return control(Kind.SYN_STREAM, _SYN_STREAM.pack(stream_id, 0, 0, 0) + block, flags)


def with_block(kind: Kind, stream_id: int, block: bytes, flags: int = 0) -> bytes:
    """SYN_REPLY or HEADERS."""
    return control(kind, _WORD.pack(stream_id) + block, flags)


def two_words(kind: Kind, first: int, second: int) -> bytes:
    """RST_STREAM (stream, status), GOAWAY (last good stream, status), WINDOW_UPDATE (stream, delta)."""
    return control(kind, _WORDS.pack(first, second))


def ping(number: int) -> bytes:
    """PING, and the answer to one."""
    return control(Kind.PING, _WORD.pack(number))


def settings(values: Mapping[int, int]) -> bytes:
    """SETTINGS, nothing of it persistent."""
    entries = b"".join(_SETTING.pack(number, value) for number, value in values.items())
    return control(Kind.SETTINGS, _WORD.pack(len(values)) + entries)


def parse_syn_stream(payload: bytes | bytearray) -> tuple[int, bytes]:
    """Stream ID and header block."""
    if len(payload) < _SYN_STREAM.size:
        raise FrameError("SYN_STREAM is too short")
    return _SYN_STREAM.unpack_from(payload)[0] & MAX_STREAM_ID, bytes(payload[_SYN_STREAM.size :])


def parse_with_block(payload: bytes | bytearray) -> tuple[int, bytes]:
    """Stream ID and header block of SYN_REPLY or HEADERS."""
    if len(payload) < _WORD.size:
        raise FrameError("SYN_REPLY or HEADERS is too short")
    return _WORD.unpack_from(payload)[0] & MAX_STREAM_ID, bytes(payload[_WORD.size :])


def parse_two_words(payload: bytes | bytearray) -> tuple[int, int]:
    """Both words; the top bit of the first is reserved."""
    if len(payload) != _WORDS.size:
        raise FrameError(f"a frame of two words has {len(payload)} bytes")
    first, second = _WORDS.unpack(payload)
    return first & MAX_STREAM_ID, second


def parse_ping(payload: bytes | bytearray) -> int:
    """The ping's number."""
    if len(payload) != _WORD.size:
        raise FrameError(f"PING has {len(payload)} bytes")
    number: int = _WORD.unpack(payload)[0]
    return number


def parse_settings(payload: bytes | bytearray) -> dict[int, int]:
    """Value by number; flags are of no interest, since nothing is kept."""
    if len(payload) < _WORD.size:
        raise FrameError("SETTINGS is too short")
    count = _WORD.unpack_from(payload)[0]
    if len(payload) != _WORD.size + count * _SETTING.size:
        raise FrameError(f"SETTINGS of {count} entries has {len(payload)} bytes")
    return {number & MAX_LENGTH: value for number, value in _SETTING.iter_unpack(payload[_WORD.size :])}
