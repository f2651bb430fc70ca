"""What may follow what on a stream, as tables: section 2.3 of the draft.

A stream has two halves, ours and theirs. Each has a state of its own, changed by what its side sends.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from crishim.streaming.spdy.frames import ResetStatus


class Half(enum.Enum):
    """State of one side of a stream."""

    WAITING = "waiting"
    """Of the side that did not open the stream: it has not replied yet."""
    OPEN = "open"
    CLOSED = "closed"


class Act(enum.Enum):
    """What a side does on a stream."""

    REPLY = "reply"
    HEADERS = "headers"
    DATA = "data"
    FIN = "fin"
    RESET = "reset"


TRANSITIONS: Mapping[tuple[Half, Act], Half] = {
    (Half.WAITING, Act.REPLY): Half.OPEN,
    (Half.WAITING, Act.RESET): Half.CLOSED,
    (Half.OPEN, Act.HEADERS): Half.OPEN,
    (Half.OPEN, Act.DATA): Half.OPEN,
    (Half.OPEN, Act.FIN): Half.CLOSED,
    (Half.OPEN, Act.RESET): Half.CLOSED,
    (Half.CLOSED, Act.RESET): Half.CLOSED,
}
"""Everything that is allowed."""

FAULTS: Mapping[tuple[Half, Act], ResetStatus] = {
    (Half.WAITING, Act.HEADERS): ResetStatus.PROTOCOL_ERROR,
    (Half.WAITING, Act.DATA): ResetStatus.PROTOCOL_ERROR,
    (Half.WAITING, Act.FIN): ResetStatus.PROTOCOL_ERROR,
    (Half.OPEN, Act.REPLY): ResetStatus.STREAM_IN_USE,
    (Half.CLOSED, Act.REPLY): ResetStatus.STREAM_IN_USE,
    (Half.CLOSED, Act.HEADERS): ResetStatus.STREAM_ALREADY_CLOSED,
    (Half.CLOSED, Act.DATA): ResetStatus.STREAM_ALREADY_CLOSED,
    (Half.CLOSED, Act.FIN): ResetStatus.STREAM_ALREADY_CLOSED,
}
"""Everything else, with the status that the stream is reset with."""
