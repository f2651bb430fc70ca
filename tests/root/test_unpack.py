"""Layers through the real unpack worker: what is right is written exactly, what is hostile stays inside."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from corpus import (
    END,
    V7,
    Member,
    archive,
    base256,
    block,
    char,
    fifo,
    file,
    folder,
    gnu_long,
    gzipped,
    hard_link,
    opaque,
    pax_header,
    symlink,
    whiteout,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from crishim.errors import BadImage, HostFailure
from crishim.host.files import remove_tree
from crishim.layers import client, worker
from crishim.layers.client import Limits, Pump, UnpackWorkers

LIMITS = Limits(max_bytes=64 << 20, max_entries=5000)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep, linux/capability.h


# the worker, and what it leaves behind


@pytest.fixture(scope="module")
def pumps() -> Iterator[ThreadPoolExecutor]:
    """Threads that feed layers."""
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture(scope="module")
def shared(pumps: ThreadPoolExecutor) -> Iterator[UnpackWorkers]:
    """A worker for tests that only unpack: it starts once."""
    workers = UnpackWorkers(LIMITS, pumps)
    yield workers
    workers.close()


@pytest.fixture
async def own(pumps: ThreadPoolExecutor) -> AsyncIterator[UnpackWorkers]:
    """A worker for tests that break it; started, so that it has all its descriptors."""
    workers = UnpackWorkers(LIMITS, pumps)
    with tempfile.TemporaryDirectory() as folder_:
        await workers.unpack(Path(folder_), writing(END))
    yield workers
    workers.close()


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Path]:
    """An empty directory for a layer; it may become too deep for pytest to remove."""
    path = tmp_path / "layer"
    path.mkdir()
    yield path
    remove_tree(path)


@pytest.fixture(autouse=True)
def outside_is_untouched(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the layer that no layer may reach."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (outside / "link").symlink_to("secret")
    before = snapshot(outside)
    yield outside
    assert snapshot(outside) == before
    assert not [name for name in os.listdir("/") if name.startswith("crishim-outside")]


def writing(data: bytes, chunk: int = 1 << 16) -> Pump:
    """A pump of these bytes."""

    def pump(fd: int) -> None:
        for start in range(0, len(data), chunk):
            view = memoryview(data)[start : start + chunk]
            while view:
                view = view[os.write(fd, view) :]

    return pump


class Pause:
    """A pump that stops in the middle until it is let go, and then may fail."""

    def __init__(self, data: bytes, at: int, error: Exception | None = None) -> None:
        """Writes ``data[:at]``, waits, then raises ``error`` or writes the rest."""
        self._data, self._at, self._error = data, at, error
        self._paused, self._go = threading.Event(), threading.Event()

    def __call__(self, fd: int) -> None:
        """The pump itself."""
        writing(self._data[: self._at])(fd)
        self._paused.set()
        self._go.wait(30)
        if self._error is not None:
            raise self._error
        writing(self._data[self._at :])(fd)

    async def reached(self) -> None:
        """Wait until it has stopped."""
        assert await asyncio.to_thread(self._paused.wait, 30)

    def go(self) -> None:
        """Let it go on."""
        self._go.set()


def stat_of(pid: int) -> tuple[str, int]:
    """State and parent of a process; no process is in state X."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    return fields[0], int(fields[1])


def processes_below(pid: int) -> list[int]:
    """The living children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            state, parent = stat_of(int(entry))
            if parent == pid and state not in "ZX":
                found.append(int(entry))
    return found


def parent_of(workers: UnpackWorkers) -> int:
    """The process that forks the children."""
    assert workers._parent is not None
    return workers._parent.pid


async def the_children(workers: UnpackWorkers, count: int) -> list[int]:
    """All children, once they have confined themselves."""
    for _ in range(500):
        found = processes_below(parent_of(workers))
        with contextlib.suppress(OSError):
            if len(found) == count and all(status_of(pid)["NoNewPrivs"] == "1" for pid in found):
                return found
        await asyncio.sleep(0.01)
    raise AssertionError("the children have not begun")


async def the_child(workers: UnpackWorkers) -> int:
    """The only child, once it has confined itself."""
    return (await the_children(workers, 1))[0]


def status_of(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def until_no_child(workers: UnpackWorkers) -> None:
    """A child that has reported needs an instant to end."""
    deadline = time.monotonic() + 2
    while left := processes_below(parent_of(workers)):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.005)


async def until_gone(*pids: int) -> None:
    """Wait an instant for processes to end."""
    deadline = time.monotonic() + 2
    while left := [pid for pid in pids if stat_of(pid)[0] not in "ZX"]:
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.005)


def open_fds() -> dict[str, str]:
    """What this process has open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextlib.asynccontextmanager
async def nothing_left(workers: UnpackWorkers) -> AsyncIterator[None]:
    """After the body no child lives, and this process has open what it had open before."""
    before = open_fds()
    try:
        yield
    finally:
        await until_no_child(workers)
    for _ in range(200):  # a pump closes its end when it notices
        if open_fds() == before:
            return
        await asyncio.sleep(0.01)
    assert open_fds() == before


# what is on the disk


