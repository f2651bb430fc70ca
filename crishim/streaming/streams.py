"""A stream as exec, attach and port-forward use it, whatever protocol carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from crishim.host.pump import HEADROOM, Consumer

QUEUE_BYTES = 512 << 10
"""What a connection keeps for consumers that cannot take it, before it receives nothing more."""
DISCARD_SECONDS = 0.1
"""How long a command that writes for a client who has left waits between two chunks that are thrown away."""


class Carrier(Protocol):
    """The session that a stream belongs to."""

    def send(self, stream: Stream, buffer: bytearray, end: int) -> bool:
        """Send ``buffer[HEADROOM:end]``. True: the buffer is still in use."""

    def finish(self, stream: Stream) -> None:
        """Say that nothing more will come."""

    def reset(self, stream: Stream) -> None:
        """Kill the stream."""

    def full(self, stream: Stream) -> bool:
        """Whether to wait."""

    def when_free(self, stream: Stream, resume: Callable[[], None]) -> None:
        """Call ``resume`` once when it is not full any more."""

    def consumed(self, stream: Stream, count: int) -> None:
        """Received data was dealt with."""

    def queued(self, delta: int) -> None:
        """So much more, or less, is kept for consumers."""


class _Nowhere:
    """A consumer."""

    def data(self, chunk: memoryview) -> None: ...

    def end(self) -> None: ...


class Stream:
    """Both directions: an inlet for what the client sends, an outlet for what it gets (:mod:`crishim.host.pump`)."""

    def __init__(self, carrier: Carrier, stream_id: int, headers: Mapping[str, str]) -> None:
        self.id, self.headers = stream_id, headers
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the client has reset the stream or left."""
        self._carrier = carrier
        self._consumer: Consumer | None = None
        self._held = True
        self._queue = bytearray()
        self._ended = self._end_given = self._finished = False

    # what the client sends

    def feed(self, consumer: Consumer) -> None:
        """Give everything to ``consumer``."""
        self._consumer = consumer
        self.release()

    def ignore(self) -> None:
        """Throw away what the client has sent and will send; it would count against what others may send."""
        self.feed(_Nowhere())

    def hold(self) -> None:
        """Give nothing for now."""
        self._held = True

    def release(self) -> None:
        """Go on giving."""
        self._held = False
        if self._queue and self._consumer is not None:
            waiting, self._queue = self._queue, bytearray()
            self._consumer.data(memoryview(waiting))
            self._carrier.queued(-len(waiting))
            self._carrier.consumed(self, len(waiting))
        self._give_end()

    def _give_end(self) -> None:
        ready = self._ended and not self._end_given and not self._held and not self._queue
        if ready and self._consumer is not None:
            self._end_given = True
            self._consumer.end()

    def arrived(self, data: memoryview) -> None:
        """Of the session: the client sent data."""
        if self._held or self._consumer is None:
            self._queue += data
            self._carrier.queued(len(data))
        else:
            self._consumer.data(data)
            self._carrier.consumed(self, len(data))

    def ended(self, *, lost: bool = False) -> None:
        """Of the session: the client sends nothing more, or is ``lost``."""
        self._ended = True
        if lost and not self.broken.done():
            self.broken.set_result(None)
        self._give_end()

    # what the client gets

    @property
    def lost(self) -> bool:
        """Whether there is nobody to get it."""
        return self.broken.done()

    @property
    def full(self) -> bool:
        """Whether writers should wait."""
        return self.lost or self._carrier.full(self)

    def write(self, buffer: bytearray, end: int) -> bool:
        """Send ``buffer[HEADROOM:end]``, or throw it away where there is nobody to get it."""
        if self.lost or self._finished:
            return False
        return self._carrier.send(self, buffer, end)

    def send(self, data: bytes) -> None:
        """Send some bytes, for what is small."""
        self.write(bytearray(HEADROOM) + data, HEADROOM + len(data))

    def finish(self) -> None:
        """Nothing more will be sent."""
        if not self._finished:
            self._finished = True
            if not self.lost:
                self._carrier.finish(self)

    @property
    def done(self) -> bool:
        """Whether both directions have ended."""
        return self._ended and self._finished

    def reset(self) -> None:
        """Kill the stream in both directions."""
        if not self.lost:
            self._carrier.reset(self)
        self._finished = True
        self.ended(lost=True)
        self.ignore()

    def when_free(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` when it is not full any more; for a lost stream, after a while."""
        if self.lost:
            asyncio.get_running_loop().call_later(DISCARD_SECONDS, resume)
        else:
            self._carrier.when_free(self, resume)


class Waiting:
    """Writers that wait until their streams are not full."""

    def __init__(self) -> None:
        self._resumes: list[tuple[Stream, Callable[[], None]]] = []

    def add(self, stream: Stream, resume: Callable[[], None]) -> None:
        """One more."""
        self._resumes.append((stream, resume))

    def wake(self) -> None:
        """Go on with those that can; those of lost streams throw away what they have, slowly."""
        waiting, self._resumes = self._resumes, []
        for stream, resume in waiting:
            if stream.lost:
                stream.when_free(resume)
            elif stream.full:
                self._resumes.append((stream, resume))
            else:
                resume()


class Queued:
    """How much is kept for consumers, and whether the link is held for it."""

    def __init__(self, hold: Callable[[], None], release: Callable[[], None]) -> None:
        self._hold, self._release = hold, release
        self._bytes = 0
        self._held = False

    def add(self, delta: int) -> None:
        """Count."""
        self._bytes += delta
        if self._held != (self._bytes > QUEUE_BYTES):
            self._held = not self._held
            (self._hold if self._held else self._release)()
