"""The streaming server with jobs of the test's own, over real sockets: good clients and hostile ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from streamclient import SECONDS, SpdyClient, WebSocketClient, closing, connect, exit_code, request
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from crishim.config.settings import ApiSettings
from crishim.containers.client import Client
from crishim.errors import ConfigError, FailedPrecondition, Unavailable
from crishim.host.pump import CHUNK, HEADROOM
from crishim.streaming import portforward, server, streams, wire
from crishim.streaming.portforward import ForwardJob
from crishim.streaming.remotecommand import CommandJob
from crishim.streaming.server import StreamServer
from crishim.streaming.spdy import frames
from crishim.streaming.spdy.headers import HeaderEncoder
from crishim.streaming.streams import Stream

COMMAND_PROTOCOLS = ["v4.channel.k8s.io", "v5.channel.k8s.io", "v4.base64.channel.k8s.io"]


class Collector:
    """Takes all of an inlet."""

    def __init__(self) -> None:
        self.data_ = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data(self, chunk: memoryview) -> None:
        self.data_ += chunk

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def put(outlet: Any, data: bytes) -> None:
    """Write to an outlet."""
    outlet.write(bytearray(HEADROOM) + data, HEADROOM + len(data))


async def freely(outlet: Any, data: bytes, count: int) -> None:
    """Write ``count`` times, waiting when the outlet is full."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        if outlet.full:
            free = loop.create_future()
            outlet.when_free(lambda free=free: free.done() or free.set_result(None))
            await free
        put(outlet, data)


async def echo(client: Client) -> int:
    """``cat``: gives stdin back on stdout, says so on stderr, and ends with 3."""
    assert client.stdin is not None and client.stdout is not None
    collector = Collector()
    client.stdin.feed(collector)
    await collector.ended
    put(client.stdout, bytes(collector.data_))
    if client.stderr is not None:
        put(client.stderr, b"done")
    return 3


def job(run: Callable[[Client], Awaitable[int]] = echo, **fields: bool) -> CommandJob:
    """A command with all streams, unless others are asked for."""
    return CommandJob(run, **(fields or {"stdin": True, "stdout": True, "stderr": True}))


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[StreamServer]:
    """A server on a port of its own."""
    made = StreamServer(ApiSettings(**settings))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@pytest_asyncio.fixture
async def streaming() -> AsyncIterator[StreamServer]:
    """A server with the usual settings."""
    async with serving() as made:
        yield made


async def eventually(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait for what nothing tells."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


def wires_of(made: StreamServer) -> list[wire.Wire]:
    """The connections of a server from now on."""
    found: list[wire.Wire] = []
    connected = made._connected

    def note(one: wire.Wire) -> None:
        found.append(one)
        connected(one)

    setattr(made, "_connected", note)  # noqa: B010
    return found


@pytest.mark.parametrize(
    "version",
    ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""],
)
async def test_a_command_over_spdy(streaming: StreamServer, version: str) -> None:
    """In all versions; the exit code is told from version 4 on as an object, before in words."""
    url = streaming.offer("exec", job(), "test")
    async with closing(await SpdyClient.upgrade(url, version)) as client:
        error, stdin = await client.open("error"), await client.open("stdin")
        stdout, stderr = await client.open("stdout"), await client.open("stderr")
        await client.send(stdin, b"hello", fin=True)
        assert await client.all_of(stdout) == b"hello"
        assert await client.all_of(stderr) == b"done"
        status = await client.all_of(error)
        assert exit_code(status) == 3 if version[:2] in ("v4", "v5") else b"code: 3" in status


@pytest.mark.parametrize("protocol", [*COMMAND_PROTOCOLS, "channel.k8s.io", "base64.channel.k8s.io", ""])
async def test_a_command_over_websocket(streaming: StreamServer, protocol: str) -> None:
    """In all subprotocols. Before version 5 stdin ends only with the connection."""
    seen = bytearray()

    async def run(client: Client) -> int:
        assert client.stdin is not None
        collector = Collector()
        client.stdin.feed(collector)
        await eventually(lambda: len(collector.data_) >= 5)
        seen.extend(collector.data_)
        put(client.stdout, b"out")
        put(client.stderr, b"err")
        return 4

    url = streaming.offer("exec", job(run), "test")
    async with closing(await WebSocketClient.upgrade(url, [protocol] if protocol else [])) as client:
        assert client.subprotocol == (protocol or None)
        text = "base64" in protocol
        await client.send_event(TextMessage(data="0aGVsbG8=") if text else BytesMessage(data=b"\0hello"))
        await client.until_closed()
    assert bytes(seen) == b"hello"
    assert client.close_code == 1000
    by_channel: dict[int, bytes] = {}
    for channel, data in client.messages:
        by_channel[channel] = by_channel.get(channel, b"") + data
    if text:
        assert by_channel[ord("1")] == b"b3V0"
        return
    assert client.messages[0] == (1, b"")
    assert (by_channel[1], by_channel[2]) == (b"out", b"err")
    assert exit_code(by_channel[3]) == 4 if protocol[:1] == "v" else b"code: 4" in by_channel[3]