@dataclass(frozen=True)
class Node:
    """Everything that a layer can say of one file."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    detail: str | bytes
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[str, ...]


def walk() -> Iterator[tuple[str, os.stat_result]]:
    """All names below the current directory, which itself has the empty name."""
    yield "", os.lstat(".")
    pending = [""]
    while pending:
        parent = pending.pop()
        for base in os.listdir(parent or "."):
            name = os.path.join(parent, base)
            found = os.lstat(name)
            yield name, found
            if stat.S_ISDIR(found.st_mode):
                pending.append(name)


def describe(name: str, found: os.stat_result) -> tuple[str, str | bytes]:
    """The kind of a file, and its content, target or number."""
    kinds = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "->", stat.S_IFIFO: "fifo"}
    kind = kinds.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        kind = "char" if stat.S_ISCHR(found.st_mode) else "block"
        return kind, f"{os.major(found.st_rdev)},{os.minor(found.st_rdev)}"
    if kind == "file":
        return kind, Path(name).read_bytes()
    return kind, os.readlink(name) if kind == "->" else ""


def snapshot(root: Path) -> dict[str, Node]:
    """The whole tree, to compare with another one."""
    tree: dict[str, Node] = {}
    names: dict[int, list[str]] = {}
    with contextlib.chdir(root):
        for name, found in walk():
            names.setdefault(found.st_ino, []).append(name)
        for name, found in walk():
            xattrs = tuple(
                (xattr, os.getxattr(name or ".", xattr, follow_symlinks=False))
                for xattr in sorted(os.listxattr(name or ".", follow_symlinks=False))
            )
            kind, detail = describe(name, found)
            mode, group = stat.S_IMODE(found.st_mode), tuple(sorted(names[found.st_ino]))
            tree[name] = Node(kind, mode, found.st_uid, found.st_gid, found.st_mtime_ns, detail, xattrs, group)
    return tree


def outline(root: Path) -> dict[str, str]:
    """The tree in short: ``dir``, ``file:content``, ``-> target``, ``fifo``, ``char 1,3``, ``whiteout``."""
    tree = {}
    with contextlib.chdir(root):
        for name, found in walk():
            kind, detail = describe(name, found)
            content = isinstance(detail, bytes) and detail.decode(errors="replace")
            text = f"{kind} {detail!s}".rstrip() if content is False else f"{kind}:{content}"
            tree[name] = "whiteout" if text == "char 0,0" else text
    del tree[""]
    return tree


def node(path: Path) -> Node:
    """One file."""
    return snapshot(path.parent)[path.name]


def names_of(paths: Sequence[str]) -> set[str]:
    """Reported paths as text, without the root."""
    return {os.fsdecode(bytes.fromhex(path)) for path in paths} - {""}


# the corpus


@dataclass(frozen=True)
class Case:
    """A layer and what becomes of it: a tree, or the error."""

    data: bytes
    tree: dict[str, str] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    implicit: set[str] = field(default_factory=set)
    error: str = ""


def gives(tree: dict[str, str], *parts: Member | bytes, opaque: set[str] | None = None, implicit: str = "") -> Case:
    """A layer that is unpacked; ``implicit`` names the directories that it leaves out."""
    return Case(archive(*parts), tree, opaque or set(), set(implicit.split()))


def fails(error: str, *parts: Member | bytes) -> Case:
    """A layer that is refused."""
    return Case(archive(*parts), error=error)


def nested(depth: int, base: str = "d") -> str:
    """A name of so many parts."""
    return "/".join([base] * depth)


ESCAPES: dict[str, Case] = {
    "absolute name": gives(
        {"crishim-outside": "dir", "crishim-outside/x": "file:1"},
        file("/crishim-outside/x", b"1"),
        implicit="crishim-outside",
    ),
    "many slashes and dots": gives({"a": "dir", "a/x": "file:1"}, folder("//./a/./"), file("///a//./x", b"1")),
    "up": fails("../crishim-outside leads out of the layer", file("../crishim-outside")),
    "up from below": fails("a/../../crishim-outside leads out of the layer", file("a/../../crishim-outside")),
    "up from the root": fails("/../crishim-outside leads out of the layer", file("/../crishim-outside")),
    "up a folder": fails(".. leads out of the layer", folder("..")),
    "up at the end": fails("a/b/../../.. leads out of the layer", folder("a/b/../../..")),
    "up and within": gives({"x": "file:1"}, file("a/b/../../x", b"1")),
    "dots in names": gives({"..x": "file:", "x..": "file:", "...": "file:"}, file("..x"), file("x.."), file("...")),
    "below a link to the root": gives(
        {"s": "-> /", "crishim-outside": "file:1"}, symlink("s", "/"), file("s/crishim-outside", b"1")
    ),
    "below a link up": gives(
        {"a": "dir", "a/s": "-> ../../../../..", "crishim-outside": "file:1"},
        folder("a"),
        symlink("a/s", "../../../../.."),
        file("a/s/crishim-outside", b"1"),
    ),
    "below a link to an absolute place": gives(
        {
            "s": "-> /crishim-outside/y",
            "crishim-outside": "dir",
            "crishim-outside/y": "dir",
            "crishim-outside/y/x": "file:1",
        },
        symlink("s", "/crishim-outside/y"),
        file("s/x", b"1"),
        implicit="crishim-outside crishim-outside/y",
    ),
    "below a chain of links": gives(
        {"a": "-> b/c/..", "b": "-> d", "d": "dir", "d/c": "-> /e/../", "e": "dir", "x": "file:1"},
        symlink("a", "b/c/.."),
        symlink("b", "d"),
        folder("d"),
        symlink("d/c", "/e/../"),
        folder("e"),
        file("a/x", b"1"),
    ),
    "below a loop of links": fails("a is behind too many symlinks", symlink("a", "b"), symlink("b", "a"), file("a/x")),
    "below a link to itself": fails("s is behind too many symlinks", symlink("s", "s"), file("s/x")),
    "below a link to a file": fails(
        "f is not a directory, yet has entries below", file("f"), symlink("s", "f"), file("s/x")
    ),
    "link replaced while known": gives(
        {"a": "dir", "a/1": "file:", "b": "dir", "b/2": "file:", "s": "-> b"},
        folder("a"),
        folder("b"),
        symlink("s", "a"),
        file("s/1"),
        symlink("s", "b"),
        file("s/2"),
    ),
    "a file over a link outside": gives({"s": "file:1"}, symlink("s", "/crishim-outside"), file("s", b"1")),
    "folder over a link outside": gives(
        {"s": "dir", "s/x": "file:1"}, symlink("s", "/crishim-outside"), folder("s"), file("s/x", b"1")
    ),
    "fifo over a link outside": gives({"s": "fifo"}, symlink("s", "/crishim-outside"), fifo("s")),
    "hard link to an absolute place": fails(
        "hard link h leads to /etc/passwd, no file of this layer", hard_link("h", "/etc/passwd")
    ),
    "hard link up": fails(
        "hard link h leads to ../../../etc/passwd, no file of this layer", hard_link("h", "../../../etc/passwd")
    ),
    "hard link through a link outside": fails(
        "hard link h leads to s/passwd, no file of this layer", symlink("s", "/etc"), hard_link("h", "s/passwd")
    ),
    "hard link to a link outside": gives(
        {"s": "-> /etc/passwd", "h": "-> /etc/passwd"}, symlink("s", "/etc/passwd"), hard_link("h", "s")
    ),
    "file over a hard link to a link outside": gives(
        {"s": "-> /etc/passwd", "h": "file:1"}, symlink("s", "/etc/passwd"), hard_link("h", "s"), file("h", b"1")
    ),
}

LINKS: dict[str, Case] = {
    "hard link": gives({"a": "file:1", "h": "file:1"}, file("a", b"1"), hard_link("h", "a")),
    "hard link to an absolute name": gives(
        {"d": "dir", "d/a": "file:1", "h": "file:1"}, folder("d"), file("d/a", b"1"), hard_link("h", "/d/./a")
    ),
    "hard link through a link": gives(
        {"d": "dir", "d/a": "file:1", "s": "-> d", "h": "file:1"},
        folder("d"),
        file("d/a", b"1"),
        symlink("s", "d"),
        hard_link("h", "s/a"),
    ),
    "hard link to a device and a pipe": gives(
        {"c": "char 1,3", "p": "fifo", "h": "char 1,3", "i": "fifo"},
        char("c", 1, 3),
        fifo("p"),
        hard_link("h", "c"),
        hard_link("i", "p"),
    ),
    "hard link before its file": fails("hard link h leads to a, no file of this layer", hard_link("h", "a"), file("a")),
    "hard link to nothing": fails("hard link h leads to /, no file of this layer", hard_link("h", "")),
    "hard link to a folder": fails("hard link h leads to d, no file of this layer", folder("d"), hard_link("h", "d")),
    "hard link to the root": fails("hard link h leads to ., no file of this layer", hard_link("h", ".")),
    "hard link below a file": fails(
        "hard link h leads to a/b, no file of this layer", file("a"), hard_link("h", "a/b")
    ),
    "hard link through a loop": fails(
        "hard link h leads to s/x, no file of this layer", symlink("s", "s"), hard_link("h", "s/x")
    ),
    "hard link to a whiteout": fails(
        "hard link h leads to a, no file of this layer", whiteout("a"), hard_link("h", "a")
    ),
    "hard link to itself": fails("a is a hard link to itself", file("a"), hard_link("a", "./a")),
    "hard link to itself through a link": fails(
        "d/a is a hard link to itself", folder("d"), file("d/a"), symlink("s", "d"), hard_link("d/a", "s/a")
    ),
    "hard link twice": gives({"a": "file:1", "h": "file:1"}, file("a", b"1"), hard_link("h", "a"), hard_link("h", "a")),
    "hard link over a folder": gives(
        {"a": "file:1", "h": "file:1"}, file("a", b"1"), folder("h"), file("h/x"), hard_link("h", "a")
    ),
    "hard link over the folder it leads to": fails(
        "cannot write d: No such file or directory", folder("d"), file("d/a"), hard_link("d", "d/a")
    ),
    "symlink without a target": fails("symlink s leads nowhere", symlink("s", "")),
    "symlink with a long target": fails("cannot write s: File name too long", symlink("s", "t" * 5000)),
    "symlink with the longest target": gives({"s": "-> " + "t" * 4095}, symlink("s", "t" * 4095)),
    "symlink to what comes later": gives(
        {"s": "-> d", "d": "dir", "d/x": "file:1"}, symlink("s", "d"), file("s/x", b"1"), folder("d")
    ),
}

REPLACED: dict[str, Case] = {
    "duplicate file": gives({"a": "file:second"}, file("a", b"the first"), file("a", b"second")),
    "duplicate by another spelling": gives({"a": "file:2"}, file("a", b"1"), file("/x/.././a", b"2")),
    "a hard link's other name stays": gives(
        {"a": "file:2", "h": "file:1"}, file("a", b"1"), hard_link("h", "a"), file("a", b"2")
    ),
    "file over a folder": gives(
        {"d": "file:1"}, folder("d"), folder("d/e"), file("d/e/x"), symlink("d/s", "/"), file("d", b"1")
    ),
    "folder over a file": gives({"d": "dir", "d/x": "file:"}, file("d", b"1"), folder("d"), file("d/x")),
    "folder over a folder": gives({"d": "dir", "d/x": "file:"}, folder("d"), file("d/x"), folder("d")),
    "symlink over a folder": gives(
        {"d": "-> e", "e": "dir", "e/x": "file:"},
        folder("d"),
        file("d/old"),
        symlink("d", "e"),
        folder("e"),
        file("d/x"),
    ),
    "folder over a symlink": gives(
        {"d": "dir", "d/x": "file:", "e": "dir"}, folder("e"), symlink("d", "e"), folder("d"), file("d/x")
    ),
    "file over a symlink": gives(
        {"e": "file:old", "s": "file:new"}, file("e", b"old"), symlink("s", "e"), file("s", b"new")
    ),
    "file over a folder that links lead to": gives(
        {"d": "file:1", "s": "-> d"}, folder("d"), symlink("s", "d"), folder("s/e"), file("s/e/x"), file("d", b"1")
    ),
    "entry below a folder that became a file": fails(
        "d is not a directory, yet has entries below", folder("d"), file("d/x"), file("d"), file("d/y")
    ),
    "folder gone and back": gives(
        {"d": "dir", "d/e": "dir", "d/e/y": "file:"},
        folder("d"),
        folder("d/e"),
        file("d/e/x"),
        symlink("d", "/"),
        folder("d"),
        file("d/e/y"),
        implicit="d/e",
    ),
    "deep folder replaced": gives({"d": "file:1"}, file(nested(300) + "/x"), file("d", b"1")),
    "below a file": fails("a is not a directory, yet has entries below", file("a"), file("a/b/c")),
    "below a fifo": fails("a is not a directory, yet has entries below", fifo("a"), file("a/b")),
    "below a device": fails("a is not a directory, yet has entries below", char("a", 0, 0), file("a/b")),
    "root as a file": fails("the layer's root is not a directory", file("./")),
    "root as a link": fails("the layer's root is not a directory", symlink("/", "/etc")),
    "root as a hard link": fails("the layer's root is not a directory", file("a"), hard_link("x/..", "a")),
    "root without a name": fails("the layer's root is not a directory", file("")),
}

LONG_NAMES: dict[str, Case] = {
    "255 bytes": gives({"n" * 255: "file:1"}, file("n" * 255, b"1")),
    "255 bytes in GNU's form": gives({"é" * 127: "file:1"}, gnu_long(file("é" * 127, b"1"))),
    "256 bytes": fails("cannot write " + "n" * 200 + "...: File name too long", file("n" * 256)),
    "256 bytes of a folder": fails("cannot write " + "n" * 200 + "...: File name too long", file("n" * 256 + "/x")),
    "as deep as a path can be": gives(
        {nested(depth): "dir" for depth in range(1, 2048)} | {nested(2047) + "/x": "file:1"},
        file(nested(2047) + "/x", b"1"),
        implicit=" ".join(nested(depth) for depth in range(1, 2048)),
    ),
    "10,000 deep": fails(f"the name {nested(100)}/... is too long: 20001 bytes", file(nested(10_000) + "/x")),
    "one deeper": fails(f"the name {nested(100)}/... is too long: 4097 bytes", folder(nested(2049))),
    "10,000 deep through links": fails(
        "cannot write s/" + ("d" * 98 + "/") * 2 + "...: File name too long",
        symlink("s", nested(40, "d" * 98)),
        file("s/" + nested(40, "d" * 98) + "/x"),
    ),
    "a name of a megabyte": fails(
        "the name " + "n" * 200 + "... is too long: 1000000 bytes", gnu_long(file("n" * 1_000_000))
    ),
    "not UTF-8": gives({os.fsdecode(b"\xff\n\xfe"): "file:1"}, file(b"\xff\n\xfe", b"1")),
}

WHITEOUTS: dict[str, Case] = {
    "whiteout": gives({"a": "whiteout"}, whiteout("a")),
    "whiteout in a folder": gives({"d": "dir", "d/a": "whiteout"}, folder("d"), whiteout("d/a")),
    "whiteout in a folder left out": gives({"d": "dir", "d/a": "whiteout"}, whiteout("d/a"), implicit="d"),
    "whiteout twice": gives({"a": "whiteout"}, whiteout("a"), whiteout("a")),
    "whiteout with content": gives({"a": "whiteout", "b": "file:1"}, file(".wh.a", b"x" * 600), file("b", b"1")),
    "whiteout of another kind": gives({"a": "whiteout", "b": "whiteout"}, folder(".wh.a/"), symlink(".wh.b", "x")),
    "whiteout of this layer's file": gives({"a": "file:1"}, file("a", b"1"), whiteout("a")),
    "whiteout, then the file": gives({"a": "file:1"}, whiteout("a"), file("a", b"1")),
    "whiteout, then a symlink": gives({"a": "-> b"}, whiteout("a"), symlink("a", "b")),
    "whiteout, then a hard link": gives(
        {"a": "file:1", "b": "file:1"}, whiteout("a"), file("b", b"1"), hard_link("a", "b")
    ),
    "whiteout, then a folder": gives(
        {"d": "dir", "d/x": "file:"}, whiteout("d"), folder("d"), file("d/x"), opaque={"d"}
    ),
    "folder, then its whiteout": gives(
        {"d": "dir", "d/x": "file:"}, folder("d"), file("d/x"), whiteout("d"), opaque={"d"}
    ),
    "whiteout, then something below": gives(
        {"d": "dir", "d/e": "dir", "d/e/x": "file:"}, whiteout("d"), file("d/e/x"), opaque={"d"}
    ),
    "something below, then the whiteout": gives(
        {"d": "dir", "d/e": "dir", "d/e/x": "file:"}, file("d/e/x"), whiteout("d"), opaque={"d"}
    ),
    "whiteout, folder, file": gives({"d": "file:1"}, whiteout("d"), folder("d"), file("d", b"1")),
    "whiteout, folder, file, folder": gives(
        {"d": "dir"}, whiteout("d"), folder("d"), file("d"), folder("d"), opaque={"d"}
    ),
    "whiteout, folder, symlink to a folder": gives(
        {"d": "-> e", "e": "dir"}, folder("e"), whiteout("d"), folder("d"), symlink("d", "e")
    ),
    "whiteout through a link": gives(
        {"d": "dir", "d/a": "whiteout", "s": "-> d"}, folder("d"), symlink("s", "d"), whiteout("s/a")
    ),
    "whiteout through a link, then the folder": gives(
        {"d": "dir", "d/a": "dir", "s": "-> d"},
        folder("d"),
        symlink("s", "d"),
        whiteout("s/a"),
        folder("d/a"),
        opaque={"d/a"},
    ),
    "whiteout through a link outside": gives(
        {"s": "-> /crishim-outside", "crishim-outside": "dir", "crishim-outside/secret": "whiteout"},
        symlink("s", "/crishim-outside"),
        whiteout("s/secret"),
        implicit="crishim-outside",
    ),
    "whiteout below a file": fails("a is not a directory, yet has entries below", file("a"), whiteout("a/b")),
    "whiteout of nothing": fails("whiteout .wh. in / hides no name", file(".wh.")),
    "whiteout of .": fails("whiteout .wh.. in d hides no name", file("d/.wh..")),
    "whiteout of ..": fails("whiteout .wh... in d hides no name", file("d/.wh...")),
    "whiteout of ....": gives({"....": "whiteout"}, file(".wh....."), implicit=""),
    "whiteout of a whiteout's name": gives({".wh": "whiteout"}, file(".wh..wh")),
    "entry below a whiteout": fails("d/.wh.x/y is below a whiteout", file("d/.wh.x/y")),
    "hard link named like a whiteout": gives({"a": "file:", "b": "whiteout"}, file("a"), hard_link(".wh.b", "a")),
    "whiteout of a name that is too long": fails(
        "cannot write .wh." + "n" * 196 + "...: File name too long", file(".wh." + "n" * 256)
    ),
    "a 0/0 device is left as it is": gives({"a": "whiteout", "b": "whiteout"}, char("a", 0, 0), hard_link("b", "a")),
    "opaque root": gives({"a": "file:"}, file("a"), opaque(""), opaque={""}),
    "opaque folder": gives({"d": "dir", "d/a": "file:"}, folder("d"), file("d/a"), opaque("d"), opaque={"d"}),
    "opaque first": gives({"d": "dir", "d/a": "file:"}, folder("d"), opaque("d"), file("d/a"), opaque={"d"}),
    "opaque and left out": gives({"d": "dir", "d/e": "dir"}, opaque("d/e"), opaque={"d/e"}, implicit="d d/e"),
    "opaque before its folder": gives({"d": "dir"}, opaque("d"), folder("d"), opaque={"d"}),
    "opaque through a link": gives(
        {"d": "dir", "s": "-> d"}, folder("d"), symlink("s", "d"), opaque("s"), opaque={"d"}
    ),
    "opaque below a file": fails("a is not a directory, yet has entries below", file("a"), opaque("a")),
    "opaque, made again": gives({"d": "dir"}, folder("d"), opaque("d"), file("d"), folder("d")),
    "opaque, made again with the folder above": gives(
        {"d": "dir", "d/e": "dir"}, folder("d"), folder("d/e"), opaque("d/e"), file("d"), folder("d"), folder("d/e")
    ),
    "opaque, made again by an entry below": gives(
        {"d": "dir", "d/e": "dir", "d/e/x": "file:"},
        opaque("d/e"),
        file("d"),
        folder("d"),
        file("d/e/x"),
        implicit="d/e",
    ),
    "opaque, then a file": gives({"d": "file:"}, opaque("d"), file("d")),
    "opaque, then a symlink to a folder": gives(
        {"d": "-> e", "e": "dir", "e/x": "dir"},
        folder("e"),
        folder("e/x"),
        opaque("d"),
        opaque("d/x"),
        symlink("d", "e"),
    ),
    "whiteouts in an opaque folder": gives(
        {"d": "dir", "d/e": "dir", "d/x": "file:"},
        whiteout("d/a"),
        whiteout("d/e/b"),
        folder("d"),
        file("d/x"),
        opaque("d"),
        opaque={"d"},
    ),
    "whiteouts in an opaque root": gives(
        {"d": "dir"}, folder("d"), whiteout("d/a"), whiteout("b"), opaque(""), opaque={""}
    ),
    "aufs": gives(
        {"a": "file:1"},
        file(".wh..wh.aufs", b"x"),
        folder(".wh..wh.plnk"),
        file(".wh..wh.plnk/123.456", b"x" * 1000),
        folder(".wh..wh.orph/"),
        file("d/.wh..wh.plnk/1"),
        file("a", b"1"),
    ),
}

KINDS: dict[str, Case] = {
    "nothing": Case(b""),
    "empty archive": Case(END),
    "one zero block": Case(bytes(512)),
    "root only": gives({}, folder("./")),
    "every kind": gives(
        {
            "c": "char 1,3",
            "b": "block 8,1",
            "p": "fifo",
            "big": "block 4095,1048575",
            "d": "dir",
            "f": "file:",
            "s": "-> f",
        },
        char("c", 1, 3),
        block("b", 8, 1),
        fifo("p"),
        block("big", 4095, 1048575),
        folder("d"),
        file("f"),
        symlink("s", "f"),
    ),
    "V7": gives(
        {"f": "file:1", "d": "dir"}, file("f", b"1", raw={"magic": V7}), Member("d/", b"\0", raw={"magic": V7})
    ),
    "global PAX header": gives({"f": "file:1"}, pax_header({"comment": "x"}, kind=b"g"), file("f", b"1")),
    "unknown kind": fails("label is of unknown type b'V'", Member("label", b"V")),
    "sparse": fails("s is a sparse file, which this unpacker does not know", Member("s", b"S")),
    "sparse in PAX": fails(
        "s is a sparse file, which this unpacker does not know",
        file("GNUSparseFile.0/s", pax={"GNU.sparse.major": "1", "GNU.sparse.name": "s", "path": "s"}),
    ),
    "wrong checksum": fails(
        "a header has a wrong checksum: not a tar archive, or a damaged one",
        file("a"),
        file("b", raw={"checksum": b"1"}),
    ),
    "huge size": fails("the archive ends in the middle of a file", file("a", raw={"size": base256(1 << 60, 12)})),
    "negative size": fails("a has a size, owner or group out of range", file("a", raw={"size": base256(-1, 12)})),
    "huge device": fails("a has a device number out of range", char("a", 1 << 12, 0)),
    "NUL in a name": fails(
        "a\N{REPLACEMENT CHARACTER}b or what it links to has a NUL in its name", file("x", pax={"path": b"a\0b"})
    ),
    "huge attribute": fails(
        "cannot set user.x of a: Argument list too long", file("a", pax={"SCHILY.xattr.user.x": b"x" * 70_000})
    ),
    "bad capability": fails(
        "cannot set security.capability of a: Invalid argument",
        file("a", pax={"SCHILY.xattr.security.capability": b"x"}),
    ),
    "end cut off": Case(archive(file("a", b"1"), end=b""), {"a": "file:1"}),
    "header cut off": Case(archive(file("a"))[:300] + b"", error="the layer is neither gzip nor a tar archive"),
    "second header cut off": Case(
        archive(file("a"), file("b"))[:1000], error="the archive ends in the middle of a header"
    ),
    "content cut off": Case(archive(file("a", b"x" * 2000))[:1000], error="the archive ends in the middle of a file"),
    "more after the end": Case(archive(file("a")) + b"more" * 3000, {"a": "file:"}),
    "single zero block": fails("the archive goes on after a single block of zeros", file("a"), bytes(512), file("b")),
}

CORPUS = {
    f"{group}: {name}": case
    for group, cases in {
        "escapes": ESCAPES,
        "links": LINKS,
        "replaced": REPLACED,
        "long names": LONG_NAMES,
        "whiteouts": WHITEOUTS,
        "kinds": KINDS,
    }.items()
    for name, case in cases.items()
}


async def check(workers: UnpackWorkers, layer: Path, case: Case, data: bytes) -> None:
    """Unpack ``data``, which is the case's in some form."""
    if case.error:
        with pytest.raises(BadImage) as caught:
            await workers.unpack(layer, writing(data))
        assert str(caught.value) == case.error
        return
    report = await workers.unpack(layer, writing(data))
    assert await asyncio.to_thread(outline, layer) == case.tree
    assert (names_of(report.opaque), "" in report.opaque) == (case.opaque - {""}, "" in case.opaque)
    assert names_of(report.implicit) == case.implicit
    assert report.diff_id == "sha256:" + hashlib.sha256(case.data).hexdigest()
    assert report.unpacked == len(case.data)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", CORPUS)
