"""Exec: a command in a running container, with the streams of a client.

What happens to the command when its client leaves is not said by the CRI, and neither kubelet nor peers end it
(containerd waits for it, CRI-O too): its stdin ends, its output is thrown away, it goes on. A terminal gets its
end-of-file character, so that a shell that nobody talks to any more ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import termios
from collections.abc import Iterator
from pathlib import Path

import msgspec

from crishim.containers.client import Client, Size
from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import FailedPrecondition, HostFailure, InvalidArgument
from crishim.host import pump
from crishim.host.pidfd import wait_readable
from crishim.host.process import DRAIN_SECONDS
from crishim.host.pump import Reader, Writer
from crishim.model.records import ContainerState
from crishim.runtimes.driver import ExecProcess, OciRuntime, Stdio
from crishim.spec.oci import Process

FIRST_SIZE_SECONDS = 0.05
"""How long a terminal waits for its size, so that the command sees the right one from its beginning."""
TERMINAL_SECONDS = 10.0
_TERMINAL_READS = 16


class _Bundle(msgspec.Struct):
    process: Process


def check_running(container: Container) -> None:
    """:class:`FailedPrecondition` unless the container runs."""
    if container.record.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"container {container.record.id} is not running")


async def exec_stream(room: Room, container: Container, command: list[str], client: Client, *, tty: bool) -> int:
    """Run ``command`` as the container's own user, to its end; the result is its exit code."""
    if not command:
        raise InvalidArgument("cmd is empty")
    check_running(container)
    bundle = room.paths.bundle(container.record.id)
    spec = msgspec.json.decode((bundle / "config.json").read_bytes(), type=_Bundle).process
    spec = msgspec.structs.replace(spec, args=command, terminal=tty)
    place = _Place(room.handlers.get(container.record.handler), container.record.id, bundle)
    return await (_with_terminal if tty else _with_pipes)(place, spec, client)


class _Place:
    """Where a command is started."""

    def __init__(self, runtime: OciRuntime, container_id: str, bundle: Path) -> None:
        self._runtime, self._id = runtime, container_id
        self.scratch = bundle / f"exec-{secrets.token_hex(8)}"

    async def start(self, spec: bytes, stdio: Stdio) -> ExecProcess:
        """Start it."""
        return await self._runtime.exec_start(self._id, spec, self.scratch, stdio)


class _Descriptors:
    """Descriptors that are closed one by one, at the latest together."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def keep(self, fd: int) -> int:
        """Take charge of a descriptor."""
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close one; it may be closed already."""
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        """Close what is left."""
        for fd in list(self._open):
            self.close(fd)


class _Discard:
    """An outlet for output that nobody asked for."""

    full = False

    def write(self, _buffer: bytearray, _end: int) -> bool:
        return False

    def finish(self) -> None: ...

    def when_free(self, _resume: object) -> None: ...


async def _with_pipes(place: _Place, spec: Process, client: Client) -> int:
    with contextlib.closing(_Pipes(client)) as pipes:
        command = await place.start(msgspec.json.encode(spec), pipes.stdio)
        with contextlib.closing(command):
            pipes.start()
            code = await command.wait()
            await pipes.drain()
            return code