async def test_half_close_over_websocket(streaming: StreamServer) -> None:
    """Version 5's close signal."""
    url = streaming.offer("exec", job(), "test")
    async with closing(await WebSocketClient.upgrade(url)) as client:
        await client.send(0, b"hel")
        await client.send(0, b"lo")
        await client.send(255, b"\0")
        await client.until_closed()
    assert (client.on(1), client.on(2), exit_code(client.on(3))) == (b"hello", b"done", 3)


async def test_the_first_known_protocol_of_the_client_is_taken(streaming: StreamServer) -> None:
    """In its order."""
    wanted = ["v9.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"]
    async with closing(await WebSocketClient.upgrade(streaming.offer("exec", job(), ""), wanted)) as client:
        assert client.subprotocol == "v4.channel.k8s.io"


async def test_errors_are_told(streaming: StreamServer) -> None:
    """Ours with their sentence, others as unexpected."""

    async def refuse(_client: Client) -> int:
        raise FailedPrecondition("it does not run")

    async def crash(_client: Client) -> int:
        raise RuntimeError("bug")

    for run, message in ((refuse, "it does not run"), (crash, "unexpected RuntimeError: bug")):
        async with closing(await SpdyClient.upgrade(streaming.offer("exec", job(run, stdout=True), ""))) as client:
            error, stdout = await client.open("error"), await client.open("stdout")
            status = await client.all_of(error)
            assert exit_code(status) == -1
            assert message in json.loads(status)["message"]
            assert await client.all_of(stdout) == b""


async def test_terminal_sizes(streaming: StreamServer) -> None:
    """Reach the job, over both."""
    sizes: list[tuple[int, int]] = []

    async def run(client: Client) -> int:
        client.sizes.listen(lambda size: sizes.append((size.width, size.height)))
        await eventually(lambda: len(sizes) == 2)
        return 0

    def came(width: int) -> bool:
        return sizes[-1:] == [(width, 24)]

    terminal = {"stdin": True, "stdout": True, "tty": True}
    async with closing(await SpdyClient.upgrade(streaming.offer("exec", job(run, **terminal), ""))) as client:
        error = await client.open("error")
        for kind in ("stdin", "stdout"):
            await client.open(kind)
        resize = await client.open("resize")
        for width in (80, 90):
            await client.send(resize, json.dumps({"Width": width, "Height": 24}).encode())
            await eventually(partial(came, width))
        assert exit_code(await client.all_of(error)) == 0
    sizes.clear()
    async with closing(await WebSocketClient.upgrade(streaming.offer("exec", job(run, **terminal), ""))) as client:
        for width in (80, 90):
            await client.send(4, json.dumps({"Width": width, "Height": 24}).encode())
            await eventually(partial(came, width))
        await client.until_closed()
        assert exit_code(client.on(3)) == 0


