"""Readers and writers of descriptors: everything arrives, nothing is kept beyond bounds, ends are told."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pty
import socket
from collections.abc import Callable, Iterator

import pytest

from crishim.host import pump
from crishim.host.pump import CHUNK, HEADROOM, Consumer, Reader, Writer


class Sink:
    """An outlet that can be full."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.chunks: list[bytes] = []
        self.full = False
        self.finished = False
        self.keeps = keeps
        self.kept: list[memoryview] = []
        self.waiting: list[Callable[[], None]] = []

    def write(self, buffer: bytearray, end: int) -> bool:
        self.chunks.append(bytes(buffer[HEADROOM:end]))
        if self.keeps:
            self.kept.append(memoryview(buffer)[HEADROOM:end])
        return self.keeps

    def finish(self) -> None:
        assert not self.finished
        self.finished = True

    def when_free(self, resume: Callable[[], None]) -> None:
        self.waiting.append(resume)

    def free(self) -> None:
        self.full = False
        waiting, self.waiting = self.waiting, []
        for resume in waiting:
            resume()

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)


class Source:
    """An inlet that a test drives."""

    def __init__(self) -> None:
        self.consumer: Consumer | None = None
        self.held = False

    def feed(self, consumer: Consumer) -> None:
        self.consumer = consumer

    def hold(self) -> None:
        assert not self.held
        self.held = True

    def release(self) -> None:
        self.held = False

    def give(self, data: bytes) -> None:
        assert self.consumer is not None and not self.held
        self.consumer.data(memoryview(data))

    def end(self) -> None:
        assert self.consumer is not None
        self.consumer.end()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose ends do not block."""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


async def test_reads_to_the_end(pipe: tuple[int, int]) -> None:
    """In pieces as they come."""
    sink = Sink()
    reader = Reader(pipe[0], sink)
    reader.start()
    os.write(pipe[1], b"one")
    await asyncio.sleep(0.01)
    os.write(pipe[1], b"two")
    os.close(pipe[1])
    assert await reader.ended is None
    assert (sink.chunks, sink.finished) == ([b"one", b"two"], True)
    reader.close()


async def test_pauses_while_the_outlet_is_full(pipe: tuple[int, int]) -> None:
    """The pipe then stops who writes."""
    sink = Sink()
    reader = Reader(pipe[0], sink)
    reader.start()
    os.write(pipe[1], b"one")
    sink.full = True
    await asyncio.sleep(0.01)
    os.write(pipe[1], b"two")
    await asyncio.sleep(0.01)
    assert sink.chunks == [b"one"]
    sink.free()
    os.close(pipe[1])
    await reader.ended
    assert sink.data == b"onetwo"


async def test_an_outlet_that_is_always_full_gets_one_chunk_at_a_time(pipe: tuple[int, int]) -> None:
    """As those of clients who have left: what they do not get is thrown away slowly."""
    sink = Sink()
    sink.full = True
    reader = Reader(pipe[0], sink)
    reader.start()
    for number in range(5):
        os.write(pipe[1], b"%d" % number)
        await asyncio.sleep(0.01)
        assert sink.data == b"01234"[: number + 1]
        resume = sink.waiting.pop()
        assert not sink.waiting
        resume()
    os.close(pipe[1])
    await reader.ended


async def test_a_kept_buffer_is_not_written_again(pipe: tuple[int, int]) -> None:
    """Transports may keep a view of it."""
    sink = Sink(keeps=True)
    reader = Reader(pipe[0], sink)
    reader.start()
    for number in range(20):
        os.write(pipe[1], b"%04d" % number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    os.close(pipe[1])
    await reader.ended
    assert b"".join(bytes(view) for view in sink.kept) == sink.data == b"".join(b"%04d" % n for n in range(20))


async def test_a_terminal_is_read_often_for_one_write() -> None:
    """And its hang-up is an end."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    sink = Sink()
    reader = Reader(master, sink, reads=16)
    await asyncio.to_thread(os.write, slave, b"x" * 3000 + b"\n")
    reader.start()
    await asyncio.sleep(0.05)
    os.close(slave)
    error = await reader.ended
    assert isinstance(error, OSError)
    assert sink.data == b"x" * 3000 + b"\r\n"
    os.close(master)


