"""Channels over WebSocket messages, terminal sizes and outcomes: what clients of Kubernetes send and expect."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, TextMessage

from crishim.containers.client import Size, Sizes
from crishim.streaming.channels import (
    COMMAND_DIALECTS,
    FORWARD_DIALECTS,
    MAX_TEXT,
    ChannelDecoder,
    ChannelError,
    Dialect,
    binary_header,
    text_message,
)
from crishim.streaming.sizes import MAX_WAITING, SizeDecoder
from crishim.streaming.status import MAX_MESSAGE, Outcome

BINARY = COMMAND_DIALECTS["v4.channel.k8s.io"]
TEXT = COMMAND_DIALECTS["v4.base64.channel.k8s.io"]
CLOSING = COMMAND_DIALECTS["v5.channel.k8s.io"]


def decode(dialect: Dialect, *messages: bytes, step: int = 0) -> list[tuple[int, bytes, bool]]:
    """What messages mean, given in pieces of ``step`` bytes; the data of a message joined."""
    decoder, found = ChannelDecoder(dialect), []
    for message in messages:
        cut = [message[at : at + step] for at in range(0, len(message), step)] if step else [message]
        data, channel = b"", -1
        for number, piece in enumerate(cut or [b""]):
            part = decoder.receive(piece, message_finished=number >= len(cut) - 1)
            if part is not None and part.closed:
                found.append((part.channel, b"", True))
            elif part is not None:
                data, channel = data + bytes(part.data), part.channel
        if data:
            found.append((channel, data, False))
    return found


@pytest.mark.parametrize("step", [0, 1, 2])
def test_binary_messages(step: int) -> None:
    """The first byte is the channel; empty ones mean nothing."""
    messages = [b"\0hello", b"\4{}", b"", b"\1", b"\0\xff\0"]
    assert decode(BINARY, *messages, step=step) == [(0, b"hello", False), (4, b"{}", False), (0, b"\xff\0", False)]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_base64_messages(step: int) -> None:
    """A digit and text."""
    assert decode(TEXT, b"0" + base64.b64encode(b"foo\n"), b"4", step=step) == [(0, b"foo\n", False)]


@pytest.mark.parametrize("text", [b"0Zm9v!", b"0Zm9", b"0\xc3\xa4==", b"0Zg"])
def test_bad_base64(text: bytes) -> None:
    """Is an error of the protocol."""
    with pytest.raises(ChannelError):
        decode(TEXT, text)


def test_endless_base64() -> None:
    """It must be whole to be decoded, so it is bounded."""
    decoder = ChannelDecoder(TEXT)
    with pytest.raises(ChannelError, match="more than"):
        for _ in range(MAX_TEXT // 1000 + 2):
            decoder.receive(b"0" * 1000, message_finished=False)


@pytest.mark.parametrize("step", [0, 1])
def test_close_signals(step: int) -> None:
    """Of version 5 only; in others it is a channel like any."""
    assert decode(CLOSING, b"\0x", b"\xff\0", b"\4y", step=step) == [(0, b"x", False), (0, b"", True), (4, b"y", False)]
    assert decode(BINARY, b"\xff\0", step=step) == [(255, b"\0", False)]


@pytest.mark.parametrize("message", [b"\xff", b"\xff\0\0"])
def test_bad_close_signals(message: bytes) -> None:
    """One channel each."""
    with pytest.raises(ChannelError):
        decode(CLOSING, message)


@given(st.lists(st.binary(max_size=50), max_size=20), st.sampled_from(list(COMMAND_DIALECTS)), st.integers(1, 9))
def test_any_messages(messages: list[bytes], name: str, step: int) -> None:
    """Are understood or refused."""
    try:
        decode(COMMAND_DIALECTS[name], *messages, step=step)
    except ChannelError:
        assert COMMAND_DIALECTS[name].base64 or COMMAND_DIALECTS[name].closes


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 100_000])
def test_frames_that_we_write(size: int) -> None:
    """Another implementation understands them."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(binary_header(size) + bytes(size))
    client.receive_data(text_message(1, bytes(size)))
    data, text = b"", ""
    for event in client.events():
        if isinstance(event, BytesMessage):
            data += event.data
        elif isinstance(event, TextMessage):
            text += event.data
    assert data == bytes(size)
    assert text[0] == "1"
    assert base64.b64decode(text[1:]) == bytes(size)


def test_names() -> None:
    """Of Kubernetes."""
    assert list(FORWARD_DIALECTS) == ["", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"]
    assert [name for name, dialect in COMMAND_DIALECTS.items() if dialect.json_status] == [
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "v5.channel.k8s.io",
    ]


def sizes_of(*chunks: bytes) -> list[Size]:
    """The sizes that are told, the last of each chunk."""
    sizes, told = Sizes(), list[Size]()
    sizes.listen(told.append)
    decoder = SizeDecoder(sizes)
    for chunk in chunks:
        decoder.data(memoryview(chunk))
    decoder.end()
    return told


async def test_sizes() -> None:
    """One after the other, cut anywhere; of several at once the last one counts."""
    text = b'{"Width":80,"Height":24}\n {"Width":100,"Height":30}'
    assert sizes_of(text) == [Size(100, 30)]
    assert sizes_of(*(bytes([byte]) for byte in text)) == [Size(80, 24), Size(100, 30)]
    assert sizes_of(b'{"Width":80,"Height":24,"More":[1]}') == [Size(80, 24)]


@pytest.mark.parametrize(
    "text",
    [
        b'{"Width":0,"Height":24}',
        b'{"Width":70000,"Height":24}',
        b'{"Width":"80","Height":24}',
        b'{"Width":80}',
        b"{}",
        b"[1,2]",
        b"7",
        b"\xff\xfe",
        b"garbage",
        b"[" * (MAX_WAITING + 10),
    ],
)
async def test_bad_sizes(text: bytes) -> None:
    """Change nothing; what is no object at all ends it, and nothing is kept of endless ones."""
    assert sizes_of(text) == []
    decoder = SizeDecoder(Sizes())
    for _ in range(10):
        decoder.data(memoryview(text))
    assert len(decoder._text) <= MAX_WAITING + len(text)


async def test_first_size() -> None:
    """Is waited for shortly."""
    sizes = Sizes()
    assert await sizes.first(0.01) is None
    asyncio.get_running_loop().call_soon(sizes.push, Size(1, 2))
    assert await sizes.first(5) == Size(1, 2)
    told: list[Size] = []
    sizes.listen(told.append)
    assert told == [Size(1, 2)]


def test_outcomes() -> None:
    """The Status objects that client-go understands, and the text of old versions."""
    assert json.loads(Outcome().as_json()) == {"metadata": {}, "status": "Success"}
    assert Outcome().as_text() == b""
    failed = json.loads(Outcome(exit_code=3).as_json())
    assert (failed["status"], failed["reason"]) == ("Failure", "NonZeroExitCode")
    assert failed["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]
    assert b"3" in Outcome(exit_code=3).as_text()
    broken = json.loads(Outcome(error="it is \udcff broken" + "x" * 9999).as_json())
    assert (broken["status"], broken["reason"], broken["code"]) == ("Failure", "InternalError", 500)
    assert broken["message"].startswith("Internal error occurred: it is")
    assert len(broken["message"]) == MAX_MESSAGE
    assert Outcome(error="\udcff").as_text().endswith(b"?")