@pytest.mark.parametrize("kind", ["spdy", "flow-controlled spdy", *COMMAND_PROTOCOLS])
async def test_much_output(streaming: StreamServer, kind: str) -> None:
    """Arrives whole, with little of it waiting at any time."""
    count, piece = 64, bytes(range(256)) * (CHUNK // 256)
    most = 0

    async def run(client: Client) -> int:
        nonlocal most
        for _ in range(count):
            await freely(client.stdout, piece, 1)
            most = max(most, sum(made.waiting for made in wires))
        return 0

    wires = wires_of(streaming)
    digest = hashlib.sha256(piece * count).hexdigest()
    url = streaming.offer("exec", job(run, stdout=True), "")
    if "spdy" in kind:
        window = 30_000 if "flow" in kind else 0
        async with closing(await SpdyClient.upgrade(url, window=window)) as client:
            error, stdout = await client.open("error"), await client.open("stdout")
            got = await client.all_of(stdout)
            assert exit_code(await client.all_of(error)) == 0
    else:
        async with closing(await WebSocketClient.upgrade(url, [kind])) as client:
            await client.until_closed()
            got = client.on(1)
            if "base64" in kind:
                import base64

                got = b"".join(base64.b64decode(data) for number, data in client.messages if number == ord("1"))
    assert hashlib.sha256(got).hexdigest() == digest
    assert most <= wire.FULL_BYTES + 2 * CHUNK


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_much_input_for_a_slow_consumer(streaming: StreamServer, kind: str) -> None:
    """What it cannot take stays with the client."""
    data = bytes(range(256)) * 64
    count, most = 1024, 0
    digest = hashlib.sha256()

    class Slow:
        """Takes some, then holds for a while."""

        def __init__(self, inlet: Any) -> None:
            self.inlet, self.got = inlet, 0
            self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def data(self, chunk: memoryview) -> None:
            nonlocal most
            digest.update(chunk)
            self.got += len(chunk)
            most = max(most, len(self.inlet._queue))
            self.inlet.hold()
            asyncio.get_running_loop().call_soon(self.inlet.release)

        def end(self) -> None:
            self.ended.set_result(None)

    async def run(client: Client) -> int:
        slow = Slow(client.stdin)
        await asyncio.sleep(0.1)
        client.stdin.feed(slow)  # type: ignore[union-attr]
        await slow.ended
        return 0

    url = streaming.offer("exec", job(run, stdin=True), "")
    if kind == "spdy":
        async with closing(await SpdyClient.upgrade(url)) as client:
            error, stdin = await client.open("error"), await client.open("stdin")
            for number in range(count):
                await client.send(stdin, data, fin=number == count - 1)
            assert exit_code(await client.all_of(error)) == 0
    else:
        async with closing(await WebSocketClient.upgrade(url)) as client:
            for _ in range(count):
                await client.send(0, data)
            await client.send(255, b"\0")
            await client.until_closed()
    assert digest.digest() == hashlib.sha256(data * count).digest()
    assert most <= streams.QUEUE_BYTES + (256 << 10)


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
async def test_a_client_that_leaves(streaming: StreamServer, kind: str) -> None:
    """Its stdin ends, its output goes nowhere, slowly, and the job goes on to its end."""
    ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def run(client: Client) -> int:
        collector = Collector()
        assert client.stdin is not None
        client.stdin.feed(collector)
        await collector.ended
        assert client.gone.done()
        began = asyncio.get_running_loop().time()
        await freely(client.stdout, b"x" * 1000, 4)
        ended.set_result(asyncio.get_running_loop().time() - began)
        return 0

    url = streaming.offer("exec", job(run, stdin=True, stdout=True), "")
    client: Any
    if kind == "spdy":
        client = await SpdyClient.upgrade(url)
        for name in ("error", "stdin", "stdout"):
            await client.open(name)
    else:
        client = await WebSocketClient.upgrade(url)
        await client.until(lambda: client.messages)
    await client.close()
    async with asyncio.timeout(SECONDS):
        assert await ended >= 3 * streams.DISCARD_SECONDS


async def test_a_client_that_leaves_while_it_is_held(streaming: StreamServer) -> None:
    """Is noticed although nothing is received any more."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(client: Client) -> int:
        await client.gone
        gone.set_result(None)
        return 0

    client = await SpdyClient.upgrade(streaming.offer("exec", job(run, stdin=True), ""))
    await client.open("error")
    stdin = await client.open("stdin")
    flood = frames.data_header(stdin, 1 << 20) + bytes(1 << 20)
    client.writer.write(flood + flood)
    await asyncio.sleep(0.3)
    assert not gone.done()
    await client.close()
    async with asyncio.timeout(SECONDS):
        await gone


async def test_unknown_and_used_tokens(streaming: StreamServer) -> None:
    """404, whatever it is for; a token of one kind is none of another's, and is used up by the attempt."""
    url = streaming.offer("exec", job(), "")
    base = url.rpartition("/")[0]
    for path in (f"{base}/{'x' * 32}", f"{base}/", base, f"{url}/more"):
        assert (await request(path)).startswith(b"HTTP/1.1 404"), path
    assert (await request(url.replace("/exec/", "/attach/"))).startswith(b"HTTP/1.1 404")
    assert (await request(url)).startswith(b"HTTP/1.1 404")
    url = streaming.offer("exec", job(), "")
    async with closing(await SpdyClient.upgrade(url)):
        with pytest.raises(AssertionError, match="404"):
            await SpdyClient.upgrade(url)


async def test_requests_that_make_no_sense(streaming: StreamServer) -> None:
    """Are answered by HTTP, not by silence."""
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    socket_upgrade = [("Connection", "keep-alive, Upgrade"), ("Upgrade", "websocket")]

    async def status(headers: list[tuple[str, str]], what: object = None, method: str = "POST") -> str:
        kind = "portforward" if isinstance(what, ForwardJob) else "exec"
        answer = await request(streaming.offer(kind, what or job(), ""), headers, method)  # type: ignore[arg-type]
        return answer.split(b" ")[1].decode()

    async def nothing(_port: int, _stream: Stream) -> None: ...

    forward = ForwardJob(nothing)
    assert await status([]) == "400"
    assert await status(upgrade, method="PUT") == "405"
    assert await status([*upgrade, ("X-Stream-Protocol-Version", "v9.channel.k8s.io")]) == "403"
    assert await status(upgrade, forward) == "400"
    assert await status([*upgrade, ("X-Stream-Protocol-Version", "nonsense")], forward) == "403"
    assert await status(socket_upgrade, method="GET") == "400"
    key = [("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), ("Sec-WebSocket-Version", "13")]
    assert await status([*socket_upgrade, *key, ("Sec-WebSocket-Protocol", "chat")], method="GET") == "403"
    assert await status([*socket_upgrade, key[0], ("Sec-WebSocket-Version", "12")], method="GET") == "400"
    assert await status([*upgrade, ("Content-Length", "5"), ("x", "y\r\n\r\nhello")]) == "400"


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 70_000,
        b"\x16\x03\x01" + b"\xff" * 50,
    ],
)
async def test_garbage_instead_of_a_request(streaming: StreamServer, data: bytes) -> None:
    """Ends the connection, after a bounded number of bytes."""
    reader, writer = await connect(streaming.offer("exec", job(), ""))
    writer.write(data)
    async with asyncio.timeout(SECONDS):
        answer = await reader.read()
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 431"))
    writer.close()


async def test_half_open_clients(streaming: StreamServer) -> None:
    """Who says nothing is sent away in time; only so many can wait."""
    async with serving(stream_creation_timeout=0.3) as short:
        for sent in (b"", b"POST /exec/abc HT"):
            reader, writer = await connect(short.offer("exec", job(), ""))
            writer.write(sent)
            async with asyncio.timeout(SECONDS):
                assert await reader.read() == b""
            writer.close()
    url = streaming.offer("exec", job(), "")
    silent = [await connect(url) for _ in range(server.MAX_STRANGERS + 5)]
    async with asyncio.timeout(SECONDS):
        assert [await reader.read() for reader, _ in silent[:5]] == [b""] * 5
    async with closing(await SpdyClient.upgrade(url)):
        pass
    for _, writer in silent:
        writer.transport.abort()
    await asyncio.sleep(0.05)


async def test_streams_that_are_not_opened(streaming: StreamServer) -> None:
    """The job does not begin, and the connection ends."""
    ran = False

    async def run(_client: Client) -> int:
        nonlocal ran
        ran = True
        return 0

    async with serving(stream_creation_timeout=0.3) as short:
        async with closing(await SpdyClient.upgrade(short.offer("exec", job(run, stdin=True), ""))) as client:
            await client.open("error")
            await client.until_closed()
            assert client.gone_away
    assert not ran


async def test_streams_that_nobody_asked_for(streaming: StreamServer) -> None:
    """Unknown, doubled or not wanted: reset."""
    async with closing(await SpdyClient.upgrade(streaming.offer("exec", job(stdout=True), ""))) as client:
        assert await client.open("error") not in client.reset
        for kind in ("error", "stdin", "resize", "", "nonsense"):
            assert await client.open(kind) in client.reset


async def test_idle_connections_end() -> None:
    """Pings do not count, data does."""

    async def run(client: Client) -> int:
        collector = Collector()
        client.stdin.feed(collector)  # type: ignore[union-attr]
        await collector.ended
        return 0

    async with serving(stream_idle_timeout=0.5) as made:
        async with closing(await SpdyClient.upgrade(made.offer("exec", job(run, stdin=True), ""))) as client:
            await client.open("error")
            stdin = await client.open("stdin")
            for _ in range(4):
                await asyncio.sleep(0.25)
                await client.send(stdin, b"x")
            for _ in range(3):
                await asyncio.sleep(0.2)
                client.endpoint.ping()
                client.flush()
            await client.until_closed(1)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        frames.control(200, b"") * 3 + frames.data_header(0, 10) + b"x" * 10,
        frames.control(frames.Kind.SYN_STREAM, bytes(17 << 10)),
        frames.syn_stream(1, b"not zlib at all"),
        b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000,
    ],
)
async def test_garbage_instead_of_spdy(streaming: StreamServer, data: bytes) -> None:
    """Ends that connection and nothing else."""
    other = await SpdyClient.upgrade(streaming.offer("exec", job(), ""))
    client = await SpdyClient.upgrade(streaming.offer("exec", job(), ""))
    client.writer.write(data)
    if not data.startswith(b"POST"):  # that is data for streams that never were, whose frames are very long
        await client.until_closed()
    streams_ = [await other.open(kind) for kind in ("error", "stdin", "stdout", "stderr")]
    await other.send(streams_[1], b"fine", fin=True)
    assert await other.all_of(streams_[2]) == b"fine"
    await client.close()
    await other.close()


