"""The unpack worker: turns compressed layers into directories, in processes that a hostile image may own.

The daemon starts one parent, which forks a child for every layer: Python starts once. A child gets a
request and three descriptors over the socket: the layer's directory, the compressed bytes, and where to
report. It then gives up everything else: it has no network, no capability but those that writing files
of any owner takes, and a user ID that no other process has, so that it can signal none. The layer's
directory is its root, on a mount whose device nodes cannot be opened. It ends when its input ends.

Requests and reports are JSON: ``{"max_bytes", "max_entries"}``; then a line ``{"pid"}`` and a line
``{"diff_id", "size", "entries", "opaque", "implicit", "unpacked"}`` or ``{"error", "host"}``, where ``host``
says that the fault is not the layer's.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import queue
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from isal import isal_zlib

from crishim.host import libc
from crishim.layers import tar
from crishim.layers.unpack import NodeFault, Summary, Unpacker, UnpackError

_READ = 1 << 20
_FIRST_READ = 1 << 12  # of a gzip member: there may be thousands of small ones
_PIECE = 1 << 20
_BATCH = 1 << 17  # smaller pieces are passed on together: each costs a change of thread
_AHEAD = 8  # pieces inflated ahead of the writer: bounds memory to a few MiB
_MAX_REPORT = 32 << 20
_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_FOWNER, _CAP_FSETID = 0, 1, 3, 4
_CAP_MKNOD, _CAP_SETFCAP = 27, 31
_KEPT = sum(1 << cap for cap in (_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_FOWNER, _CAP_FSETID, _CAP_MKNOD, _CAP_SETFCAP))
_PR_SET_KEEPCAPS = 8
_NOBODY_ELSE = 0xFFFFFFF0  # not 65534, which other processes have
_ZEROS = re.compile(rb"\0*")
_IsalError: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stub has an instance there
_ISAL_CODE = re.compile(r"^Error -?\d+ ")


class LayerFault(Exception):
    """The layer's data is wrong."""


def main() -> None:
    """Serve requests on the socket that is descriptor ``argv[1]`` until its other end is closed."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS)
    gc.freeze()
    parent = os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 4096, 3)
        if not message:
            return
        try:
            if os.fork() == 0:
                requests.close()
                _child(parent, json.loads(message), *fds)
        except OSError as err:
            _say(fds[2], {"error": f"cannot fork the unpack worker: {err.strerror}", "host": True})
        for fd in fds:
            os.close(fd)


def _child(parent: int, request: dict[str, int], layer: int, data: int, report: int) -> None:
    """Never returns."""
    status = 1
    try:
        confine(layer, parent)
        _say(report, {"pid": os.getpid()})
        _say(report, _unpack(request, data))
        status = 0
    except (LayerFault, UnpackError, tar.TarError) as err:
        _say(report, {"error": str(err)})
    except NodeFault as err:
        _say(report, {"error": str(err), "host": True})
    except MemoryError:
        _say(report, {"error": "the layer needs more memory than the unpack worker has"})
    except Exception as err:
        _say(report, {"error": f"the unpack worker failed: {type(err).__name__}: {err}", "host": True})
    finally:
        os._exit(status)


def confine(layer: int, parent: int) -> None:
    """Make the layer's directory the root and give up every privilege that unpacking does not need."""
    _change_root(layer)
    os.umask(0)
    for capability in range(_LAST_CAPABILITY + 1):
        if not _KEPT >> capability & 1:
            with contextlib.suppress(OSError):
                libc.prctl(libc.PR_CAPBSET_DROP, capability)
    libc.prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(_NOBODY_ELSE, _NOBODY_ELSE, _NOBODY_ELSE)
    os.setresuid(_NOBODY_ELSE, _NOBODY_ELSE, _NOBODY_ELSE)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.set_capabilities(_KEPT & _OWN_CAPABILITIES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)  # last: another user ID clears it
    if os.getppid() != parent:
        os._exit(1)


def _change_root(layer: int) -> None:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", libc.MS_REC | libc.MS_SLAVE)  # not private: that would keep others' mounts alive
    path = os.readlink(f"/proc/self/fd/{layer}")
    os.close(layer)
    libc.mount(path, path, "", libc.MS_BIND)
    libc.mount("", path, "", libc.MS_REMOUNT | libc.MS_BIND | libc.MS_NODEV | libc.MS_NOSUID | libc.MS_NOEXEC)
    os.chdir(path)
    os.chroot(".")


def _read_capabilities() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapPrm:"))
    return int(line.split()[1], 16)


def _read_last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


_OWN_CAPABILITIES = _read_capabilities()  # read before the chroot, which has no /proc
_LAST_CAPABILITY = _read_last_capability()


