"""Writes the members of a layer's archive into the current directory, which is the layer's root.

Runs only in the unpack worker, chrooted to the layer: no name can lead out of it. The rules for whiteouts
are those of the OCI image-spec (layer.md); their form on disk is overlayfs' (a 0/0 character device, and
``trusted.overlay.opaque`` set later by the daemon, which has the privilege).
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from dataclasses import dataclass, field
from pathlib import Path

from crishim.host.files import remove_tree
from crishim.layers import tar
from crishim.layers.tar import shown

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_STEPS = 8192  # names and symlinks on the way to one directory
_MAX_CACHED = 1 << 16
_NODE_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE))


class UnpackError(Exception):
    """A member cannot be written as the archive says."""


class NodeFault(Exception):
    """A member cannot be written for a reason of the node's, such as a full disk."""


@dataclass
class Summary:
    """What was written. All paths are free of symlinks; the root is the empty one."""

    size: int = 0
    entries: int = 0
    """Members of the archive and directories that it left out."""
    opaque: set[bytes] = field(default_factory=set)
    """Directories that hide what lower layers have there."""
    implicit: set[bytes] = field(default_factory=set)
    """Directories that the archive does not name but its members need: they look like those below."""


class Unpacker:
    """One layer. ``umask`` must be 0."""

    def __init__(self, max_entries: int) -> None:
        self.summary = Summary()
        self._max_entries = max_entries
        self._dir_times: dict[bytes, int] = {}
        self._whiteouts: set[bytes] = set()
        """What whiteouts name, be it there again or not."""
        self._folders: dict[bytes, bytes] = {b"": b""}
        """Where directories are, by the names that lead there: a cache."""
        self._replaced = False
        """Whether a directory has made way for something else: what is known of paths may be outdated."""

    def unpack(self, stream: tar.Stream) -> Summary:
        """Write everything; raises one of the errors here or :class:`tar.TarError` at the first fault."""
        self._be_implicit(b"")
        for entry in tar.entries(stream):
            self._count()
            name = clean(entry.name)
            try:
                self._member(name, entry, stream)
            except OSError as err:
                raise _fault(name, err) from err
        stream.drain()
        self._finish()
        return self.summary

    def _count(self) -> None:
        self.summary.entries += 1
        if self.summary.entries > self._max_entries:
            raise UnpackError(f"the layer has more than {self._max_entries} entries")

    def _member(self, name: bytes, entry: tar.Entry, stream: tar.Stream) -> None:
        if _WHITEOUT in name and self._is_marker(name):
            self._skip(entry, stream)
            return
        parent, _, base = name.rpartition(b"/")
        folder = self._folders.get(parent)
        path = _join(self._folder(parent) if folder is None else folder, base)
        if entry.kind == tar.DIRECTORY:
            self._directory(path, entry)
        elif not path:
            raise UnpackError("the layer's root is not a directory")
        elif entry.kind == tar.REGULAR:
            self._file(path, entry, stream)
            return
        elif entry.kind == tar.HARD_LINK:
            self._hard_link(path, entry)
        else:
            self._special(path, entry)
        self._skip(entry, stream)

    def _file(self, path: bytes, entry: tar.Entry, stream: tar.Stream) -> None:
        # a file is created without its set-ID bits: chown would clear them, and nobody runs it meanwhile
        try:
            fd = os.open(path, _CREATE, entry.mode & 0o777)
        except FileExistsError:
            self._make_way(path)
            fd = os.open(path, _CREATE, entry.mode & 0o777)
        try:
            for piece in stream.pieces(entry.size):
                _write_all(fd, piece)
            os.fchown(fd, entry.uid, entry.gid)
            if entry.mode & 0o7000:
                os.fchmod(fd, entry.mode)
            if entry.xattrs:
                _set_xattrs(path, fd, entry.xattrs)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)
        self.summary.size += entry.size
        stream.take(tar.padding(entry.size))

    def _special(self, path: bytes, entry: tar.Entry) -> None:
        self._make_way(path)
        if entry.kind == tar.SYMLINK:
            if not entry.link:
                raise UnpackError(f"symlink {shown(path)} leads nowhere")
            os.symlink(entry.link, path)
        elif entry.kind == tar.FIFO:
            os.mkfifo(path, entry.mode & 0o777)
        elif entry.kind in (tar.CHAR, tar.BLOCK_DEVICE):
            kind = stat.S_IFCHR if entry.kind == tar.CHAR else stat.S_IFBLK
            os.mknod(path, kind | entry.mode & 0o777, os.makedev(entry.major, entry.minor))
        else:
            raise UnpackError(f"{shown(path)} is of unknown type {entry.kind!r}")
        os.lchown(path, entry.uid, entry.gid)
        if entry.kind != tar.SYMLINK and entry.mode & 0o7000:
            os.chmod(path, entry.mode)
        if entry.xattrs:
            _set_xattrs(path, path, entry.xattrs)
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def _directory(self, path: bytes, entry: tar.Entry) -> None:
        target = path or b"."
        if path:
            self._make_directory(path)
        self.summary.implicit.discard(path)
        os.chown(target, entry.uid, entry.gid)
        os.chmod(target, entry.mode)
        if entry.xattrs:
            _set_xattrs(path, target, entry.xattrs)
        self._dir_times[path] = entry.mtime_ns

    def _make_directory(self, path: bytes) -> None:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return
            self._make_way(path)
            os.mkdir(path, 0o700)
        self.summary.opaque.discard(path)  # that was another directory, since replaced
        self._folders[path] = path

    def _hard_link(self, path: bytes, entry: tar.Entry) -> None:
        try:
            parent, _, base = clean(entry.link).rpartition(b"/")
            source = _join(self._folder(parent, make=False), base)
            found = os.lstat(source or b".")
        except (OSError, UnpackError):
            found = None
        if found is None or stat.S_ISDIR(found.st_mode) or self._is_whiteout(source, found):
            raise UnpackError(f"hard link {shown(path)} leads to {shown(entry.link)}, no file of this layer")
        if source == path:
            raise UnpackError(f"{shown(path)} is a hard link to itself")
        self._make_way(path)
        os.link(source, path, follow_symlinks=False)

    def _make_way(self, path: bytes) -> None:
        """Remove what an earlier member left at ``path``: the last member of a name wins."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            remove_tree(Path(os.fsdecode(path)))
            self._replaced = True
        else:
            os.unlink(path)
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            self._folders = {b"": b""}

    def _folder(self, name: bytes, *, make: bool = True) -> bytes:
        """The path without symlinks of the directory ``name``; with ``make``, what is missing is made."""
        if len(self._folders) > _MAX_CACHED:
            self._folders = {b"": b""}
        known, rest = name, list[bytes]()
        while known not in self._folders:
            known, _, base = known.rpartition(b"/")
            rest.append(base)
        path = self._folders[known]
        budget = _MAX_STEPS
        for base in reversed(rest):
            path, budget = self._resolve(path, base, budget, make)
            known = _join(known, base)
            self._folders[known] = path
        return path

    def _resolve(self, path: bytes, base: bytes, budget: int, make: bool) -> tuple[bytes, int]:
        """The directory ``base`` in ``path`` as a chrooted process finds it, and what is left of ``budget``."""
        pending = [base]
        while pending:
            budget -= 1
            if budget < 0:
                raise UnpackError(f"{shown(_join(path, base))} is behind too many symlinks")
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                path = path.rpartition(b"/")[0]
                continue
            target = self._step(_join(path, part), make)
            if not target:
                path = _join(path, part)
                continue
            path = b"" if target.startswith(b"/") else path
            pending += reversed(target.split(b"/"))
        return path, budget

    def _step(self, path: bytes, make: bool) -> bytes:
        """The target if ``path`` is a symlink; empty if it is, or has now become, a directory."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if not make:
                raise
        else:
            if stat.S_ISDIR(found.st_mode):
                return b""
            if stat.S_ISLNK(found.st_mode):
                return os.readlink(path)
            if not make or not self._is_whiteout(path, found):
                raise UnpackError(f"{shown(path)} is not a directory, yet has entries below")
            os.unlink(path)
        self._count()
        os.mkdir(path, 0o700)
        self._be_implicit(path)
        return b""

    def _be_implicit(self, path: bytes) -> None:
        os.chown(path or b".", 0, 0)
        os.chmod(path or b".", 0o755)
        self._dir_times.pop(path, None)
        self.summary.opaque.discard(path)
        self.summary.implicit.add(path)

    def _is_marker(self, name: bytes) -> bool:
        """Whether ``name`` is no file but says something of lower layers, or of aufs; if so, it is heeded."""
        *folders, base = name.split(b"/")
        for folder in folders:
            if folder.startswith(_AUFS):
                return True
            if folder.startswith(_WHITEOUT):
                raise UnpackError(f"{shown(name)} is below a whiteout")
        if not base.startswith(_WHITEOUT):
            return False
        if base == _OPAQUE:
            self.summary.opaque.add(self._folder(b"/".join(folders)))
        elif not base.startswith(_AUFS):
            self._whiteout(b"/".join(folders), base.removeprefix(_WHITEOUT))
        return True

    def _whiteout(self, parent: bytes, hidden: bytes) -> None:
        if hidden in (b"", b".", b".."):
            raise UnpackError(f"whiteout {shown(_WHITEOUT + hidden)} in {shown(parent)} hides no name")
        path = _join(self._folder(parent), hidden)
        self._whiteouts.add(path)
        with contextlib.suppress(FileExistsError):  # what this layer has stays: whiteouts hide lower layers'
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
            os.lchown(path, 0, 0)

    def _is_whiteout(self, path: bytes, found: os.stat_result) -> bool:
        return path in self._whiteouts and stat.S_ISCHR(found.st_mode) and found.st_rdev == 0

    def _skip(self, entry: tar.Entry, stream: tar.Stream) -> None:
        for _ in stream.pieces(entry.size + tar.padding(entry.size)):
            pass

    def _finish(self) -> None:
        if self._replaced:
            self._forget_replaced()
        summary = self.summary
        marked = {path for path in self._whiteouts if self._is_directory(path)}
        summary.opaque |= marked
        if summary.opaque:
            self._drop_hidden_whiteouts()
            summary.implicit = {path for path in summary.implicit - marked if not self._is_hidden(path)}
        for path, mtime in self._dir_times.items():  # last: writing into a directory changes them
            try:
                os.utime(path or b".", ns=(mtime, mtime), follow_symlinks=False)
            except OSError as err:
                raise _fault(path, err) from err

    def _forget_replaced(self) -> None:
        gone = {
            path
            for path in self._dir_times.keys() | self.summary.opaque | self.summary.implicit
            if not self._is_directory(path)
        }
        self.summary.opaque -= gone
        self.summary.implicit -= gone
        self._dir_times = {path: mtime for path, mtime in self._dir_times.items() if path not in gone}

    def _is_directory(self, path: bytes) -> bool:
        """Whether there is, after all members, a directory at ``path`` itself and not behind a symlink."""
        try:
            return self._folder(path, make=False) == path
        except (OSError, UnpackError):
            return False

    def _drop_hidden_whiteouts(self) -> None:
        """In an opaque directory they hide nothing more, and overlayfs would show them as broken files."""
        for path in self._whiteouts:
            if self._is_hidden(path) and self._is_directory(path.rpartition(b"/")[0]):
                with contextlib.suppress(FileNotFoundError):
                    if self._is_whiteout(path, os.lstat(path)):
                        os.unlink(path)

    def _is_hidden(self, path: bytes) -> bool:
        """Whether a directory above ``path`` hides all that lower layers have there."""
        while path:
            path = path.rpartition(b"/")[0]
            if path in self.summary.opaque:
                return True
        return False


