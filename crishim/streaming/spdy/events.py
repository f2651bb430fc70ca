"""What an endpoint tells of the bytes it received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream: SYN_STREAM. With ``fin`` it will send nothing on it, with ``one_way`` we cannot."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False
    one_way: bool = False


@dataclass(frozen=True, slots=True)
class StreamReplied:
    """The peer accepted a stream of ours: SYN_REPLY."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False


@dataclass(frozen=True, slots=True)
class HeadersReceived:
    """More headers for a stream: HEADERS."""

    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Data, as it came: a frame may arrive in several of these, ``fin`` is with the last.

    ``data`` is a view of what was received: it is good until the call that gave it out is repeated.
    """

    stream_id: int
    data: memoryview
    fin: bool = False


@dataclass(frozen=True, slots=True)
class StreamReset:
    """A stream is dead: RST_STREAM by the peer, or by us because the peer broke the rules on it."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """More may be sent on a stream than before, on any stream if ``stream_id`` is 0."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The answer to a ping of ours."""

    number: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no more streams and wants none: GOAWAY."""

    last_good: int
    status: int


Event = (
    StreamOpened | StreamReplied | HeadersReceived | DataReceived | StreamReset | WindowOpened | PongReceived | GoneAway
)
