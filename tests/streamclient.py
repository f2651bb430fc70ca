"""Clients of the streaming server for tests: SPDY by our own codec's other end, WebSocket by wsproto's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from wsproto.connection import ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.handshake import H11Handshake

from crishim.streaming.spdy.endpoint import Bounds, Endpoint, Role
from crishim.streaming.spdy.events import DataReceived, GoneAway, StreamReplied, StreamReset

SECONDS = 10.0


async def connect(url: str, tls: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the server of ``url``."""
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port, ssl=tls, limit=1 << 20)


async def request(url: str, headers: Sequence[tuple[str, str]] = (), method: str = "POST") -> bytes:
    """The answer to a request, up to the end of the connection or of its head."""
    reader, writer = await connect(url)
    lines = [f"{method} {urlsplit(url).path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers)]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    async with asyncio.timeout(SECONDS):
        answer = await reader.read()
    writer.close()
    await asyncio.sleep(0)
    return answer


class SpdyClient:
    """One SPDY connection. ``window`` makes it a peer that uses flow control."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int = 0) -> None:
        self.reader, self.writer = reader, writer
        self.endpoint = Endpoint(Role.CLIENT, Bounds(window=window or 64 << 10))
        self.received: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.reset: dict[int, int] = {}
        self.replied: set[int] = set()
        self.gone_away = self.closed = False
        self.consuming = True
        """Whether windows are opened for what is received."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if window:
            self.endpoint.update_settings({7: window})

    @classmethod
    async def upgrade(
        cls,
        url: str,
        version: str = "v4.channel.k8s.io",
        tls: ssl.SSLContext | None = None,
        window: int = 0,
        *,
        read: bool = True,
    ) -> SpdyClient:
        """Switch to SPDY; :class:`AssertionError` with the answer if the server refuses."""
        reader, writer = await connect(url, tls)
        head = f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        if version:
            head += f"X-Stream-Protocol-Version: {version}\r\n"
        writer.write((head + "Content-Length: 0\r\n\r\n").encode())
        async with asyncio.timeout(SECONDS):
            answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 101"):
            writer.transport.abort()
            await asyncio.sleep(0)
            raise AssertionError(answer)
        if version:
            assert f"x-stream-protocol-version: {version}".encode() in answer.lower(), answer
        client = cls(reader, writer, window)
        if read:
            client._task = asyncio.create_task(client.run())
        return client

    async def run(self) -> None:
        """Receive until the end."""
        with contextlib.suppress(ConnectionError):
            while data := await self.reader.read(1 << 18):
                for event in self.endpoint.receive(data):
                    self._on_event(event)
                self.flush()
                self._wake()
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _on_event(self, event: object) -> None:
        if isinstance(event, DataReceived):
            self.received.setdefault(event.stream_id, bytearray()).extend(event.data)
            if self.consuming:
                self.endpoint.consumed(event.stream_id, len(event.data))
            if event.fin:
                self.ended.add(event.stream_id)
        elif isinstance(event, StreamReset):
            self.reset[event.stream_id] = event.status
        elif isinstance(event, StreamReplied):
            self.replied.add(event.stream_id)
        elif isinstance(event, GoneAway):
            self.gone_away = True

    async def until(self, condition: Any) -> None:
        """Wait until ``condition()`` holds."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                assert not self.closed, "the connection was closed"
                await self._changed.wait()

    async def until_closed(self, seconds: float = SECONDS) -> None:
        """Wait until the server has closed the connection."""
        async with asyncio.timeout(seconds):
            while not self.closed:
                await self._changed.wait()

    def flush(self) -> None:
        """Send what the endpoint has."""
        self.writer.write(self.endpoint.take())

    async def open(self, kind: str, *, wait: bool = True, **headers: str) -> int:
        """Open a stream."""
        stream = self.endpoint.open({"streamtype": kind, **headers})
        self.flush()
        if wait:
            await self.until(lambda: stream in self.replied or stream in self.reset)
        return stream

    async def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Send data in one frame, within the server's windows."""
        for at in range(0, max(1, len(data)), 1 << 15):
            piece = data[at : at + (1 << 15)]
            last = at + (1 << 15) >= len(data)
            await self.until(lambda piece=piece: self.endpoint.allowance(stream) >= len(piece))
            self.writer.write(
                self.endpoint.take() + self.endpoint.data_header(stream, len(piece), fin=fin and last) + piece
            )
            await self.writer.drain()

    async def all_of(self, stream: int) -> bytes:
        """Everything that the server sends on a stream."""
        await self.until(lambda: stream in self.ended or stream in self.reset)
        return bytes(self.received.get(stream, b""))

    async def close(self) -> None:
        """Leave."""
        if self._task is not None:
            self._task.cancel()
        self.writer.transport.abort()
        await asyncio.sleep(0)


class WebSocketClient:
    """One WebSocket connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handshake: H11Handshake) -> None:
        self.reader, self.writer = reader, writer
        assert handshake.connection is not None
        self.connection = handshake.connection
        self.subprotocol: str | None = None
        self.messages: list[tuple[int, bytes]] = []
        self.close_code: int | None = None
        self.pongs = 0

    @classmethod
    async def upgrade(
        cls, url: str, subprotocols: Sequence[str] = ("v5.channel.k8s.io",), tls: ssl.SSLContext | None = None
    ) -> WebSocketClient:
        """Switch to WebSocket; :class:`AssertionError` with the status if the server refuses."""
        reader, writer = await connect(url, tls)
        handshake = H11Handshake(ConnectionType.CLIENT)
        writer.write(handshake.send(Request(host="x", target=urlsplit(url).path, subprotocols=list(subprotocols))))
        while True:
            async with asyncio.timeout(SECONDS):
                data = await reader.read(1 << 16)
            handshake.receive_data(data or None)
            for event in handshake.events():
                if isinstance(event, AcceptConnection):
                    client = cls(reader, writer, handshake)
                    client.subprotocol = event.subprotocol
                    client._take()
                    return client
                assert not isinstance(event, RejectConnection | RejectData), event
            assert data, "the connection was closed"

    def _take(self) -> None:
        for event in self.connection.events():
            if isinstance(event, BytesMessage | TextMessage):
                self._on_message(event)
            elif isinstance(event, Ping):
                self.writer.write(self.connection.send(event.response()))
            elif isinstance(event, Pong):
                self.pongs += 1
            elif isinstance(event, CloseConnection):
                self.close_code = int(event.code)

    def _on_message(self, event: Message[Any]) -> None:
        data = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
        if self._inside:
            channel, before = self.messages[-1]
            self.messages[-1] = (channel, before + data)
        else:
            self.messages.append((data[0], data[1:]))
        self._inside = not event.message_finished

    _inside = False

    async def receive(self) -> bool:
        """Receive something; False at the end."""
        async with asyncio.timeout(SECONDS):
            data = await self.reader.read(1 << 18)
        if not data or self.close_code is not None:
            return False
        self.connection.receive_data(data)
        self._take()
        return True

    async def until_closed(self) -> None:
        """Receive everything."""
        with contextlib.suppress(ConnectionError):
            while self.close_code is None and await self.receive():
                pass

    async def until(self, condition: Any) -> None:
        """Receive until ``condition()`` holds."""
        while not condition():
            assert await self.receive(), "the connection was closed"

    def on(self, channel: int) -> bytes:
        """All that came on a channel."""
        return b"".join(data for number, data in self.messages if number == channel)

    async def send(self, channel: int, data: bytes) -> None:
        """Send on a channel."""
        self.writer.write(self.connection.send(BytesMessage(data=bytes([channel]) + data)))
        await self.writer.drain()

    async def send_event(self, event: Any) -> None:
        """Send any event."""
        self.writer.write(self.connection.send(event))
        await self.writer.drain()

    async def close(self) -> None:
        """Leave."""
        self.writer.transport.abort()
        await asyncio.sleep(0)


def exit_code(status: bytes) -> int:
    """The exit code in a Status object; -1 for another failure."""
    found = json.loads(status)
    if found["status"] == "Success":
        return 0
    for cause in found["details"]["causes"]:
        if cause.get("reason") == "ExitCode":
            assert found["reason"] == "NonZeroExitCode"
            return int(cause["message"])
    return -1


@contextlib.asynccontextmanager
async def closing(client: Any) -> AsyncIterator[Any]:
    """Leave at the end of the body."""
    try:
        yield client
    finally:
        await client.close()