async def test_corpus(name: str, compressed: bool, shared: UnpackWorkers, layer: Path) -> None:
    """Each layer gives exactly its tree, or its error, and nothing happens elsewhere."""
    case = CORPUS[name]
    if compressed and (case.error.startswith("the layer is neither") or "deep" in name):
        return  # a matter of what is not compressed, or slow
    await shared.unpack(layer, writing(END))
    async with nothing_left(shared):
        await check(shared, layer, case, gzipped(case.data, member_size=3000) if compressed else case.data)


async def test_link_to_the_real_outside(shared: UnpackWorkers, layer: Path, outside_is_untouched: Path) -> None:
    """Links to a directory that exists on the host lead to one of that name in the layer."""
    outside = str(outside_is_untouched)
    up = "../" * 20 + outside
    parts = [symlink("a", outside), symlink("b", up), file("a/secret", b"1"), file("b/link", b"2"), whiteout("a/x")]
    report = await shared.unpack(layer, writing(archive(*parts)))
    inside = outline(layer / outside.lstrip("/"))
    assert inside == {"secret": "file:1", "link": "file:2", "x": "whiteout"}
    assert outside.lstrip("/") in names_of(report.implicit)


# streams


def good() -> bytes:
    """A layer with content that does not compress well."""
    return archive(folder("d"), file("d/f", random.Random(1).randbytes(100_000)), file("g", b"x" * 1000))


