"""Exec and attach for one client: gathers the streams, runs the job, tells how it ended.

Source: the remotecommand protocols of Kubernetes, version 1 to 5 (k8s.io/apimachinery, util/remotecommand).
Version 1 differs from 2 only by faults that nobody can need: stdin could not be ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from crishim.containers.client import Client, Sizes
from crishim.errors import CrishimError
from crishim.streaming.channels import COMMAND_DIALECTS, Channel
from crishim.streaming.handshake import Upgraded
from crishim.streaming.sizes import SizeDecoder
from crishim.streaming.spdy_session import SpdySession
from crishim.streaming.status import Outcome
from crishim.streaming.streams import Stream
from crishim.streaming.websocket import ChannelSession, WebSocket
from crishim.streaming.wire import Wire

_log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0
"""How long a client that has read everything may take to close the connection."""

_TYPES = {
    "error": Channel.ERROR,
    "stdin": Channel.STDIN,
    "stdout": Channel.STDOUT,
    "stderr": Channel.STDERR,
    "resize": Channel.RESIZE,
}
_WITHOUT_RESIZE = ("channel.k8s.io", "v2.channel.k8s.io")
_WITH_JSON = ("v4.channel.k8s.io", "v5.channel.k8s.io")


@dataclass(frozen=True)
class CommandJob:
    """What a token of exec or attach is for. ``run`` serves a client; its result is the exit code."""

    run: Callable[[Client], Awaitable[int]]
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False

    @property
    def channels(self) -> set[Channel]:
        """The streams that were asked for, without those of the protocol itself."""
        wanted = {Channel.STDIN: self.stdin, Channel.STDOUT: self.stdout, Channel.STDERR: self.stderr}
        return {channel for channel, asked in wanted.items() if asked}


class Gathering:
    """Accepts the streams of a client until all that are expected are there."""

    def __init__(self, expected: set[Channel]) -> None:
        self._expected = expected
        self.streams: dict[Channel, Stream] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def accept(self, stream: Stream) -> bool:
        """Whether a new stream is one of those expected, and the first of its type."""
        channel = _TYPES.get(stream.headers.get("streamtype", "").lower())
        if channel is None or channel not in self._expected or channel in self.streams:
            return False
        self.streams[channel] = stream
        if len(self.streams) == len(self._expected) and not self.complete.done():
            self.complete.set_result(None)
        return True


async def serve_spdy(wire: Wire, trailing: bytes, job: CommandJob, version: str, creation_timeout: float) -> None:
    """Serve a client that speaks SPDY."""
    expected = job.channels | {Channel.ERROR}
    if job.tty and version not in _WITHOUT_RESIZE:
        expected.add(Channel.RESIZE)
    gathering = Gathering(expected)
    session = SpdySession(wire, gathering.accept)
    wire.receive_by(session)
    session.received(memoryview(trailing))
    try:
        async with asyncio.timeout(creation_timeout):
            await asyncio.wait([gathering.complete, wire.left], return_when=asyncio.FIRST_COMPLETED)
        if gathering.complete.done():
            await run(job, gathering.streams, wire.left, json_status=version in _WITH_JSON)
            await settled(wire, lambda: session.unsent)
    except TimeoutError:
        _log.info("a client did not open its streams within %g s", creation_timeout)
    finally:
        session.close()


async def serve_websocket(wire: Wire, trailing: bytes, job: CommandJob, upgraded: Upgraded) -> None:
    """Serve a client that speaks WebSocket."""
    dialect = COMMAND_DIALECTS[upgraded.protocol]
    socket = WebSocket(wire, upgraded.connection)
    readable = {Channel.STDIN} & job.channels | {Channel.RESIZE}
    session = ChannelSession(socket, dialect, len(Channel), readable)
    socket.receive_by(session)
    _greet(job, session)
    socket.received(memoryview(trailing))
    try:
        streams = {channel: session.streams[channel] for channel in job.channels | {Channel.ERROR, Channel.RESIZE}}
        await run(job, streams, wire.left, json_status=dialect.json_status)
        socket.say_close()
        await settled(wire, lambda: False)
    finally:
        socket.close()


def _greet(job: CommandJob, session: ChannelSession) -> None:
    """An empty message on the first channel that is ours says that the connection stands."""
    ours = (Channel.STDOUT, Channel.STDERR, Channel.ERROR)
    session.streams[next(channel for channel in ours if channel in job.channels | {Channel.ERROR})].send(b"")


async def run(
    job: CommandJob, streams: dict[Channel, Stream], left: asyncio.Future[None], *, json_status: bool
) -> None:
    """Run the job and tell its outcome on the error stream; everything is finished then."""
    sizes = Sizes()
    if Channel.RESIZE in streams:
        streams[Channel.RESIZE].feed(SizeDecoder(sizes))
    stdin, stdout, stderr = (streams.get(channel) for channel in (Channel.STDIN, Channel.STDOUT, Channel.STDERR))
    client = Client(stdin, stdout, stderr, sizes, left)
    outcome = Outcome(error="the container runtime is being stopped")
    try:
        outcome = await _outcome(job, client)
    finally:
        error = streams.pop(Channel.ERROR)
        for stream in streams.values():
            stream.finish()
            stream.ignore()
        report = outcome.as_json() if json_status else outcome.as_text()
        if report:
            error.send(report)
        error.finish()


async def _outcome(job: CommandJob, client: Client) -> Outcome:
    try:
        return Outcome(exit_code=await job.run(client))
    except CrishimError as err:
        _log.info("failed: %s", err.message)
        return Outcome(error=err.message)
    except Exception as err:
        _log.exception("failed unexpectedly")
        return Outcome(error=f"unexpected {type(err).__name__}: {err}")


async def settled(wire: Wire, unsent: Callable[[], bool]) -> None:
    """Wait until the client has closed the connection, or has had everything and some time to do so."""
    while not wire.left.done():
        waiting = wire.waiting or unsent()
        await asyncio.wait([wire.left], timeout=LINGER_SECONDS)
        if not waiting:
            return
