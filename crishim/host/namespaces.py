"""Namespaces without a process: made by a thread that ends, kept by bind mounts of their files.

See namespaces(7): a namespace lives while a bind mount of its /proc/PID/ns file does.
"""

from __future__ import annotations

import enum
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from crishim.errors import HostFailure, InvalidArgument
from crishim.host import libc
from crishim.host.mounts import Bind, mount, unmount
from crishim.host.threads import run_in_own_thread

T = TypeVar("T")

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


class NamespaceKind(enum.Enum):
    """The namespaces that a pod can share, by their names under /proc/PID/ns."""

    NET = "net"
    IPC = "ipc"
    UTS = "uts"

    @property
    def flag(self) -> int:
        """The ``CLONE_NEW*`` flag."""
        return {"net": libc.CLONE_NEWNET, "ipc": libc.CLONE_NEWIPC, "uts": libc.CLONE_NEWUTS}[self.value]


@dataclass(frozen=True)
class NamespaceSet:
    """New namespaces to make and pin as files in ``directory``, and what to set inside them."""

    directory: Path
    kinds: tuple[NamespaceKind, ...]
    hostname: str = ""
    sysctls: Mapping[str, str] = field(default_factory=dict)

    def path(self, kind: NamespaceKind) -> Path:
        """Where the namespace of ``kind`` is pinned."""
        return self.directory / kind.value


def create(wanted: NamespaceSet) -> None:
    """Make, set up and pin the namespaces; on failure nothing stays pinned. Blocks for milliseconds."""
    wanted.directory.mkdir(parents=True, exist_ok=True, mode=0o711)
    for kind in wanted.kinds:
        wanted.path(kind).touch()
    try:
        run_in_own_thread(lambda: _make(wanted))
    except BaseException:
        remove(wanted.directory)
        raise


def _make(wanted: NamespaceSet) -> None:
    flags = 0
    for kind in wanted.kinds:
        flags |= kind.flag
    try:
        libc.unshare(flags)
    except OSError as err:
        raise HostFailure(f"cannot make namespaces: {err.strerror}") from err
    if NamespaceKind.UTS in wanted.kinds and wanted.hostname:
        socket.sethostname(wanted.hostname)
    if NamespaceKind.NET in wanted.kinds:
        _loopback_up()
    for name, value in wanted.sysctls.items():
        _set_sysctl(name, value)
    for kind in wanted.kinds:
        mount(Bind(Path(f"/proc/thread-self/ns/{kind.value}"), wanted.path(kind)))


def _set_sysctl(name: str, value: str) -> None:
    try:
        Path("/proc/sys", name.replace(".", "/")).write_text(value)
    except OSError as err:
        raise InvalidArgument(f"cannot set sysctl {name} to {value!r}: {err.strerror}") from err


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def remove(directory: Path) -> None:
    """Unpin everything in ``directory`` and delete it; one that is gone already is fine."""
    for kind in NamespaceKind:
        path = directory / kind.value
        unmount(path)
        path.unlink(missing_ok=True)
    if directory.exists():
        directory.rmdir()


def enter(paths: Iterable[Path], work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that has entered the namespaces pinned at ``paths``."""

    def inside() -> T:
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc.setns(fd, 0)
            finally:
                os.close(fd)
        return work()

    return run_in_own_thread(inside)
