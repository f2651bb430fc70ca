"""A client on a connection to conmon, with the test as conmon."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crishim.containers import attach
from crishim.containers.attach import Parking, _connect, _Session, control
from crishim.containers.client import Client
from crishim.errors import FailedPrecondition, ResourceExhausted
from crishim.host.pump import HEADROOM, Consumer

STDOUT, STDERR = b"\2", b"\3"


class Sink:
    """An outlet that can be full."""

    def __init__(self) -> None:
        self.data = b""
        self.writes = 0
        self.full = False
        self.waiting: list[Callable[[], None]] = []

    def write(self, buffer: bytearray, end: int) -> bool:
        self.data += bytes(buffer[HEADROOM:end])
        self.writes += 1
        return False

    def finish(self) -> None:
        raise AssertionError("the session's end does that")

    def when_free(self, resume: Callable[[], None]) -> None:
        self.waiting.append(resume)

    def free(self) -> None:
        self.full = False
        waiting, self.waiting = self.waiting, []
        for resume in waiting:
            resume()


class Source:
    """An inlet."""

    def __init__(self) -> None:
        self.consumer: Consumer | None = None

    def feed(self, consumer: Consumer) -> None:
        self.consumer = consumer

    def give(self, data: bytes) -> None:
        assert self.consumer is not None
        self.consumer.data(memoryview(data))

    def end(self) -> None:
        assert self.consumer is not None
        self.consumer.end()

    def hold(self) -> None: ...

    def release(self) -> None: ...


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours and conmon's."""
    ours, conmon = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, conmon:
        yield ours, conmon


Ends = tuple[socket.socket, socket.socket]


async def test_packets_are_sorted_and_joined(ends: Ends) -> None:
    """Each stream gets its own, in few writes."""
    out, err = Sink(), Sink()
    session = _Session(ends[0], Client(stdout=out, stderr=err))
    for number in range(10):
        ends[1].send(STDOUT + b"<%d>" % number)
    ends[1].send(STDERR + b"e")
    ends[1].send(STDOUT)
    ends[1].send(b"\7what is this")
    ends[1].send(STDOUT + b"last")
    ends[1].close()
    session.start(stdin=False, once=False, tty=False)
    await session.over
    session.close()
    assert out.data == b"".join(b"<%d>" % number for number in range(10)) + b"last"
    assert (err.data, session.ended) == (b"e", True)
    assert out.writes <= 3


async def test_what_nobody_asked_for_is_dropped(ends: Ends) -> None:
    """A client of standard error alone."""
    err = Sink()
    session = _Session(ends[0], Client(stderr=err))
    ends[1].send(STDOUT + b"x" * 8192)
    ends[1].send(STDERR + b"e")
    ends[1].close()
    session.start(stdin=True, once=False, tty=False)
    await session.over
    session.close()
    assert err.data == b"e"


@pytest.mark.parametrize(("stdin", "sent"), [(True, [8192, 8192, 3616]), (False, [])])
async def test_input_goes_in_packets(ends: Ends, stdin: bool, sent: list[int]) -> None:
    """Of a size that conmon takes whole; nowhere, if the container has no stdin."""
    source = Source()
    session = _Session(ends[0], Client(stdin=source))
    session.start(stdin=stdin, once=False, tty=True)
    source.give(b"x" * 20_000)
    source.end()
    await asyncio.sleep(0.01)
    assert not session.over.done()
    assert [len(ends[1].recv(1 << 16)) for _ in sent] == sent
    session.close()


async def test_the_end_of_input_that_is_there_once(ends: Ends) -> None:
    """Is told to conmon, and output goes on."""
    source, out = Source(), Sink()
    session = _Session(ends[0], Client(stdin=source, stdout=out))
    session.start(stdin=True, once=True, tty=False)
    source.give(b"x")
    source.end()
    assert (ends[1].recv(10), ends[1].recv(10)) == (b"x", b"")
    ends[1].send(STDOUT + b"bye")
    ends[1].close()
    await session.over
    session.close()
    assert out.data == b"bye"


async def test_the_end_of_input_for_others(ends: Ends) -> None:
    """Ends the session, after what the container says to it."""
    source, out = Source(), Sink()
    session = _Session(ends[0], Client(stdin=source, stdout=out))
    session.start(stdin=True, once=False, tty=False)
    source.end()
    await asyncio.sleep(0.05)
    ends[1].send(STDOUT + b"answer")
    await session.over
    session.close()
    assert (out.data, session.ended) == (b"answer", False)


async def test_a_client_that_does_not_keep_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """May pause, and is dismissed if it pauses too long."""
    monkeypatch.setattr(attach, "STALL_SECONDS", 0.2)
    out = Sink()
    session = _Session(ends[0], Client(stdout=out))
    session.start(stdin=False, once=False, tty=False)
    for number in range(4):
        out.full = True
        ends[1].send(STDOUT + b"%d" % number)
        await asyncio.sleep(0.1)
        out.free()
    await asyncio.sleep(0.01)
    assert out.data == b"0123"
    out.full = True
    ends[1].send(STDOUT + b"4")
    with pytest.raises(ResourceExhausted, match="read nothing"):
        await session.over
    session.close()
    out.free()


async def test_a_client_that_leaves(ends: Ends) -> None:
    """Ends the session."""
    client = Client(stdout=Sink())
    session = _Session(ends[0], client)
    session.start(stdin=False, once=False, tty=False)
    client.gone.set_result(None)
    await session.over
    session.close()


async def test_parked_connections(ends: Ends) -> None:
    """Are read, are taken over, and closed when the container has ended."""
    parking = Parking()
    parking.park("c", ends[0])
    for _ in range(1000):
        while True:
            try:
                ends[1].send(STDOUT + b"x" * 8192, socket.MSG_DONTWAIT)
                break
            except BlockingIOError:
                await asyncio.sleep(0)
    assert parking.take("other") is None
    assert parking.take("c") is ends[0]
    assert parking.take("c") is None
    parking.park("c", ends[0])
    ends[1].close()
    await asyncio.sleep(0.01)
    assert (parking.take("c"), ends[0].fileno()) == (None, -1)
    parking.close()


def test_connecting_by_long_paths(tmp_path: Path) -> None:
    """Those of sockets are short."""
    bundle = tmp_path / ("x" * 100)
    bundle.mkdir()
    with pytest.raises(FailedPrecondition, match="cannot attach"):
        _connect(bundle)
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as conmon,
    ):
        conmon.bind(f"{short}/attach")
        conmon.listen()

        _connect(Path(short)).close()


def test_control(tmp_path: Path) -> None:
    """One line in the fifo, or a clear error where nobody reads it."""
    with pytest.raises(FailedPrecondition, match="monitor"):
        control(tmp_path, "1 2 3")
    os.mkfifo(tmp_path / "ctl")
    with pytest.raises(FailedPrecondition, match="monitor"):
        control(tmp_path, "1 2 3")
    reader = os.open(tmp_path / "ctl", os.O_RDONLY | os.O_NONBLOCK)
    control(tmp_path, "2 0 0")
    assert os.read(reader, 100) == b"2 0 0\n"
    with pytest.raises(FailedPrecondition, match="monitor"):
        for _ in range(100_000):
            control(tmp_path, "1 2 3")  # it does not read
    os.close(reader)