@pytest.mark.parametrize("data", [b"\x81\x05hello", b"\xff" * 32, b"\x88\xff" + b"\xff" * 8, b"\x09\x80\0\0\0\0"])
async def test_garbage_instead_of_websocket(streaming: StreamServer, data: bytes) -> None:
    """Is answered by a close frame."""
    async with closing(await WebSocketClient.upgrade(streaming.offer("exec", job(), ""))) as client:
        client.writer.write(data)
        await client.until_closed()
        assert client.close_code == 1002


async def test_bad_channels(streaming: StreamServer) -> None:
    """A broken close signal ends the connection, an unknown channel is ignored."""
    async with closing(await WebSocketClient.upgrade(streaming.offer("exec", job(), ""))) as client:
        await client.send(77, b"x")
        await client.send(1, b"x")
        await client.send_event(BytesMessage(data=b""))
        await client.send(255, b"\0\0\0")
        await client.until_closed()
        assert client.close_code == 1002


async def test_websocket_pings_and_close(streaming: StreamServer) -> None:
    """The heartbeat of Kubernetes' clients, and their leaving in good manners."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(client: Client) -> int:
        await client.gone
        gone.set_result(None)
        return 0

    async with closing(await WebSocketClient.upgrade(streaming.offer("exec", job(run, stdin=True), ""))) as client:
        await client.send_event(Ping(payload=b"1"))
        await client.until(lambda: client.pongs == 1)
        await client.send_event(CloseConnection(code=1000))
        await client.until_closed()
        async with asyncio.timeout(SECONDS):
            await gone


async def test_giant_messages(streaming: StreamServer) -> None:
    """A WebSocket frame of 2^62 bytes and a SPDY frame of 16 MiB are taken as they come."""
    total = 0

    async def run(client: Client) -> int:
        nonlocal total
        collector = Collector()
        client.stdin.feed(collector)  # type: ignore[union-attr]
        await collector.ended
        total = len(collector.data_)
        return 0

    client = await WebSocketClient.upgrade(streaming.offer("exec", job(run, stdin=True), ""))
    client.writer.write(struct.pack("!BBQI", 0x82, 0xFF, 1 << 62, 0) + b"\0" + bytes(3 << 20))
    await client.writer.drain()
    await asyncio.sleep(0.2)
    await client.close()
    await eventually(lambda: total > 0)
    assert total <= 3 << 20


async def test_slow_readers(streaming: StreamServer) -> None:
    """Their output waits in bounds, and others are served meanwhile."""
    written = 0

    async def run(client: Client) -> int:
        nonlocal written
        while not client.gone.done():
            await freely(client.stdout, bytes(CHUNK), 1)
            written += CHUNK
        return 0

    slow = await SpdyClient.upgrade(streaming.offer("exec", job(run, stdout=True), ""), read=False)
    for kind in ("error", "stdout"):
        await slow.open(kind, wait=False)
    await asyncio.sleep(0.5)
    at_rest = written
    await asyncio.sleep(0.3)
    assert written == at_rest, "it goes on writing for a client that does not read"
    assert written < 32 << 20
    async with closing(await SpdyClient.upgrade(streaming.offer("exec", job(), ""))) as other:
        ids = [await other.open(kind) for kind in ("error", "stdin", "stdout", "stderr")]
        await other.send(ids[1], b"quick", fin=True)
        assert await other.all_of(ids[2]) == b"quick"
    await slow.close()
    await asyncio.sleep(0.05)


async def test_pings_of_who_reads_nothing(streaming: StreamServer) -> None:
    """Pongs pile up to a bound, then nothing is received any more."""
    wires = wires_of(streaming)

    async def wait(client: Client) -> int:
        await client.gone
        return 0

    client = await SpdyClient.upgrade(streaming.offer("exec", job(wait, stdout=True), ""), read=False)
    for kind in ("error", "stdout"):
        await client.open(kind, wait=False)
    pings = b"".join(frames.ping(2 * number + 1) for number in range(20_000))
    sender = asyncio.create_task(_flood(client.writer, pings))
    await asyncio.sleep(1)
    assert max(made.waiting for made in wires) <= wire.CHOKED_BYTES + (1 << 20)
    assert not sender.done(), "everything was received"
    sender.cancel()
    await client.close()


async def _flood(writer: asyncio.StreamWriter, data: bytes) -> None:
    for _ in range(200):
        writer.write(data)
        await writer.drain()


async def forwarded(streaming: StreamServer, connect_: Callable[[int, Stream], Awaitable[None]], *ports: int) -> str:
    """The URL of a port-forward."""
    return streaming.offer("portforward", ForwardJob(connect_, ports), "")


async def double(port: int, stream: Stream) -> None:
    """A server on every port: gives back what it got, twice, and its port."""
    if port == 9999:
        raise Unavailable("cannot connect to port 9999")
    collector = Collector()
    stream.feed(collector)
    await collector.ended
    await freely(stream, bytes(collector.data_) * 2 + str(port).encode(), 1)


@pytest.mark.parametrize("tunnel", [False, True])
async def test_port_forward_over_spdy(streaming: StreamServer, tunnel: bool) -> None:
    """Many connections at once over one session, also through a WebSocket."""
    url = await forwarded(streaming, double)
    async with closing(await (Tunnelled if tunnel else SpdyClient).upgrade(url, "portforward.k8s.io")) as client:
        pairs = {}
        for number in range(100):
            port = str(8000 + number % 3)
            error = await client.open("error", port=port, requestid=str(number))
            data = await client.open("data", port=port, requestid=str(number))
            pairs[number] = (error, data, port)
        for number, (_, data, _) in pairs.items():
            await client.send(data, f"<{number}>".encode() * 100, fin=True)
        for number, (error, data, port) in pairs.items():
            assert await client.all_of(data) == f"<{number}>".encode() * 200 + port.encode()
            assert await client.all_of(error) == b""


class Tunnelled(SpdyClient):
    """SPDY inside WebSocket messages."""

    @classmethod
    async def upgrade(cls, url: str, version: str = "", *_: Any, **__: Any) -> Tunnelled:
        outer = await WebSocketClient.upgrade(url, [f"SPDY/3.1+{version}"])
        assert outer.subprotocol == f"SPDY/3.1+{version}"
        client = cls(outer.reader, cast(asyncio.StreamWriter, _Inside(outer)))
        client._task = asyncio.create_task(client._receive(outer))
        return client

    async def _receive(self, outer: WebSocketClient) -> None:
        while await outer.receive():
            if outer._inside:
                continue  # the last message is not whole
            messages, outer.messages = outer.messages, []
            for first, rest in messages:
                for event in self.endpoint.receive(bytes([first]) + rest):
                    self._on_event(event)
            self.flush()
            self._wake()
        self.closed = True
        self._wake()


class _Inside:
    """Writes messages."""

    def __init__(self, outer: WebSocketClient) -> None:
        self._outer = outer
        self.transport = outer.writer.transport

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), 100):  # cut anywhere
            self._outer.writer.write(self._outer.connection.send(BytesMessage(data=data[at : at + 100])))

    async def drain(self) -> None:
        await self._outer.writer.drain()


async def test_refused_ports_are_reported(streaming: StreamServer) -> None:
    """On the error stream; the other connections go on."""
    async with closing(await SpdyClient.upgrade(await forwarded(streaming, double), "portforward.k8s.io")) as client:
        error = await client.open("error", port="9999", requestid="1")
        data = await client.open("data", port="9999", requestid="1")
        assert await client.all_of(error) == b"cannot connect to port 9999"
        assert await client.all_of(data) == b""
        await client.open("error", port="80", requestid="2")
        data = await client.open("data", port="80", requestid="2")
        await client.send(data, b"a", fin=True)
        assert await client.all_of(data) == b"aa80"


async def test_data_for_refused_ports_does_not_fill_the_connection(streaming: StreamServer) -> None:
    """Nobody will take it, so it is thrown away."""
    async with closing(await SpdyClient.upgrade(await forwarded(streaming, double), "portforward.k8s.io")) as client:
        for number in range(10):
            data = await client.open("data", port="9999", requestid=str(number))
            await client.send(data, bytes(200_000))
            error = await client.open("error", port="9999", requestid=str(number))
            assert await client.all_of(error) == b"cannot connect to port 9999"
        await client.open("error", port="80", requestid="ok")
        data = await client.open("data", port="80", requestid="ok")
        await client.send(data, bytes(1_000_000), fin=True)
        assert len(await client.all_of(data)) == 2_000_002


async def test_pairs_without_request_ids(streaming: StreamServer) -> None:
    """Old clients: the data stream follows the error stream."""
    async with closing(await SpdyClient.upgrade(await forwarded(streaming, double), "portforward.k8s.io")) as client:
        for port in ("80", "81"):
            await client.open("error", port=port)
            data = await client.open("data", port=port)
            await client.send(data, b"b", fin=True)
            assert await client.all_of(data) == b"bb" + port.encode()


@pytest.mark.parametrize(
    "headers",
    [
        {"kind": "data", "port": "0", "requestid": "1"},
        {"kind": "data", "port": "65536", "requestid": "1"},
        {"kind": "data", "port": "-1", "requestid": "1"},
        {"kind": "data", "port": "", "requestid": "1"},
        {"kind": "data", "port": "8" * 5000, "requestid": "1"},
        {"kind": "stdin", "port": "80", "requestid": "1"},
    ],
)
async def test_pairs_that_make_no_sense(streaming: StreamServer, headers: dict[str, str]) -> None:
    """Are reset."""
    async with closing(await SpdyClient.upgrade(await forwarded(streaming, double), "portforward.k8s.io")) as client:
        assert await client.open(**headers) in client.reset


async def test_half_pairs(streaming: StreamServer) -> None:
    """Are reset after a while; a doubled half at once."""
    async with serving(stream_creation_timeout=0.3) as short:
        url = await forwarded(short, double)
        async with closing(await SpdyClient.upgrade(url, "portforward.k8s.io")) as client:
            first = await client.open("data", port="80", requestid="1")
            assert await client.open("data", port="80", requestid="1") in client.reset
            assert await client.open("error", port="81", requestid="1") in client.reset
            await client.until(lambda: first in client.reset)


async def test_pairs_are_bounded(streaming: StreamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And places become free."""
    monkeypatch.setattr(portforward, "MAX_PAIRS", 2)
    async with closing(await SpdyClient.upgrade(await forwarded(streaming, double), "portforward.k8s.io")) as client:
        pairs = []
        for number in range(2):
            await client.open("error", port="80", requestid=str(number))
            pairs.append(await client.open("data", port="80", requestid=str(number)))
        assert await client.open("error", port="80", requestid="9") in client.reset
        await client.send(pairs[0], b"", fin=True)
        await client.all_of(pairs[0])
        assert await client.open("error", port="80", requestid="10") not in client.reset


