"""What the node has because of a daemon, so that a call that fails, or a test that ends, can be shown to leave nothing.

Other daemons may run on the same host: what is provably theirs does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
import subprocess
import time
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from .daemon import CGROUPS, Daemon, cgroups_named, processes

_PATIENCE_SECONDS = 3.0
_ELSEWHERE = ("/tmp/", "/dev/shm/", "/var/", "/run/")
_CHAIN = re.compile(r"CNI-(?:DN-)?[0-9a-f]{12,}")
_NETWORK = re.compile(r'name: \\"([^"\\]*)\\"')
_TABLES = {"sandboxes": "name", "containers": "name", "images": "id", "layers": "chain_id"}
_DEPTH = 3
_SHARED = ("cgroup ", "link ", "rule ")

Snapshot = Counter[str]
"""Things, each one a line that says what it is."""


def take(daemon: Daemon) -> Snapshot:
    """Look at the host; blocks."""
    found = Snapshot()
    for look in (_mounts, _links, _cgroups, _processes, _files, _rows, _addresses, _rules):
        found.update(look(daemon))
    return found


def assert_no_leaks(daemon: Daemon, before: Snapshot) -> None:
    """Nothing came and nothing went since ``before``; the kernel is given some time to clear away. Blocks."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while (changes := _changes(before, take(daemon))) and time.monotonic() < end:
        time.sleep(0.05)
    if changes:
        raise AssertionError("the node is not as it was:\n  " + "\n  ".join(changes))


def _changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What went may be others' as well, met just when they removed it."""
    came = [f"+ {thing}" for thing in sorted((after - before).elements())]
    return came + [f"- {thing}" for thing in sorted((before - after).elements()) if not thing.startswith(_SHARED)]


@contextlib.asynccontextmanager
async def unchanged(daemon: Daemon) -> AsyncIterator[None]:
    """The body leaves the node as it was."""
    before = await asyncio.to_thread(take, daemon)
    yield
    await asyncio.to_thread(assert_no_leaks, daemon, before)


def _mounts(daemon: Daemon) -> Iterator[str]:
    """As the daemon sees them, which may be in a mount namespace of its own."""
    source = Path(f"/proc/{daemon.pid if daemon.alive else 'self'}/mountinfo")
    for line in source.read_text().splitlines():
        fields = line.split(" ")
        point, kind = fields[4], fields[fields.index("-") + 1 :]
        ours = point.startswith(f"{daemon.base}/")
        if ours or not point.startswith(_ELSEWHERE):
            yield f"mount {point} {kind[0]} {kind[1]}"


def _links(daemon: Daemon) -> Iterator[str]:
    """Those of our bridge. One without a bridge may be anybody's, unless it is no pod's."""
    for link in Path("/sys/class/net").iterdir():
        bridge = (link / "master").resolve().name if (link / "master").exists() else ""
        if bridge == daemon.bridge or not (bridge or link.name.startswith("veth") or (link / "bridge").exists()):
            yield f"link {link.name}"


def _cgroups(daemon: Daemon) -> Iterator[str]:
    theirs = {f"crishim-{item}" for item in (*_foreign_pods(daemon), *_foreign_containers(daemon))}
    for path in cgroups_named("crishim"):
        with contextlib.suppress(FileNotFoundError):
            related = {*path.parts, *(child.name for child in path.iterdir() if child.is_dir())}
            if not related & theirs:
                yield f"cgroup {path.relative_to(CGROUPS)}"


def _foreign_pods(daemon: Daemon) -> Iterator[str]:
    """By the directories that other daemons have for them."""
    for pid, words in processes():
        if b"serve" in words and b"--config" in words[:-1]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                root = Path(f"/proc/{pid}/root")  # it may have a mount namespace of its own
                config = os.fsdecode(words[words.index(b"--config") + 1]).lstrip("/")
                state = tomllib.loads((root / config).read_text())["state"]
                if state != str(daemon.state):
                    yield from (path.name for path in (root / state.lstrip("/") / "sandboxes").iterdir())


def _foreign_containers(daemon: Daemon) -> Iterator[str]:
    for _, arguments in processes():
        if b"--exit-dir" in arguments and b"--cid" in arguments:
            if arguments[arguments.index(b"--exit-dir") + 1] != str(daemon.state / "exits").encode():
                yield arguments[arguments.index(b"--cid") + 1].decode()


def _processes(daemon: Daemon) -> Iterator[str]:
    """The daemon's descendants but for the unpack worker's parent, and all that name its directories."""
    parents = dict(_parents())
    for pid, arguments in processes():
        if daemon.process is not None and pid == daemon.pid:
            continue
        if arguments == [b""]:
            continue  # a zombie, or a thread of the kernel
        named = any(str(daemon.base).encode() in argument for argument in arguments)
        worker = b"crishim.layers.worker" in arguments and daemon.alive and parents.get(pid) == daemon.pid
        if named or daemon.owns_holder(pid, arguments) or (_descends(pid, daemon, parents) and not worker):
            yield f"process {pid} {b' '.join(arguments)[:300].decode(errors='replace')}"


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def _descends(pid: int, daemon: Daemon, parents: dict[int, int]) -> bool:
    while daemon.alive and pid > 1:
        pid = parents.get(pid, 0)
        if pid == daemon.pid:
            return True
    return False


def _files(daemon: Daemon) -> Iterator[str]:
    """Below root and state, but not what is in layers and writable layers, nor what every daemon has."""
    for top in (daemon.root, daemon.state):
        for path in _below(top, _DEPTH):
            name = re.sub("^root/layers/[0-9]+", "root/layers/N", str(path.relative_to(daemon.base)))
            if not name.startswith("root/crishim.") and not re.fullmatch(r"state/(holder|runtimes)(/[^/]*)?", name):
                yield f"file {name}"


def _below(top: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(top.iterdir())
    except OSError:
        return
    for path in entries:
        yield path
        if depth > 1 and not path.is_symlink() and path.name != "fs" and path.is_dir():
            yield from _below(path, depth - 1)


def _rows(daemon: Daemon) -> Iterator[str]:
    database = daemon.root / "crishim.db"
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for table, column in _TABLES.items():
            for (name,) in connection.execute(f"SELECT {column} FROM {table}"):
                yield f"row of {table}: {name}"


def _addresses(daemon: Daemon) -> Iterator[str]:
    for path in daemon.ipam.glob("*/*"):
        if path.name != "lock" and not path.name.startswith("last_reserved_ip"):
            yield f"address {path.name}"


def _rules(daemon: Daemon) -> Iterator[str]:
    """Those of single pods; the portmap plugin's own chains are made once and stay."""
    lines = subprocess.run(["iptables-save"], check=True, capture_output=True, text=True).stdout.splitlines()
    foreign = set[str]()
    for line in lines:
        network = _NETWORK.search(line)
        if network and network[1] != daemon.bridge:
            foreign |= set(_CHAIN.findall(line))
    for line in lines:
        chains = set(_CHAIN.findall(line))
        if chains and not chains & foreign:
            yield f"rule {line.partition(' [')[0]}"