STREAMS: dict[str, tuple[bytes, str]] = {
    "neither": (b"neither gzip nor tar" * 100, "the layer is neither gzip nor a tar archive"),
    "short": (b"x", "the layer is neither gzip nor a tar archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(1000), "the layer is neither gzip nor a tar archive"),
    "gzip of no archive": (
        gzip.compress(b"no archive" * 100),
        "a header has a wrong checksum: not a tar archive, or a damaged one",
    ),
    "gzip of a few bytes": (gzip.compress(b"no archive"), "the archive ends in the middle of a header"),
    "garbage after gzip": (gzipped(good()) + b"garbage", "the layer has data after its gzip stream"),
    "garbage after zeros": (gzipped(good()) + bytes(99) + b"\x01", "the layer has data after its gzip stream"),
    "gzip magic after gzip": (
        gzipped(good()) + b"\x1f\x8b\xff" + bytes(99),
        "the layer's gzip stream is broken: ",
    ),
    "cut in the header": (gzipped(good())[:7], "the layer's gzip stream is truncated"),
    "cut after the header": (gzipped(good())[:10], "the layer's gzip stream is truncated"),
    "cut in the middle": (gzipped(good())[:50_000], "the layer's gzip stream is truncated"),
    "cut in the trailer": (gzipped(good())[:-4], "the layer's gzip stream is truncated"),
    "cut by one byte": (gzipped(good())[:-1], "the layer's gzip stream is truncated"),
    "cut in the second member": (gzipped(good(), member_size=60_000)[:-1], "the layer's gzip stream is truncated"),
    "wrong checksum": (
        gzipped(good())[:-8] + b"\0\0\0\0" + gzipped(good())[-4:],
        "the layer's gzip stream is broken: incorrect checksum",
    ),
    "wrong length": (
        gzipped(good())[:-4] + b"\0\0\0\0",
        "the layer's gzip stream is broken: incorrect checksum",
    ),
    "damaged": (
        gzipped(good())[:10] + b"\xff" * 1000 + gzipped(good())[1010:],
        "the layer's gzip stream is broken: ",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_bad_streams(name: str, shared: UnpackWorkers, layer: Path) -> None:
    """Not compressed as it should be: a sentence says how."""
    data, error = STREAMS[name]
    await shared.unpack(layer, writing(END))
    async with nothing_left(shared):
        with pytest.raises(BadImage) as caught:
            await shared.unpack(layer, writing(data))
        assert str(caught.value).startswith(error)


GOOD_STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "gzip": gzipped,
    "zeros after gzip": lambda data: gzipped(data) + bytes(10_000),
    "two members": lambda data: gzipped(data, member_size=60_000),
    "many members": lambda data: gzipped(data, member_size=100),
    "empty members": lambda data: gzip.compress(b"") * 5000 + gzipped(data) + gzip.compress(b"") * 5000,
    "zeros between members": lambda data: gzipped(data[:999]) + bytes(5) + gzipped(data[999:]),
    "members with names": lambda data: gzipped(data[:999]) + named_gzip(data[999:]),
    "stored": lambda data: gzip.compress(data, 0),
}


def named_gzip(data: bytes) -> bytes:
    """With a file name, as gzip(1) writes it, and an extra field."""
    plain = gzip.compress(data, mtime=0)
    return plain[:3] + b"\x0c" + plain[4:10] + b"\x04\x00extr" + b"layer.tar\0" + plain[10:]


@pytest.mark.parametrize("chunk", [1 << 20, 4096, 37])
@pytest.mark.parametrize("name", GOOD_STREAMS)
async def test_good_streams(name: str, chunk: int, shared: UnpackWorkers, layer: Path) -> None:
    """However it is compressed and arrives, the digest and the tree are the same."""
    data = good()
    report = await shared.unpack(layer, writing(GOOD_STREAMS[name](data), chunk))
    assert report.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (report.size, report.entries, report.unpacked) == (101_000, 3, len(data))
    assert (layer / "d/f").read_bytes() == random.Random(1).randbytes(100_000)


async def bomb(pumps: ThreadPoolExecutor, layer: Path, limits: Limits, data: bytes) -> str:
    """The error of a layer that is too much."""
    workers = UnpackWorkers(limits, pumps)
    try:
        with pytest.raises(BadImage) as caught:
            await workers.unpack(layer, writing(data))
        await until_no_child(workers)
    finally:
        workers.close()
    return str(caught.value)


async def test_byte_bomb(pumps: ThreadPoolExecutor, layer: Path) -> None:
    """A gigabyte of zeros in a megabyte: it ends at the limit."""
    zeros = gzip.compress(bytes(1 << 20), 9) * 1024
    data = gzip.compress(Member("zeros", raw={"size": b"%011o" % (1 << 30)}).encode()) + zeros
    error = await bomb(pumps, layer, Limits(8 << 20, 100), data)
    assert error == "the layer unpacks to more than 8388608 bytes"
    assert (layer / "zeros").stat().st_size <= 8 << 20


@pytest.mark.parametrize("data", [archive(*[file("a")] * 101), archive(*[whiteout("a")] * 101)])
async def test_entry_bomb(pumps: ThreadPoolExecutor, layer: Path, data: bytes) -> None:
    """Every member counts, be it always the same."""
    assert await bomb(pumps, layer, Limits(1 << 30, 100), data) == "the layer has more than 100 entries"


async def test_bomb_of_folders_left_out(pumps: ThreadPoolExecutor, layer: Path) -> None:
    """One member with a deep name makes many directories: they count as well."""
    data = archive(file(nested(101) + "/x"))
    assert await bomb(pumps, layer, Limits(1 << 30, 100), data) == "the layer has more than 100 entries"


async def test_limits_are_inclusive(pumps: ThreadPoolExecutor, layer: Path) -> None:
    """Exactly as much as allowed is allowed."""
    data = archive(*(file(f"d/{number}") for number in range(9)))
    workers = UnpackWorkers(Limits(len(data), 10), pumps)
    try:
        report = await workers.unpack(layer, writing(gzipped(data)))
    finally:
        workers.close()
    assert (report.entries, report.unpacked) == (10, len(data))


# attributes


async def test_modes_owners_and_times(shared: UnpackWorkers, layer: Path) -> None:
    """To the last bit and the last nanosecond, of every kind of file; times before 1970 too."""
    parts = [
        folder("d", 0o3777, uid=1, gid=2, pax={"mtime": "-1.5"}),
        file("d/suid", b"x", 0o6755, uid=3, gid=4, pax={"mtime": "1700000000.123456789"}),
        file("none", b"x", 0, uid=4294967294, gid=4294967294, pax={"uid": "4294967294", "mtime": "-1000000000"}),
        fifo("p", mode=0o1622, uid=5, gid=6, mtime=7),
        char("c", 1, 3, mode=0o6666, uid=7, gid=8, mtime=9),
        symlink("s", "none", uid=9, gid=10, pax={"mtime": "11.000000001"}),
        hard_link("d/h", "d/suid", mode=0o600, uid=99, gid=99, mtime=99),
        folder("./", 0o1711, uid=12, gid=13, mtime=14),
    ]
    await shared.unpack(layer, writing(archive(*parts)))
    tree = {name: (n.mode, n.uid, n.gid, n.mtime_ns) for name, n in snapshot(layer).items()}
    assert tree == {
        "": (0o1711, 12, 13, 14_000_000_000),
        "d": (0o3777, 1, 2, -1_500_000_000),
        "d/suid": (0o6755, 3, 4, 1_700_000_000_123_456_789),
        "d/h": (0o6755, 3, 4, 1_700_000_000_123_456_789),
        "none": (0, 4294967294, 4294967294, -1_000_000_000_000_000_000),
        "p": (0o1622, 5, 6, 7_000_000_000),
        "c": (0o6666, 7, 8, 9_000_000_000),
        "s": (0o777, 9, 10, 11_000_000_001),
    }
    assert (layer / "d/suid").stat().st_ino == (layer / "d/h").stat().st_ino


async def test_files_in_a_setgid_folder(shared: UnpackWorkers, layer: Path) -> None:
    """What is made there belongs to the group that the layer says, not to the folder's."""
    parts = [
        folder("d", 0o2775, gid=50),
        file("d/f"),
        folder("d/sub"),
        symlink("d/s", "f"),
        fifo("d/p"),
        file("d/left/out"),
        whiteout("d/w"),
    ]
    await shared.unpack(layer, writing(archive(*parts)))
    owners = {name: (n.mode, n.uid, n.gid) for name, n in snapshot(layer).items() if name}
    assert owners == {
        "d": (0o2775, 0, 50),
        "d/f": (0o644, 0, 0),
        "d/sub": (0o755, 0, 0),
        "d/s": (0o777, 0, 0),
        "d/p": (0o644, 0, 0),
        "d/left": (0o755, 0, 0),
        "d/left/out": (0o644, 0, 0),
        "d/w": (0, 0, 0),
    }


async def test_root_left_out(shared: UnpackWorkers, layer: Path) -> None:
    """It is like any other directory that the archive leaves out, whatever the umask was."""
    layer.chmod(0o700)
    report = await shared.unpack(layer, writing(archive(file("a"))))
    assert (node(layer).mode, node(layer).uid) == (0o755, 0)
    assert report.implicit == [""]
    report = await shared.unpack(layer, writing(archive(folder("."), file("a"))))
    assert report.implicit == []


async def test_folder_times(shared: UnpackWorkers, layer: Path) -> None:
    """Set at the end: by the last member that names the folder, and only if it is still that folder."""
    parts = [
        folder("d", mtime=1),
        folder("d/e", mtime=2),
        folder("gone", mtime=3),
        folder("gone/sub", mtime=4),
        symlink("s", "gone"),
        folder("s/alias", mtime=5),
        folder("link", mtime=6),
        folder("link/e", mtime=7),
        file("d/e/x", mtime=8),
        folder("d", mtime=9),
        file("gone", mtime=10),
        symlink("link", "d", mtime=11),
    ]
    await shared.unpack(layer, writing(archive(*parts)))
    times = {name: n.mtime_ns // 1_000_000_000 for name, n in snapshot(layer).items() if name}
    assert times.pop("s") == 0
    assert times == {"d": 9, "d/e": 2, "d/e/x": 8, "gone": 10, "link": 11}


async def test_xattrs(shared: UnpackWorkers, layer: Path) -> None:
    """User attributes and file capabilities are kept, also by a file with an owner; the rest is dropped."""
    pax: dict[str, bytes | str] = {
        "SCHILY.xattr.user.a": b"\0\xff\n=",
        "SCHILY.xattr.user.empty": b"",
        "SCHILY.xattr.security.capability": CAPABILITY,
        "SCHILY.xattr.trusted.overlay.opaque": b"y",
        "SCHILY.xattr.trusted.x": b"y",
        "SCHILY.xattr.user.overlay.opaque": b"y",
        "SCHILY.xattr.security.selinux": b"y",
        "SCHILY.xattr.security.capabilities": b"y",
        "SCHILY.xattr.system.posix_acl_access": b"y",
        "LIBARCHIVE.xattr.user.b": b"y",
    }
    kept = (("user.a", b"\0\xff\n="), ("user.empty", b""))
    parts = [
        file("f", b"x", 0o4755, uid=1000, gid=1000, pax=pax),
        folder("d", pax=pax | {"SCHILY.xattr.security.capability": b""}),
        symlink("s", "f", pax={"SCHILY.xattr.user.a": "1"}),
        fifo("p", pax={"SCHILY.xattr.user.a": "1"}),
    ]
    parts[1] = replace(parts[1], pax={key: value for key, value in pax.items() if "capability" not in key})
    await shared.unpack(layer, writing(archive(*parts)))
    tree = snapshot(layer)
    assert tree["f"].xattrs == (("security.capability", CAPABILITY), *kept)
    assert tree["f"].mode == 0o4755
    assert (tree["d"].xattrs, tree["s"].xattrs, tree["p"].xattrs) == (kept, (), ())


async def test_hard_links_are_one_file(shared: UnpackWorkers, layer: Path) -> None:
    """Of files, symlinks and devices; replacing one name leaves the others."""
    parts = [file("a", b"1"), symlink("s", "a"), hard_link("b", "a"), hard_link("t", "s"), hard_link("c", "b")]
    await shared.unpack(layer, writing(archive(*parts, file("a", b"2"))))
    tree = snapshot(layer)
    assert tree["b"].names == ("b", "c")
    assert tree["s"].names == ("s", "t")
    assert tree["a"].names == ("a",)


# the worker's life


@pytest.mark.parametrize("at", [0, 300, 70_000])
async def test_error_of_the_pump_wins(at: int, own: UnpackWorkers, layer: Path) -> None:
    """Whatever the worker says of the half of a layer; the child is killed, not waited for."""
    pause = Pause(gzipped(good()), at, ValueError("digest mismatch"))
    async with nothing_left(own):
        task = asyncio.create_task(own.unpack(layer, pause))
        await pause.reached()
        pause.go()
        with pytest.raises(ValueError, match="digest mismatch"):
            await task
    assert (await own.unpack(layer, writing(gzipped(good())))).entries == 3


async def test_error_of_the_pump_at_the_end_wins(own: UnpackWorkers, layer: Path) -> None:
    """All has been written, and then it turns out to be the wrong thing."""
    data = gzipped(good())
    async with nothing_left(own):
        with pytest.raises(ValueError, match="digest mismatch"):
            task = asyncio.create_task(
                own.unpack(layer, pause := Pause(data, len(data), ValueError("digest mismatch")))
            )
            await pause.reached()
            pause.go()
            await task


async def test_worker_error_with_a_pump_that_goes_on(own: UnpackWorkers, layer: Path) -> None:
    """The pump's broken pipe is the consequence of the worker's error, not an error of its own."""
    async with nothing_left(own):
        with pytest.raises(BadImage, match="neither gzip nor"):
            await own.unpack(layer, writing(b"x" * (8 << 20)))


async def test_parent_killed_between_layers(own: UnpackWorkers, layer: Path) -> None:
    """The next layer starts another one."""
    old = parent_of(own)
    os.kill(old, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, old, os.WEXITED | os.WNOWAIT)
    assert (await own.unpack(layer, writing(good()))).entries == 3
    assert parent_of(own) != old


async def test_parent_killed_during_layers(own: UnpackWorkers, tmp_path: Path) -> None:
    """All that were under way fail as the host's fault, with their children; the next one works."""
    layers, pauses = [tmp_path / "1", tmp_path / "2"], [Pause(good(), 5000), Pause(good(), 70_000)]
    tasks = []
    before = open_fds()
    for path, pause in zip(layers, pauses, strict=True):
        path.mkdir()
        tasks.append(asyncio.create_task(own.unpack(path, pause)))
        await pause.reached()
    children, old = await the_children(own, 2), parent_of(own)
    os.kill(old, signal.SIGKILL)
    await until_gone(*children)
    for pause in pauses:
        pause.go()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, HostFailure)
        assert str(result) == "the unpack worker died; it may have been out of memory"
    (tmp_path / "3").mkdir()
    assert (await own.unpack(tmp_path / "3", writing(good()))).entries == 3
    await until_no_child(own)
    assert len(open_fds()) == len(before)


async def test_child_killed(own: UnpackWorkers, layer: Path) -> None:
    """As the kernel does when memory is short."""
    async with nothing_left(own):
        task = asyncio.create_task(own.unpack(layer, pause := Pause(good(), 5000)))
        await pause.reached()
        os.kill(await the_child(own), signal.SIGKILL)
        pause.go()
        with pytest.raises(HostFailure, match="the unpack worker died"):
            await task


@pytest.mark.parametrize("settled", [True, False])
async def test_cancellation(settled: bool, own: UnpackWorkers, layer: Path) -> None:
    """The child is gone when the cancelled task ends, even if it had not begun; the layer can be removed."""
    async with nothing_left(own):
        pause = Pause(good(), 5000)
        task = asyncio.create_task(own.unpack(layer, pause))
        if settled:
            await pause.reached()
            await the_child(own)
        else:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_no_child(own)
        remove_tree(layer)
        assert not layer.exists()
        pause.go()
    layer.mkdir()
    assert (await own.unpack(layer, writing(good()))).entries == 3


async def test_cancellation_by_a_deadline(own: UnpackWorkers, layer: Path) -> None:
    """As a pull does it that makes no progress."""
    pause = Pause(good(), 5000)
    async with nothing_left(own):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await own.unpack(layer, pause)
        pause.go()


async def test_layers_at_the_same_time(own: UnpackWorkers, tmp_path: Path) -> None:
    """Each in a child of its own."""
    layers = [tmp_path / str(number) for number in range(6)]
    for path in layers:
        path.mkdir()
    async with nothing_left(own):
        reports = await asyncio.gather(*(own.unpack(path, writing(gzipped(good()))) for path in layers))
    assert len({report.diff_id for report in reports}) == 1
    assert all(outline(path) == outline(layers[0]) for path in layers)


async def test_close_during_a_layer(own: UnpackWorkers, layer: Path) -> None:
    """The child ends with its parent."""
    task = asyncio.create_task(own.unpack(layer, pause := Pause(good(), 5000)))
    await pause.reached()
    child = await the_child(own)
    own.close()
    await until_gone(child)
    pause.go()
    with pytest.raises(HostFailure, match="the unpack worker died"):
        await task


async def test_idle_worker_ends(pumps: ThreadPoolExecutor, layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes when nothing has come for a while, but not while it unpacks; the next layer starts another."""
    monkeypatch.setattr(client, "IDLE_SECONDS", 0.05)
    workers = UnpackWorkers(LIMITS, pumps)
    before = open_fds()
    try:
        task = asyncio.create_task(workers.unpack(layer, pause := Pause(good(), 5000)))
        await pause.reached()
        await asyncio.sleep(0.2)
        first = parent_of(workers)
        pause.go()
        assert (await task).entries == 3
        await asyncio.sleep(0.2)
        assert workers._parent is None
        assert not Path(f"/proc/{first}").exists()
        assert open_fds() == before
        assert (await workers.unpack(layer, writing(good()))).entries == 3
    finally:
        workers.close()


def test_parent_ends_with_the_daemon(layer: Path) -> None:
    """A daemon that is killed leaves no worker behind, though one unpacks."""
    code = f"""
import asyncio, os, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from crishim.layers.client import Limits, UnpackWorkers

def pump(fd):
    os.write(fd, bytes(100))
    print(workers._parent.pid, flush=True)
    time.sleep(60)

workers = UnpackWorkers(Limits(1 << 30, 1 << 20), ThreadPoolExecutor(1))
asyncio.run(workers.unpack(Path({str(layer)!r}), pump))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        parent = int(daemon.stdout.readline())
        for _ in range(500):
            if children := processes_below(parent):
                break
            time.sleep(0.01)
        daemon.kill()
    asyncio.run(until_gone(parent, *children))


async def test_worker_cannot_start(pumps: ThreadPoolExecutor, layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's fault; nothing stays open."""
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    workers, before = UnpackWorkers(LIMITS, pumps), open_fds()
    with pytest.raises(HostFailure, match="cannot start /nonexistent/python"):
        await workers.unpack(layer, writing(good()))
    assert open_fds() == before


async def test_layer_directory_missing(own: UnpackWorkers, layer: Path) -> None:
    """The host's fault, with the name."""
    async with nothing_left(own):
        with pytest.raises(HostFailure, match=f"cannot unpack into {layer}/none: No such file or directory"):
            await own.unpack(layer / "none", writing(good()))


async def test_no_thread_for_the_pump(own: UnpackWorkers, layer: Path) -> None:
    """When the daemon ends, its threads end first: the child that waits for input goes too."""
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    own._pumps = executor
    async with nothing_left(own):
        with pytest.raises(HostFailure, match="cannot read the layer: "):
            await own.unpack(layer, writing(good()))


async def test_pump_never_begun(own: UnpackWorkers, layer: Path) -> None:
    """A pump that waits for a thread when the daemon ends."""
    busy = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(busy.wait, 30)
        own._pumps = executor
        async with nothing_left(own):
            task = asyncio.create_task(own.unpack(layer, writing(good())))
            await the_child(own)
            executor.shutdown(wait=False, cancel_futures=True)
            with pytest.raises(HostFailure, match="the daemon ends"):
                await task
        busy.set()


async def test_full_disk_is_the_hosts_fault(shared: UnpackWorkers, layer: Path) -> None:
    """Not the image's: the same layer may fit elsewhere."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", layer], check=True)
    try:
        with pytest.raises(HostFailure, match="cannot write big: No space left on device"):
            await shared.unpack(layer, writing(archive(file("big", b"x" * (1 << 20)))))
    finally:
        subprocess.run(["umount", layer], check=True)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"", "the unpack worker died; it may have been out of memory"),
        (b"nonsense", "the unpack worker answered nonsense"),
        (b'{"diff_id": 1}', "the unpack worker answered nonsense"),
        (
            b'{"diff_id":"","size":0,"entries":0,"unpacked":0,"opaque":["zz"],"implicit":[]}',
            "the unpack worker answered nonsense",
        ),
        (b'{"error": "full", "host": true}', "full"),
        (b'{"error": "' + b"x" * 5000 + b'"}', "x" * 1000),
    ],
)
def test_answers(line: bytes, error: str) -> None:
    """The worker may not be ours any more: what it says is checked and cut to size."""
    with pytest.raises((HostFailure, BadImage)) as caught:
        client._report(line)
    assert str(caught.value) == error


async def test_answer_before_the_layer_is_read(
    own: UnpackWorkers, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that claims success early, so that the pump cannot verify what it sends, is not believed."""
    line = b'{"diff_id":"","size":0,"entries":0,"unpacked":0,"opaque":[],"implicit":[]}'
    report = client._report
    monkeypatch.setattr(client, "_report", lambda _: report(line))
    with pytest.raises(HostFailure, match="answered before it had read the layer"):
        await own.unpack(layer, writing(b"x" * (8 << 20)))


async def test_broken_pipe_of_the_pump(own: UnpackWorkers, layer: Path) -> None:
    """Of its connection to the registry: not to be taken for the worker's end."""

    def pump(fd: int) -> None:
        os.write(fd, good()[:1000])
        raise BrokenPipeError("connection lost")

    with pytest.raises(BrokenPipeError, match="connection lost"):
        await own.unpack(layer, pump)


# confinement


async def test_child_is_confined(own: UnpackWorkers, layer: Path) -> None:
    """While it unpacks it has the capabilities for that, no more, and sees only the layer."""
    task = asyncio.create_task(own.unpack(layer, pause := Pause(good(), 5000)))
    await pause.reached()
    child = await the_child(own)
    status = status_of(child)
    kept = f"{worker._KEPT & worker._OWN_CAPABILITIES:016x}"
    assert {status[key] for key in ("CapEff", "CapPrm")} == {kept}
    assert int(status["CapBnd"], 16) & ~worker._KEPT == 0
    assert {int(status[key], 16) for key in ("CapInh", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Groups"]) == ("1", "")
    assert set((status["Uid"] + " " + status["Gid"]).split()) == {str(worker._NOBODY_ELSE)}
    assert os.path.samefile(f"/proc/{child}/root", layer)
    assert os.path.samefile(f"/proc/{child}/cwd", layer)
    for kind in ("net", "mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{child}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    kinds = sorted(os.readlink(f"/proc/{child}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{child}/fd"))
    assert kinds == ["/dev/null", "/dev/null", "/dev/null", "pipe", "pipe"]
    pause.go()
    await task


PROBE = """
import json, os, socket, stat, sys
from crishim.layers import worker

def outcome(act):
    try:
        act()
    except OSError as err:
        return os.strerror(err.errno)
    return "done"

layer = os.open(sys.argv[1], os.O_RDONLY)
outside = os.stat("/")
worker.confine(layer, os.getppid())
os.mknod("node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
os.close(os.open("suid", os.O_CREAT | os.O_WRONLY, 0o755))
os.chmod("suid", 0o6755)
os.chown("node", 5, 6)
print(json.dumps({
    "device": outcome(lambda: os.open("node", os.O_RDWR)),
    "kill init": outcome(lambda: os.kill(1, 0)),
    "kill parent": outcome(lambda: os.kill(os.getppid(), 0)),
    "chroot": outcome(lambda: os.chroot("/")),
    "setuid": outcome(lambda: os.setresuid(0, 0, 0)),
    "passwd": outcome(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "proc": outcome(lambda: os.open("/proc/self/root", os.O_PATH)),
    "up": os.stat("/../..").st_ino == os.stat(".").st_ino != outside.st_ino,
    "network": outcome(lambda: socket.socket().connect(("127.0.0.1", 1))),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "raw socket": outcome(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "more files": outcome(lambda: [os.dup(0) for _ in range(64)]),
}))
"""


def test_what_a_confined_child_can_do(layer: Path) -> None:
    """Were an image to take the child over: it could write its own layer, and that is all."""
    result = subprocess.run([sys.executable, "-c", unshared(PROBE), layer], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout) == {
        "device": "Permission denied",
        "kill init": "Operation not permitted",
        "kill parent": "Operation not permitted",
        "chroot": "Operation not permitted",
        "setuid": "Operation not permitted",
        "passwd": "No such file or directory",
        "proc": "No such file or directory",
        "up": True,
        "network": "Network is unreachable",
        "interfaces": ["lo"],
        "raw socket": "Operation not permitted",
        "more files": "Too many open files",
    }
    assert {name: (n.kind, n.mode, n.uid) for name, n in snapshot(layer).items() if name} == {
        "node": ("char", 0o666, 5),
        "suid": ("file", 0o6755, worker._NOBODY_ELSE),
    }


def unshared(code: str) -> str:
    """The code in the namespaces that the worker's parent gives to its children."""
    return f"from crishim.host import libc\nlibc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWIPC)\n{code}"


# other unpackers


NAME = st.sampled_from(["a", "b", "c", "é", "n" * 120, "."])
PATHS = st.lists(NAME, min_size=1, max_size=4).map("/".join)
MAKERS = ("folder", "file", "symlink", "hard link", "fifo", "device")


@dataclass(frozen=True)
class Step:
    """One file of a random tree."""

    maker: str
    path: str
    other: str
    content: bytes
    mode: int
    owner: int
    mtime_ns: int
    xattr: bytes

    def make(self, root: Path) -> None:
        """Make it, unless something is in the way."""
        path = root / self.path
        try:
            self.create(path, root / self.other)
        except OSError:
            return
        if self.maker != "hard link":
            self.adorn(path)

    def create(self, path: Path, other: Path) -> None:
        """The file without its attributes."""
        match self.maker:
            case "folder":
                path.mkdir(parents=True)
            case "file":
                with path.open("xb") as opened:
                    opened.write(self.content)
            case "symlink":
                path.symlink_to(self.other)
            case "hard link":
                os.link(other, path, follow_symlinks=False)
            case "fifo":
                os.mkfifo(path)
            case "device":
                os.mknod(path, stat.S_IFCHR, os.makedev(1, self.mode % 256))

    def adorn(self, path: Path) -> None:
        """Owner, mode, attributes and time."""
        os.lchown(path, self.owner, self.owner // 3)
        if not path.is_symlink():
            path.chmod(self.mode)
        if self.xattr and (path.is_file() or path.is_dir()) and not path.is_symlink():
            os.setxattr(path, "user.x", self.xattr)
        if self.xattr and path.is_file() and not path.is_symlink():
            os.setxattr(path, "security.capability", CAPABILITY)
        os.utime(path, ns=(0, self.mtime_ns), follow_symlinks=False)


STEPS = st.builds(
    Step,
    maker=st.sampled_from(MAKERS),
    path=PATHS,
    other=PATHS,
    content=st.binary(max_size=1200),
    mode=st.integers(0, 0o7777),
    owner=st.sampled_from([0, 1000, 70_000, 3_000_000_000]),
    mtime_ns=st.integers(-(2**30) * 10**9, 2**33 * 10**9),
    xattr=st.binary(max_size=20),
)


def plain(tree: dict[str, Node], format_: str) -> dict[str, Node]:
    """What GNU tar packs of it: no links to pipes and devices; attributes and parts of seconds only in pax."""
    said = {name: replace(n, names=()) if n.kind in ("fifo", "char") else n for name, n in tree.items()}
    if format_ == "posix":
        return said
    return {name: replace(n, xattrs=(), mtime_ns=n.mtime_ns // 10**9 * 10**9) for name, n in said.items()}


@pytest.mark.parametrize("format_", ["posix", "gnu"])
@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=12))
def test_like_gnu_tar(
    format_: str, shared: UnpackWorkers, tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    """A random tree, packed by GNU tar, unpacked by it and by us: the same in everything."""
    top = tmp_path_factory.mktemp("tree")
    source, theirs, ours = (top / name for name in ("source", "theirs", "ours"))
    for path in (source, theirs, ours):
        path.mkdir()
    for step in steps:
        step.make(source)
    options = ["tar", f"--format={format_}", "--numeric-owner", "-C"]
    more = ["--xattrs", "--xattrs-include=*"] if format_ == "posix" else []
    packed = subprocess.run([*options, source, *more, "-c", "."], capture_output=True, check=True).stdout
    subprocess.run([*options, theirs, *more, "-xp", "--same-owner"], input=packed, check=True, capture_output=True)
    report = asyncio.run(shared.unpack(ours, writing(gzipped(packed))))
    assert snapshot(ours) == snapshot(theirs)
    assert plain(snapshot(ours), format_) == plain(snapshot(source), format_)
    assert (report.opaque, report.implicit) == ([], [])
    shutil.rmtree(top)


LIKE_UMOCI: dict[str, bytes] = {
    "every kind": archive(
        folder("d", 0o2755, uid=1, gid=2, mtime=5),
        file("d/f", b"x", 0o4755, uid=3, mtime=7),
        hard_link("d/g", "d/f"),
        symlink("s", "d", uid=4, mtime=8),
        fifo("p", mode=0o600, mtime=9),
        char("c", 1, 3, mode=0o666, mtime=10),
        file("cap", b"y", mtime=11, pax={"SCHILY.xattr.security.capability": CAPABILITY, "SCHILY.xattr.user.x": "1"}),
    ),
    "through links": archive(
        folder("d"),
        symlink("s", "/d"),
        file("s/f", b"1"),
        symlink("u", "../../d"),
        file("u/g", b"2"),
        hard_link("h", "s/f"),
    ),
    "duplicates": archive(
        file("a", b"1", mtime=1),
        file("a", b"22", 0o600, mtime=2),
        folder("d", mtime=3),
        file("d/x", mtime=4),
        folder("d", 0o700, uid=5, mtime=6),
    ),
    "replaced": archive(
        folder("d"),
        file("d/x"),
        file("d", b"1"),
        file("e", b"1"),
        folder("e"),
        file("e/x", b"2"),
        folder("l"),
        symlink("l", "e"),
    ),
    "absolute": archive(folder("/a"), file("/a/x", b"1"), hard_link("/y", "/a/x"), symlink("/z", "/a/x")),
    "whiteouts of this layer": archive(
        folder("d"), file("d/f", b"1"), whiteout("d/other"), opaque("d"), file("d/g", b"2")
    ),
}


@pytest.mark.skipif(shutil.which("umoci") is None, reason="needs umoci")
@pytest.mark.parametrize("name", LIKE_UMOCI)
async def test_like_umoci(name: str, shared: UnpackWorkers, layer: Path, tmp_path: Path) -> None:
    """The same tree as the OCI's own unpacker writes, but for the times of folders that it does not keep."""
    (tmp_path / "layer.tar").write_bytes(LIKE_UMOCI[name])
    theirs = tmp_path / "theirs"
    for arguments in (
        ["init", "--layout", "image"],
        ["new", "--image", "image:x"],
        ["raw", "add-layer", "--image", "image:x", "layer.tar"],
        ["raw", "unpack", "--image", "image:x", theirs],
    ):
        subprocess.run(["umoci", *arguments], cwd=tmp_path, check=True, capture_output=True)
    await shared.unpack(layer, writing(LIKE_UMOCI[name]))

    def comparable(root: Path) -> dict[str, Node]:
        tree = {name: n for name, n in snapshot(root).items() if name and n.detail != "0,0"}
        return {name: replace(n, mtime_ns=0) if n.kind == "dir" else n for name, n in tree.items()}

    assert comparable(layer) == comparable(theirs)