async def test_a_broken_forward(streaming: StreamServer) -> None:
    """A reset by the client reaches the job, as does its leaving."""
    seen: list[str] = []

    async def watch(_port: int, stream: Stream) -> None:
        try:
            await stream.broken
            seen.append("broken")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with closing(await SpdyClient.upgrade(await forwarded(streaming, watch), "portforward.k8s.io")) as client:
        for number in range(2):
            await client.open("error", port="80", requestid=str(number))
            data = await client.open("data", port="80", requestid=str(number))
            if not number:
                client.endpoint.reset(data)
                client.flush()
                await eventually(lambda: seen == ["broken"])
    await eventually(lambda: len(seen) == 2)


async def test_port_forward_over_channels(streaming: StreamServer) -> None:
    """Two channels for each port, which comes first."""
    closed = asyncio.Event()

    async def one(port: int, stream: Stream) -> None:
        if port == 9999:
            raise Unavailable("no such port")
        put(stream, b"port %d" % port)
        await closed.wait()

    url = await forwarded(streaming, one, 80, 9999)
    async with closing(await WebSocketClient.upgrade(url, ["v4.channel.k8s.io"])) as client:
        await client.until(lambda: b"port 80" in client.on(0) and len(client.on(3)) > 2)
        closed.set()
        await client.until_closed()
    assert client.on(0) == struct.pack("<H", 80) + b"port 80"
    assert client.on(1) == struct.pack("<H", 80)
    assert client.on(2) == struct.pack("<H", 9999)
    assert client.on(3) == struct.pack("<H", 9999) + b"no such port"