async def test_drain_waits_for_the_end(pipe: tuple[int, int]) -> None:
    """A command that has ended has closed its side."""
    sink = Sink()
    reader = Reader(pipe[0], sink)
    reader.start()
    os.write(pipe[1], b"last words")
    os.close(pipe[1])
    await reader.drain(5)
    assert (sink.data, sink.finished) == (b"last words", True)


async def test_drain_does_not_wait_for_others(pipe: tuple[int, int]) -> None:
    """A child that goes on holds the pipe open: what is in it counts, what it writes later does not."""
    sink = Sink()
    reader = Reader(pipe[0], sink)
    reader.start()
    sink.full = True
    os.write(pipe[1], b"first")
    await asyncio.sleep(0.01)
    os.write(pipe[1], b"x" * 1000)
    draining = asyncio.create_task(reader.drain(0.02))
    await asyncio.sleep(0.1)
    assert not draining.done()  # the client has not had it yet
    os.write(pipe[1], b"child")
    sink.free()
    await draining
    assert sink.data.startswith(b"first" + b"x" * 1000)
    assert sink.finished


async def test_drain_of_a_silent_pipe_that_stays_open(pipe: tuple[int, int]) -> None:
    """Is short."""
    reader = Reader(pipe[0], Sink())
    reader.start()
    async with asyncio.timeout(1):
        await reader.drain(0.02)
    assert reader.ended.done()


async def test_writes_in_order_and_holds_back(pipe: tuple[int, int]) -> None:
    """What the pipe cannot take holds the client; the end comes after everything."""
    source, ended = Source(), asyncio.get_running_loop().create_future()
    writer = Writer(pipe[1], source, lambda: ended.set_result(None))
    writer.start()
    digest, sent = hashlib.sha256(), 0
    got = hashlib.sha256()
    for number in range(40):
        data = bytes([number]) * 50_000
        while source.held:
            got.update(os.read(pipe[0], 10_000))
            await asyncio.sleep(0)
        source.give(data)
        digest.update(data)
        sent += len(data)
    source.end()
    while not ended.done():
        if pump.readable_bytes(pipe[0]):
            got.update(os.read(pipe[0], 1 << 20))
        await asyncio.sleep(0)
    while left := pump.readable_bytes(pipe[0]):
        got.update(os.read(pipe[0], left))
    assert got.digest() == digest.digest()
    writer.close()


async def test_nobody_reads(pipe: tuple[int, int]) -> None:
    """What is written then is dropped, and the client is not held."""
    source = Source()
    Writer(pipe[1], source, lambda: None).start()
    os.close(pipe[0])
    source.give(b"x" * 1_000_000)
    source.give(b"y")
    assert not source.held


async def test_nobody_reads_any_more(pipe: tuple[int, int]) -> None:
    """Nor if the client was held when the reader left."""
    source, ends = Source(), []
    Writer(pipe[1], source, lambda: ends.append(1)).start()
    source.give(b"x" * 1_000_000)
    assert source.held
    source.end()
    os.close(pipe[0])
    await asyncio.sleep(0.02)
    assert ends == [1]


async def test_closing_lets_the_client_go(pipe: tuple[int, int]) -> None:
    """It is not held for ever."""
    source = Source()
    writer = Writer(pipe[1], source, lambda: None)
    writer.start()
    source.give(b"x" * 1_000_000)
    assert source.held
    writer.close()
    writer.close()
    source.give(b"more")  # which asserts that it is not held


async def test_packets_keep_their_bounds() -> None:
    """Of a seqpacket socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        source = Source()
        Writer(ours.fileno(), source, lambda: None, most=100).start()
        source.give(b"x" * 250)
        assert [len(theirs.recv(1000)) for _ in range(3)] == [100, 100, 50]


def test_pipes_for_commands() -> None:
    """Our end does not block, the command's does."""
    for read_here in (True, False):
        ours, theirs = pump.pipe(read_here=read_here)
        assert (os.get_blocking(ours), os.get_blocking(theirs)) == (False, True)
        assert not os.get_inheritable(ours)
        os.close(ours)
        os.close(theirs)


def test_readable_bytes_of_what_was_hung_up() -> None:
    """Is 0."""
    master, slave = pty.openpty()
    os.close(slave)
    assert pump.readable_bytes(master) == 0
    os.close(master)
    assert CHUNK >= 64 << 10
