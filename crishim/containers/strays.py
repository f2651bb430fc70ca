"""What a daemon that died left behind and no record explains: monitors of containers half made, directories.

Only what is provably ours is touched: conmon processes that write their exit file into our directory, and
directories below ours.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from crishim.containers.room import Room
from crishim.host.files import remove_tree
from crishim.host.mounts import unmount_below
from crishim.model.records import ContainerRecord, ContainerState

_log = logging.getLogger(__name__)


def end(room: Room, records: list[ContainerRecord]) -> None:
    """Kill the monitors that serve no container that we keep; blocks."""
    kept = {record.id for record in records if record.state is not ContainerState.CREATING}
    for pid, container_id in _monitors(room.paths.exits):
        if container_id not in kept:
            _log.warning("ending stray conmon %d of container %s", pid, container_id[:13])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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
