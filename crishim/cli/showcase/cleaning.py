"""Takes the demo's place away again, whatever state it is in; finds what a daemon should have removed itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from crishim.cli.showcase.place import Place, remove_links
from crishim.errors import CrishimError
from crishim.host import process
from crishim.host.files import remove_tree
from crishim.host.mounts import mounts_below, unmount_below
from crishim.host.pidfd import start_time

_DEATH_SECONDS = 5.0


def leftovers(place: Place) -> list[str]:
    """What is there of a pod: nothing should be, once the pod is removed."""
    found = [f"process {pid} ({name})" for pid, name in _processes(place)]
    found += [f"mount {path}" for path in (*mounts_below(place.state), *mounts_below(place.root))]
    found += [f"interface {name}" for name in _ports(place)]
    own = place.cgroup_directory
    found += [f"cgroup {path}" for path in _cgroups(place) if path.name != own]
    found += [f"file {path}" for path in _files(place)]
    return found


async def clean(place: Place) -> list[str]:
    """Remove everything that is the demo's; every step is tried. The result says what could not be removed."""
    failures = []
    steps: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: _kill(place),
        lambda: asyncio.to_thread(unmount_below, place.state),
        lambda: asyncio.to_thread(unmount_below, place.root),
        lambda: remove_links([*_ports(place), place.bridge]),
        lambda: _remove_cgroups(place),
        lambda: asyncio.to_thread(remove_tree, place.state),
        lambda: asyncio.to_thread(remove_tree, place.root),
    )
    for step in steps:
        try:
            await step()
        except CrishimError as err:
            failures.append(err.message)
        except OSError as err:
            failures.append(f"{err.filename or place.token}: {(err.strerror or str(err)).lower()}")
    return failures


async def _kill(place: Place) -> None:
    """Kill the pod's processes and those that work for it, and wait until they are gone."""
    async with asyncio.timeout(_DEATH_SECONDS):
        while found := list(_processes(place)):
            for pid, _ in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)


def _processes(place: Place) -> Iterator[tuple[int, str]]:
    """Those in the pod's cgroup, and those whose command line names the demo's own directories."""
    inside = {int(pid) for path in _cgroups(place) for pid in _read(path / "cgroup.procs").split()}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        pid, command = int(folder.name), _read(folder / "cmdline")
        ours = any(f"{path}/" in command for path in (place.state, place.root))
        if (ours or pid in inside) and start_time(pid):
            yield pid, _read(folder / "comm").strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _cgroups(place: Place) -> Iterator[Path]:
    for base in place.cgroups.hierarchies():
        for folder, _, _ in os.walk(base / place.cgroup_directory):
            yield Path(folder)


async def _remove_cgroups(place: Place) -> None:
    if place.cgroups.systemd:
        await process.run(process.Command(["systemctl", "stop", place.cgroup], timeout=10))
    place.cgroups.remove(place.cgroup_directory)


def _ports(place: Place) -> list[str]:
    """The interfaces that are attached to the demo's bridge."""
    folder = Path("/sys/class/net", place.bridge, "brif")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _files(place: Place) -> Iterator[Path]:
    """What the daemon keeps for each pod and container."""
    for folder in (
        place.state / "sandboxes",
        place.state / "containers",
        place.state / "exits",
        place.state / "attach",
        place.root / "root" / "containers",
    ):
        yield from folder.iterdir() if folder.is_dir() else ()
