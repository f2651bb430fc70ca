"""Files written whole or not at all, and files read inside a root that is not ours to trust."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from crishim.host import libc

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(os.open(temporary, _WRITE, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # it may be there since a crash, with another mode
            file.write(data)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_in_root(root: Path, path: str, limit: int = 1 << 20) -> bytes | None:
    """The start of the regular file ``path`` as a process chrooted to ``root`` would see it, or None.

    Nothing else is ever opened: opening a device node is enough to make some devices act.
    """
    try:
        with contextlib.closing(_Root(root)) as opened:
            fd = libc.openat2(opened.fd, path.lstrip("/"), os.O_PATH, resolve=libc.RESOLVE_IN_ROOT)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return file.read(limit)
    finally:
        os.close(fd)


class _Root:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)


def remove_tree(path: Path) -> None:
    """Delete ``path`` and all below it, however deep; what is gone already is fine.

    Every directory is first moved to the top, so that depth costs neither stack nor open files, and
    symlinks are never followed: the tree may be a hostile image's. What is mounted in the tree is not
    touched: :class:`OSError`.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _remove_folder(parent, path.name)
        finally:
            os.close(parent)


def _remove_folder(parent: int, name: str) -> None:
    top = _open_folder(parent, name)
    try:
        _flatten(top, top)
        while moved := os.listdir(top):
            for folder in moved:
                with contextlib.suppress(FileNotFoundError):
                    _remove_moved(top, folder)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _remove_moved(top: int, name: str) -> None:
    folder = _open_folder(top, name)
    try:
        _flatten(folder, top)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)


def _open_folder(parent: int, name: str) -> int:
    """A descriptor of the directory, unless something is mounted on it."""
    try:
        return libc.openat2(parent, name, _FOLDER, resolve=libc.RESOLVE_NO_XDEV)
    except OSError as err:
        if err.errno == errno.EXDEV:
            raise OSError(errno.EBUSY, "something is mounted on it", name) from err
        raise


def _flatten(folder: int, top: int) -> None:
    """Delete the files in ``folder`` and move its directories into ``top`` under names of our own."""
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        with contextlib.suppress(FileNotFoundError):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
            elif folder != top:
                os.rename(entry.name, _fresh_name(), src_dir_fd=folder, dst_dir_fd=top)


def _fresh_name() -> str:
    """A name that no image can have foreseen."""
    return f".removing-{secrets.token_hex(16)}"


def remove_empty_dirs(path: Path, stop: Path) -> None:
    """Delete ``path`` and its parents up to, not including, ``stop``, as far as they are empty."""
    while path != stop and stop in path.parents:
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        path = path.parent