async def test_stopping_ends_sessions() -> None:
    """And tells why."""
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(_client: Client) -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set_result(None)
            raise
        return 0

    async with serving() as made:
        client = await SpdyClient.upgrade(made.offer("exec", job(run, stdout=True), ""))
        error, _ = await client.open("error"), await client.open("stdout")
        await asyncio.sleep(0.05)
        await made.stop()
        assert b"being stopped" in await client.all_of(error)
        await client.until_closed()
        assert cancelled.done()
        await client.close()


async def test_ports_that_cannot_be_had() -> None:
    """Are told as an error of the configuration."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        made = StreamServer(ApiSettings(stream_port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"api\.stream_address 127\.0\.0\.1"):
            await made.start()
        await made.stop()


@pytest.mark.parametrize(("address", "shown"), [("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")])
async def test_urls(address: str, shown: str) -> None:
    """Are of use to who is on the same node."""
    try:
        async with serving(stream_address=address) as made:
            url = made.offer("exec", job(), "")
            assert url.startswith(f"http://{shown}:")
            async with closing(await SpdyClient.upgrade(url)):
                pass
    except ConfigError:
        pytest.skip("no IPv6 here")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate signed by itself, for ``name``."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    options = ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return cert, key


async def test_tls(tmp_path: Path) -> None:
    """With both protocols, and a new certificate without a new start."""
    cert, key = await asyncio.to_thread(certificate, tmp_path, "old")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def name_shown(url: str) -> bytes:
        _, writer = await connect(url, context)
        shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return shown

    async with serving(stream_tls_cert=str(cert), stream_tls_key=str(key), stream_tls_min_version="1.3") as made:
        url = made.offer("exec", job(), "")
        assert url.startswith("https://")
        async with closing(await SpdyClient.upgrade(url, tls=context)) as client:
            ids = [await client.open(kind) for kind in ("error", "stdin", "stdout", "stderr")]
            await client.send(ids[1], b"x" * 300_000, fin=True)
            assert await client.all_of(ids[2]) == b"x" * 300_000
        async with closing(await WebSocketClient.upgrade(made.offer("exec", job(), ""), tls=context)) as client:
            await client.send(0, b"hello")
            await client.send(255, b"\0")
            await client.until_closed()
            assert client.on(1) == b"hello"
        assert b"old" in await name_shown(url)
        await asyncio.to_thread(certificate, tmp_path, "new")
        assert b"new" in await name_shown(url)
        cert.write_text("garbage")
        assert b"new" in await name_shown(url)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(url, old)


@pytest.mark.parametrize("content", ["", "garbage"])
async def test_certificates_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    """Are told at the start."""
    cert = tmp_path / "cert.pem"
    if content:
        cert.write_text(content)
    made = StreamServer(ApiSettings(stream_tls_cert=str(cert), stream_tls_key=str(cert)))
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        await made.start()


async def test_streams_that_come_and_go_at_once(streaming: StreamServer) -> None:
    """Opened, used and reset in one piece; and one-way streams."""
    async with closing(await SpdyClient.upgrade(streaming.offer("exec", job(), ""))) as client:
        encoder = client.endpoint._encoder
        hasty = frames.syn_stream(1, encoder.encode({"streamType": "stdin"})) + frames.data_header(1, 3) + b"abc"
        hasty += frames.two_words(frames.Kind.RST_STREAM, 1, 5)
        one_way = frames.syn_stream(3, encoder.encode({"streamType": "error"}), frames.FLAG_UNIDIRECTIONAL)
        client.endpoint._next_id = 5
        client.writer.write(hasty + one_way)
        error, _ = await client.open("error"), await client.open("stdout")
        await client.open("stderr")
        status = await client.all_of(error)
        assert exit_code(status) == 3  # all four have been there, even if stdin is gone by now


async def test_swapped_and_early_frames(streaming: StreamServer) -> None:
    """Everything at once behind the request, before the server has switched: streams out of order, then data."""
    url = streaming.offer("exec", job(), "")
    reader, writer = await connect(url)
    encoder = HeaderEncoder()
    order = [(5, "stdout"), (1, "error"), (7, "stderr"), (3, "stdin")]
    early = b"".join(frames.syn_stream(number, encoder.encode({"streamType": kind})) for number, kind in order)
    early += frames.data_header(3, 5, fin=True) + b"early"
    head = f"POST /{url.split('/', 3)[3]} HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: spdy/3.1\r\n"
    writer.write(f"{head}X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n".encode() + early)
    async with asyncio.timeout(SECONDS):
        await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(frames.data_header(5, 5) + b"early")
    writer.close()