class _Pipes:
    """The pipes of a command without a terminal, and what moves their bytes. Standard error is always one."""

    def __init__(self, client: Client) -> None:
        self._fds = _Descriptors()
        self._client = client
        self._stdin = self._stdout = -1
        self._null = null = self._fds.keep(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        stdin = stdout = null
        if client.stdin is not None:
            self._stdin, stdin = self._pipe(read_here=False)
        if client.stdout is not None:
            self._stdout, stdout = self._pipe(read_here=True)
        self._stderr, stderr = self._pipe(read_here=True)
        self.stdio = Stdio(stdin, stdout, stderr, self._stderr)
        self._writer: Writer | None = None
        self._readers: list[Reader] = []

    def _pipe(self, *, read_here: bool) -> tuple[int, int]:
        ours, theirs = pump.pipe(read_here=read_here)
        return self._fds.keep(ours), self._fds.keep(theirs)

    def start(self) -> None:
        """The command runs: move bytes."""
        for fd in {self._null, self.stdio.stdin, self.stdio.stdout, self.stdio.stderr}:
            self._fds.close(fd)
        if self._client.stdin is not None:
            self._writer = Writer(self._stdin, self._client.stdin, lambda: self._fds.close(self._stdin))
            self._writer.start()
        if self._client.stdout is not None:
            self._readers.append(Reader(self._stdout, self._client.stdout))
        self._readers.append(Reader(self._stderr, self._client.stderr or _Discard()))
        for reader in self._readers:
            reader.start()

    async def drain(self) -> None:
        """The command has ended: hand on what it wrote."""
        await asyncio.gather(*(reader.drain(DRAIN_SECONDS) for reader in self._readers))

    def close(self) -> None:
        """Give everything back."""
        if self._writer is not None:
            self._writer.close()
        for reader in self._readers:
            reader.close()
        self._fds.close_all()


async def _with_terminal(place: _Place, spec: Process, client: Client) -> int:
    if not any(variable.startswith("TERM=") for variable in spec.env):
        spec = msgspec.structs.replace(spec, env=[*spec.env, "TERM=xterm"])
    size = await client.sizes.first(FIRST_SIZE_SECONDS)
    fds = _Descriptors()
    try:
        command, terminal = await _start_with_terminal(place, _with_size(spec, size), fds)
        with contextlib.closing(command):
            return await _converse(command, terminal, client)
    finally:
        fds.close_all()


async def _start_with_terminal(place: _Place, spec: bytes, fds: _Descriptors) -> tuple[ExecProcess, int]:
    complaints, stderr = pump.pipe(read_here=True)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    ours = _Descriptors()
    for fd in (complaints, stderr, null):
        ours.keep(fd)
    try:
        with _console_socket(place.scratch, ours) as (listener, path):
            receiving = asyncio.create_task(_receive_terminal(listener))
            try:
                command = await place.start(spec, Stdio(null, null, stderr, complaints, path))
                async with asyncio.timeout(TERMINAL_SECONDS):
                    return command, fds.keep(await receiving)
            except TimeoutError:
                raise HostFailure("the OCI runtime sent no terminal") from None
            finally:
                receiving.cancel()
    finally:
        ours.close_all()


def _with_size(spec: Process, size: Size | None) -> bytes:
    """The process with its ``consoleSize`` (runtime-spec, config.md)."""
    plain = msgspec.to_builtins(spec)
    if size is not None:
        plain["consoleSize"] = {"height": size.height, "width": size.width}
    return msgspec.json.encode(plain)


async def _converse(command: ExecProcess, terminal: int, client: Client) -> int:
    """Move bytes between client and terminal until the command has ended."""
    os.set_blocking(terminal, False)
    reader = Reader(terminal, client.stdout or _Discard(), reads=_TERMINAL_READS)
    writer = Writer(terminal, client.stdin, lambda: _end_of_file(terminal)) if client.stdin is not None else None
    client.sizes.listen(lambda size: _resize(terminal, size))
    try:
        reader.start()
        if writer is not None:
            writer.start()
        code = await command.wait()
        await reader.drain(DRAIN_SECONDS)
        return code
    finally:
        client.sizes.listen(None)
        if writer is not None:
            writer.close()
        reader.close()


def _resize(terminal: int, size: Size) -> None:
    with contextlib.suppress(OSError):
        pump.set_terminal_size(terminal, size.width, size.height)


def _end_of_file(terminal: int) -> None:
    """Type the terminal's end-of-file character, usually Ctrl-D, twice: the first may end a line (termios(3))."""
    with contextlib.suppress(OSError, termios.error):
        character = termios.tcgetattr(terminal)[6][termios.VEOF]
        os.write(terminal, 2 * (character if isinstance(character, bytes) else b"\x04"))


@contextlib.contextmanager
def _console_socket(directory: Path, fds: _Descriptors) -> Iterator[tuple[socket.socket, str]]:
    """A listening socket for a terminal, with a short path by way of procfs: sockets' are limited to 107 bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    anchor = fds.keep(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(f"/proc/self/fd/{anchor}/console")
        listener.listen(1)
        try:
            yield listener, f"/proc/{os.getpid()}/fd/{anchor}/console"
        finally:
            (directory / "console").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.rmdir()


async def _receive_terminal(listener: socket.socket) -> int:
    """The terminal's descriptor, which the runtime sends with SCM_RIGHTS (runc, docs/terminals.md)."""
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    with connection:
        await wait_readable(connection.fileno())
        _, received, _, _ = socket.recv_fds(connection, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    if not received:
        raise HostFailure("the OCI runtime sent no terminal")
    _translate_line_ends(received[0])
    return received[0]


def _translate_line_ends(terminal: int) -> None:
    """Have the terminal write CR LF for LF, as clients expect; runc turns it off (termios(3), ONLCR)."""
    with contextlib.suppress(termios.error):
        settings = termios.tcgetattr(terminal)
        settings[1] |= termios.ONLCR
        termios.tcsetattr(terminal, termios.TCSANOW, settings)
