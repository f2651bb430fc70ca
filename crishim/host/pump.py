"""Moves bytes between file descriptors and the streams of clients, bounded and without touching them one by one.

A :class:`Reader` reads a descriptor into a buffer that all readers share and hands it on at once; it pauses
while whoever takes the bytes is full. A :class:`Writer` writes what a client sends; it holds the client back
while the descriptor is full. Both live on the event loop's readiness callbacks: no task and no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Callable
from typing import Protocol

HEADROOM = 32
"""Bytes that are free before what is read, for the headers of a protocol."""
CHUNK = 256 << 10
"""Most bytes that are read and handed on at once."""
PIPE_BYTES = 1 << 20
"""What the pipes of a command hold, if the kernel lets them; a program has fewer pauses then."""


class Outlet(Protocol):
    """Where bytes go."""

    @property
    def full(self) -> bool:
        """Whether to wait for :meth:`when_free` before the next write."""

    def write(self, buffer: bytearray, end: int) -> bool:
        """Take ``buffer[HEADROOM:end]``; what is before may be overwritten. True: the buffer is still in use."""

    def finish(self) -> None:
        """Nothing more will come."""

    def when_free(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` once, when it is not full any more."""


class Consumer(Protocol):
    """Takes what an :class:`Inlet` gives."""

    def data(self, chunk: memoryview) -> None:
        """Some bytes, valid during the call."""

    def end(self) -> None:
        """Nothing more will come."""


class Inlet(Protocol):
    """Where bytes come from."""

    def feed(self, consumer: Consumer) -> None:
        """Give everything to ``consumer`` from now on, beginning with what has come already."""

    def hold(self) -> None:
        """Give nothing until :meth:`release`; what comes meanwhile is kept, within bounds."""

    def release(self) -> None:
        """Go on giving; may call the consumer."""


class _Scratch:
    """The buffer that all readers share: each one is done with it when its callback ends."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Leave the buffer to the one who still needs it."""
        self.buffer = bytearray(HEADROOM + CHUNK)
        self.space = memoryview(self.buffer)[HEADROOM:]


scratch = _Scratch()


class Reader:
    """Reads a non-blocking descriptor until its end. It is not closed here."""

    def __init__(self, fd: int, outlet: Outlet, *, reads: int = 1) -> None:
        """``reads`` is how often it is read for one write: a terminal gives only 4 KiB each time."""
        self._loop = asyncio.get_running_loop()
        self._fd, self._outlet, self._reads = fd, outlet, reads
        self._left: int | None = None
        self.ended: asyncio.Future[OSError | None] = self._loop.create_future()
        """Done at the end, with the error that ended it."""

    def start(self) -> None:
        """Begin, or go on after a pause. One chunk is read then, whether there is room or not."""
        if not self.ended.done():
            self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        count, error = self._fill()
        if count:
            if self._outlet.write(scratch.buffer, HEADROOM + count):
                scratch.renew()
            if self._left is not None:
                self._left -= count
        if error is not None or (self._left is not None and self._left <= 0):
            self._end(None if isinstance(error, EOFError) else error)
        elif self._outlet.full:
            self._loop.remove_reader(self._fd)
            self._outlet.when_free(self.start)

    def _fill(self) -> tuple[int, OSError | EOFError | None]:
        """Read into the scratch buffer: how much, and why there will not be more."""
        count = 0
        for _ in range(self._reads):
            try:
                got = os.readv(self._fd, [scratch.space[count:]])
            except BlockingIOError:
                break
            except OSError as err:
                return count, err
            if not got:
                return count, EOFError()
            count += got
            if count == CHUNK:
                break
        return count, None

    def _end(self, error: OSError | None = None) -> None:
        self._loop.remove_reader(self._fd)
        if not self.ended.done():
            self.ended.set_result(error)
            self._outlet.finish()

    async def drain(self, grace: float) -> None:
        """Wait for the end; after ``grace`` seconds, only for what can be read then: who knows who holds it open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await asyncio.shield(self.ended)
        if not self.ended.done():
            self._left = readable_bytes(self._fd)
            if not self._left:
                self._end()
            await self.ended

    def close(self) -> None:
        """Stop reading."""
        self._end()


class Writer:
    """Writes what an inlet gives to a non-blocking descriptor; ``at_end`` is called once all is written."""

    def __init__(self, fd: int, inlet: Inlet, at_end: Callable[[], None], *, most: int = CHUNK) -> None:
        """``most`` bytes are written at once, for sockets that keep the bounds of packets."""
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._fd, self._inlet, self._at_end = fd, inlet, at_end
        self._rest = b""
        self._ending = self._broken = self._closed = False

    def start(self) -> None:
        """Begin."""
        self._inlet.feed(self)

    def data(self, chunk: memoryview) -> None:
        """Write, and keep what does not go at once; nobody reads any more: drop it."""
        if self._broken or self._closed:
            return
        written = self._write(chunk)
        if written < len(chunk):
            self._rest = bytes(chunk[written:])
            self._inlet.hold()
            self._loop.add_writer(self._fd, self._on_writable)

    def _write(self, chunk: memoryview | bytes) -> int:
        written = 0
        try:
            while written < len(chunk):
                wanted = min(self._most, len(chunk) - written)
                count = os.write(self._fd, chunk[written : written + wanted])
                written += count
                if count < wanted:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._broken = True
            return len(chunk)
        return written

    def _on_writable(self) -> None:
        self._rest = self._rest[self._write(self._rest) :]
        if self._rest:
            return
        self._loop.remove_writer(self._fd)
        if self._ending:
            self._at_end()
        else:
            self._inlet.release()

    def end(self) -> None:
        """The inlet has ended."""
        self._ending = True
        if not self._rest and not self._closed:
            self._at_end()

    def close(self) -> None:
        """Write nothing more; what still comes is dropped."""
        if self._closed:
            return
        self._closed = True
        if self._rest:
            self._rest = b""
            self._loop.remove_writer(self._fd)
            self._inlet.release()


def readable_bytes(fd: int) -> int:
    """How much can be read without waiting: FIONREAD, ioctl_tty(2). Nothing of a terminal that was hung up."""
    try:
        number: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    except OSError:
        return 0
    return number


def set_terminal_size(fd: int, width: int, height: int) -> None:
    """Change the size of a terminal, which tells its foreground processes: TIOCSWINSZ, ioctl_tty(2)."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def pipe(*, read_here: bool) -> tuple[int, int]:
    """A pipe for a command: our end, which does not block, and the command's."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    ours, theirs = (reader, writer) if read_here else (writer, reader)
    os.set_blocking(ours, False)
    return ours, theirs