def _say(fd: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


def _unpack(request: dict[str, int], data: int) -> dict[str, Any]:
    pipeline = Pipeline(data, request["max_bytes"])
    unpacker = Unpacker(request["max_entries"])
    try:
        summary = unpacker.unpack(tar.Stream(pipeline.next_piece))
    except tar.TarError:
        pipeline.raise_fault()  # a broken stream shows first as a broken archive
        raise
    return _result(summary, pipeline)


def _result(summary: Summary, pipeline: Pipeline) -> dict[str, Any]:
    if 2 * sum(map(len, [*summary.opaque, *summary.implicit])) > _MAX_REPORT:
        raise LayerFault("the layer has too many directories that are opaque or not in its archive")
    return {
        "diff_id": "sha256:" + pipeline.finish(),
        "size": summary.size,
        "entries": summary.entries,
        "unpacked": pipeline.produced,
        "opaque": sorted(path.hex() for path in summary.opaque),
        "implicit": sorted(path.hex() for path in summary.implicit),
    }


class Pipeline:
    """Inflates and hashes in threads of their own while the caller writes files."""

    def __init__(self, data: int, max_bytes: int) -> None:
        self.produced = 0
        self._max = max_bytes
        self._data = data
        self._hash = hashlib.sha256()
        self._to_writer: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._hash_room = threading.Semaphore(_AHEAD)
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._fault: BaseException | None = None
        self._inflater = threading.Thread(target=self._guard(self._inflate), daemon=True)
        self._hasher = threading.Thread(target=self._hash_all, daemon=True)
        self._inflater.start()
        self._hasher.start()

    def next_piece(self) -> bytes:
        """The next uncompressed bytes, empty at the end; a fault of the stream is raised here."""
        piece = self._to_writer.get()
        if piece:
            self._room.release()
            return piece
        self.raise_fault()
        self._to_writer.put(b"")
        return b""

    def raise_fault(self) -> None:
        """Raise what went wrong with the compressed stream, if anything did."""
        if self._fault is not None:
            raise self._fault

    def finish(self) -> str:
        """The digest of everything, once all has been read."""
        self._inflater.join()
        self.raise_fault()
        self._hasher.join()
        return self._hash.hexdigest()

    def _guard(self, body: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                body()
            except BaseException as err:
                self._fault = err
            finally:
                self._to_writer.put(b"")
                self._to_hash.put(b"")

        return run

    def _hash_all(self) -> None:
        while piece := self._to_hash.get():
            self._hash.update(piece)
            self._hash_room.release()

    def _emit(self, piece: bytes) -> None:
        self.produced += len(piece)
        if self.produced > self._max:
            raise LayerFault(f"the layer unpacks to more than {self._max} bytes")
        self._held.append(piece)
        self._held_bytes += len(piece)
        if self._held_bytes >= _BATCH:
            self._pass_on()

    def _pass_on(self) -> None:
        piece = b"".join(self._held)
        self._held, self._held_bytes = [], 0
        if piece:
            self._room.acquire()
            self._hash_room.acquire()
            self._to_writer.put(piece)
            self._to_hash.put(piece)

    def _inflate(self) -> None:
        head = _read_some(self._data, tar.BLOCK)
        if head[:2] == b"\x1f\x8b":
            self._inflate_gzip(head)
        elif not head or tar.is_start(head):
            self._copy(head)
        else:
            raise LayerFault("the layer is neither gzip nor a tar archive")
        self._pass_on()

    def _copy(self, head: bytes) -> None:
        chunk = head
        while chunk:
            self._emit(chunk)
            chunk = os.read(self._data, _READ)

    def _inflate_gzip(self, head: bytes) -> None:
        """One or more gzip members (RFC 1952); zero padding after the last one is allowed.

        A member is begun with a small part of what has been read: the inflater copies all that follows
        the member's end.
        """
        data, at, step = memoryview(head), 0, _FIRST_READ
        inflater = isal_zlib.decompressobj(wbits=31)
        while data:
            at = _skip_padding(data, at) if inflater.eof else at
            if at == len(data):
                data, at = memoryview(os.read(self._data, _READ)), 0
                continue
            if inflater.eof:
                inflater, step = isal_zlib.decompressobj(wbits=31), _FIRST_READ
            part = data[at : at + step]
            at += len(part) - self._inflate_part(inflater, part)
            step = min(2 * step, _READ)
        if not inflater.eof:
            raise LayerFault("the layer's gzip stream is truncated")

    def _inflate_part(self, inflater: Any, part: memoryview | bytes) -> int:
        """Everything that ``part`` yields; how many bytes of it come after the member."""
        try:
            while part and not inflater.eof:
                piece = inflater.decompress(part, _PIECE)
                part = inflater.unconsumed_tail
                if piece:
                    self._emit(piece)
            while not inflater.eof:
                piece = inflater.decompress(b"", _PIECE)
                if not piece:
                    break
                self._emit(piece)
        except _IsalError as err:
            raise LayerFault(f"the layer's gzip stream is broken: {_ISAL_CODE.sub('', str(err)).lower()}") from err
        return len(inflater.unused_data) if inflater.eof else 0


def _skip_padding(data: memoryview, at: int) -> int:
    """Where the next gzip member begins, or the end."""
    zeros = _ZEROS.match(data, at)
    assert zeros is not None
    at = zeros.end()
    if at < len(data) and data[at] != 0x1F:
        raise LayerFault("the layer has data after its gzip stream")
    return at


def _read_some(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = os.read(fd, count - len(data))
        if not chunk:
            break
        data += chunk
    return data


if __name__ == "__main__":
    main()