def clean(raw: bytes) -> bytes:
    """A member's name relative to the root, without ``.``, ``..`` and double slashes; escapes are refused."""
    name = raw
    if name.startswith((b"/", b".")) or b"//" in name or b"/." in name or name.endswith(b"/"):
        name = posixpath.normpath(b"/" + name.lstrip(b"/")).lstrip(b"/")
        if b".." in raw:
            _refuse_escape(raw)
    if len(name) >= 4096:
        raise UnpackError(f"the name {shown(name)} is too long: {len(name)} bytes")
    return name


def _refuse_escape(raw: bytes) -> None:
    depth = 0
    for part in raw.split(b"/"):
        depth += {b"..": -1, b".": 0, b"": 0}.get(part, 1)
        if depth < 0:
            raise UnpackError(f"{shown(raw)} leads out of the layer")


def _join(folder: bytes, base: bytes) -> bytes:
    return folder + b"/" + base if folder else base


def _fault(name: bytes, err: OSError) -> UnpackError | NodeFault:
    kind = NodeFault if err.errno in _NODE_ERRNOS else UnpackError
    return kind(f"cannot write {shown(name)}: {err.strerror}")


def _write_all(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


def _set_xattrs(path: bytes, target: int | bytes, xattrs: dict[bytes, bytes]) -> None:
    """File capabilities and user attributes; ``trusted.*`` would let an image speak to overlayfs."""
    for name, value in xattrs.items():
        if not _is_kept(name):
            continue
        try:
            if isinstance(target, int):
                os.setxattr(target, name, value)
            else:
                os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as err:
            if err.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise UnpackError(f"cannot set {shown(name)} of {shown(path)}: {err.strerror}") from err


def _is_kept(xattr: bytes) -> bool:
    if xattr.startswith(b"user."):
        return not xattr.startswith(b"user.overlay.")
    return xattr == b"security.capability"
