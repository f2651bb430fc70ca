"""What a daemon that died left behind and no record explains: processes for what was half made, directories.

Only what is provably ours is touched: conmon processes that write their exit file into our directory, holders
of PID namespaces whose root is ours, CNI plugins and OCI runtimes at work for us, and directories below ours.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from crishim.config.paths import Paths
from crishim.containers.room import Room
from crishim.host.files import remove_tree
from crishim.host.mounts import unmount_below
from crishim.model.records import ContainerRecord, ContainerState, SandboxRecord

_log = logging.getLogger(__name__)


def end(room: Room, records: list[ContainerRecord], sandboxes: list[SandboxRecord]) -> None:
    """Kill the processes that serve nothing that we keep; blocks."""
    for pid in _orphans(room.paths, sandboxes):
        _log.warning("ending stray process %d", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    kept = {record.id for record in records if record.state is not ContainerState.CREATING}
    for pid, container_id in _monitors(room.paths.exits):
        if container_id not in kept:
            _log.warning("ending stray conmon %d of container %s", pid, container_id[:13])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _orphans(paths: Paths, sandboxes: list[SandboxRecord]) -> Iterator[int]:
    """Holders that are on no record; plugins and OCI runtimes that would go on behind our back."""
    plugins = {f"CNI_CONTAINERID={record.id}".encode() for record in sandboxes}
    holders = {str(record.holder.pid) for record in sandboxes if record.holder}
    runtimes = os.fsencode(f"--root={paths.runtime_root('')}")
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not process.name.isdigit():
                continue
            words = (process / "cmdline").read_bytes().split(b"\0")
            stray_holder = words[:2] == [b"/init", b"-P"] and process.name not in holders
            if (
                (stray_holder and (process / "root").samefile(paths.state / "holder"))
                or any(word.startswith(runtimes) for word in words)
                or plugins & set((process / "environ").read_bytes().split(b"\0"))
            ):
                yield int(process.name)


def _monitors(exit_dir: Path) -> Iterator[tuple[int, str]]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        options = dict(itertools.pairwise(arguments))
        if os.fsdecode(options.get(b"--exit-dir", b"")) == str(exit_dir) and b"--cid" in options:
            yield int(process.name), os.fsdecode(options[b"--cid"])


def sweep(room: Room, containers: set[str], sandboxes: set[str]) -> None:
    """Remove directories that belong to no record; blocks."""
    paths = room.paths
    for folder, known in (
        (paths.containers, containers),
        (paths.writable, containers),
        (paths.exits, containers),
        (paths.attach, containers),
        (paths.sandboxes, sandboxes),
    ):
        for entry in folder.iterdir():
            if entry.name not in known:
                _log.warning("removing stray %s", entry)
                unmount_below(entry)
                remove_tree(entry)
