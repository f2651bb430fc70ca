"""Kubernetes' channels over WebSocket messages, without I/O.

The first byte of a message is the number of a channel, the rest its data; in the ``base64`` variants the number
is a digit and the data is base64 text. In version 5 the message ``255, N`` closes channel N: until then a client
cannot end stdin without ending the connection. Source: k8s.io/apimachinery, util/httpstream/wsstream, and
KEP-4006.
"""

from __future__ import annotations

import base64
import binascii
import enum
import struct
from dataclasses import dataclass

CLOSE_SIGNAL = 255
MAX_TEXT = 1 << 20
"""Most characters of one message in base64, which must be whole before it can be decoded."""


class Channel(enum.IntEnum):
    """Channels of exec and attach."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4


@dataclass(frozen=True)
class Dialect:
    """One subprotocol. ``json_status``: the error channel carries a Status object, not plain text."""

    name: str
    base64: bool = False
    json_status: bool = False
    closes: bool = False


COMMAND_DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(""),
        Dialect("channel.k8s.io"),
        Dialect("base64.channel.k8s.io", base64=True),
        Dialect("v4.channel.k8s.io", json_status=True),
        Dialect("v4.base64.channel.k8s.io", base64=True, json_status=True),
        Dialect("v5.channel.k8s.io", json_status=True, closes=True),
    )
}
"""For exec and attach; a client that names none gets the first."""
FORWARD_DIALECTS = {name: COMMAND_DIALECTS[name] for name in ("", "v4.channel.k8s.io", "v4.base64.channel.k8s.io")}
"""For port-forward over channels, two for each port."""
TUNNEL_PREFIX = "SPDY/3.1+"
TUNNELS = {f"{TUNNEL_PREFIX}portforward.k8s.io": "portforward.k8s.io"}
"""Subprotocols whose messages are the bytes of a SPDY session, by KEP-4006."""


class ChannelError(Exception):
    """A message is not of the subprotocol."""


@dataclass(frozen=True)
class Piece:
    """A part of a message: ``data`` for ``channel``, or its ``closed`` end."""

    channel: int
    data: memoryview
    closed: bool = False


class ChannelDecoder:
    """Understands messages piece by piece, as the frames come in."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._channel: int | None = None
        self._text = bytearray()

    def receive(self, data: bytes, *, message_finished: bool) -> Piece | None:
        """What a piece of a message means; None if nothing yet, or nothing at all."""
        view = memoryview(data)
        if self._channel is None:
            if not view:
                return None  # an empty message says nothing
            self._channel, view = view[0], view[1:]
            if self._dialect.base64:
                self._channel -= ord("0")
        channel = self._channel
        if message_finished:
            self._channel = None
        if channel == CLOSE_SIGNAL and self._dialect.closes:
            return self._close_signal(view, message_finished)
        if self._dialect.base64:
            return self._base64(channel, view, message_finished)
        return Piece(channel, view) if view else None

    def _close_signal(self, view: memoryview, message_finished: bool) -> Piece | None:
        self._text += view
        if len(self._text) > 1 or (message_finished and not self._text):
            raise ChannelError("a close signal has one byte, the channel")
        if not message_finished:
            return None
        piece = Piece(self._text[0], memoryview(b""), closed=True)
        self._text.clear()
        return piece

    def _base64(self, channel: int, view: memoryview, message_finished: bool) -> Piece | None:
        self._text += view
        if len(self._text) > MAX_TEXT:
            raise ChannelError(f"a base64 message has more than {MAX_TEXT} characters")
        if not message_finished:
            return None
        try:
            data = base64.b64decode(bytes(self._text), validate=True)
        except binascii.Error as err:
            raise ChannelError(f"channel {channel} has bad base64: {err}") from err
        self._text.clear()
        return Piece(channel, memoryview(data)) if data else None


def binary_header(length: int) -> bytes:
    """The header of an unmasked binary WebSocket message of one frame (RFC 6455, 5.2)."""
    if length < 126:
        return struct.pack("!BB", 0x82, length)
    if length < 1 << 16:
        return struct.pack("!BBH", 0x82, 126, length)
    return struct.pack("!BBQ", 0x82, 127, length)


def text_message(channel: int, data: bytes | memoryview) -> bytes:
    """A whole message of a base64 dialect, in one unmasked text frame."""
    text = bytes([ord("0") + channel]) + base64.b64encode(data)
    header = binary_header(len(text))
    return bytes([0x81]) + header[1:] + text
