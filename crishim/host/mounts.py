"""Mounts as values, and the calls that carry them out."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from crishim.errors import HostFailure
from crishim.host import libc
from crishim.host.threads import run_in_own_thread


@dataclass(frozen=True)
class Tmpfs:
    """A memory file system on ``target``; ``size`` in bytes."""

    target: Path
    size: int
    mode: int = 0o755
    flags: int = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC

    def describe(self) -> str:
        """What this mount is, for logs and errors."""
        return f"tmpfs of {self.size} bytes on {self.target}"

    def carry_out(self) -> None:
        """Make the mount point and mount."""
        self.target.mkdir(parents=True, exist_ok=True)
        libc.mount("shm", str(self.target), "tmpfs", self.flags, f"mode={self.mode:o},size={self.size}")


@dataclass(frozen=True)
class Bind:
    """``source`` seen at ``target``; the target must exist."""

    source: Path
    target: Path

    def describe(self) -> str:
        """What this mount is, for logs and errors."""
        return f"{self.source} on {self.target}"

    def carry_out(self) -> None:
        """Mount."""
        libc.mount(str(self.source), str(self.target), "", libc.MS_BIND)


@dataclass(frozen=True)
class Overlay:
    """An overlay of read-only ``lower`` directories, topmost first, with ``upper`` to write to.

    ``lower`` is relative to ``base``: the kernel takes at most one page of options, which 127 absolute
    paths would not fit (Documentation/filesystems/overlayfs.rst).
    """

    base: Path
    lower: tuple[str, ...]
    target: Path
    upper: Path | None = None
    work: Path | None = None
    options: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """What this mount is, for logs and errors."""
        return f"overlay of {len(self.lower)} layers on {self.target}"

    def data(self) -> str:
        """The option string of the mount call."""
        parts = [f"lowerdir={':'.join(self.lower)}"]
        if self.upper is not None:
            parts += [f"upperdir={self.upper}", f"workdir={self.work}"]
        return ",".join([*parts, *self.options])

    def carry_out(self) -> None:
        """Mount, in a thread whose working directory is ``base``."""

        def in_base() -> None:
            libc.unshare(libc.CLONE_FS)
            os.chdir(self.base)
            libc.mount("overlay", str(self.target), "overlay", 0, self.data())

        run_in_own_thread(in_base)


AnyMount = Tmpfs | Bind | Overlay


def mount(wanted: AnyMount) -> None:
    """Carry out ``wanted``; an error names it."""
    try:
        wanted.carry_out()
    except OSError as err:
        raise HostFailure(f"cannot mount {wanted.describe()}: {err.strerror}") from err


def unmount(target: Path) -> None:
    """Take everything mounted on ``target`` away; nothing there is fine."""
    while True:
        try:
            libc.umount(str(target), libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)
        except OSError as err:
            if err.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return
            raise HostFailure(f"cannot unmount {target}: {err.strerror}") from err


def mounts_below(root: Path) -> list[Path]:
    """The mount points at or below ``root``, deepest first, from /proc/self/mountinfo."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        target = Path(os.fsdecode(_unescape(line.split(b" ")[4])))
        if target == root or root in target.parents:
            found.append(target)
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def unmount_below(root: Path) -> None:
    """Unmount everything at or below ``root``."""
    for target in mounts_below(root):
        unmount(target)


def _unescape(text: bytes) -> bytes:
    for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        text = text.replace(code, char)
    return text
