"""Takes the demo's place away again, whatever state it is in; finds what a daemon should have removed itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from crishim.cli.showcase.place import Place, remove_links
from crishim.errors import CrishimError, HostFailure
from crishim.host import process
from crishim.host.files import remove_tree
from crishim.host.mounts import mounts_below, unmount_below
from crishim.host.pidfd import start_time

_SECONDS = 5.0
_PAUSE = 0.02


async def settled(place: Place) -> list[str]:
    """What is there of a pod that was removed, after a moment for what the kernel and systemd do in their own time."""
    with contextlib.suppress(TimeoutError):
        await _until(lambda: not leftovers(place))
    return leftovers(place)


def leftovers(place: Place) -> list[str]:
    """What is there of a pod: nothing should be, once the pod is removed and the daemon has ended."""
    found = [f"process {pid} ({_name(pid)})" for pid in _alive(os.getpid())]
    found += [f"mount {path}" for path in (*mounts_below(place.state), *mounts_below(place.root))]
    found += [f"interface {name}" for name in _ports(place)]
    found += [f"cgroup {path}" for path in _cgroups(place) if path.name != place.cgroup_directory]
    found += [f"file {path}" for path in _files(place)]
    return found


async def clean(place: Place) -> list[str]:
    """Remove everything that is the demo's; every step is tried. The result says what could not be removed."""
    failures = []
    steps: tuple[Callable[[], Awaitable[None]], ...] = (
        _kill,
        lambda: asyncio.to_thread(unmount_below, place.state),
        lambda: asyncio.to_thread(unmount_below, place.root),
        lambda: remove_links(_ports(place)),
        lambda: remove_links([place.bridge]),
        lambda: _remove_cgroups(place),
        lambda: asyncio.to_thread(remove_tree, place.state),
        lambda: asyncio.to_thread(remove_tree, place.root),
    )
    for step in steps:
        try:
            await step()
        except CrishimError as err:
            failures.append(err.message)
        except OSError as err:  # TimeoutError is one too
            failures.append(f"{err.filename or step}: {(err.strerror or str(err)).lower()}")
    return failures


async def _until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(_SECONDS):
        while True:
            if done():
                return
            await asyncio.sleep(_PAUSE)


async def _kill() -> None:
    """Kill all that we or the daemon started: orphans are our children, since we are their subreaper."""

    def gone() -> bool:
        found = list(_alive(os.getpid()))
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        return not found

    try:
        await _until(gone)
    except TimeoutError:
        raise HostFailure(f"processes {', '.join(map(str, _alive(os.getpid())))} do not die") from None


def _reap() -> None:
    """Zombies too hold a PID namespace, whose init does not end before they are gone: pid_namespaces(7)."""
    with contextlib.suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


def _alive(parent: int) -> Iterator[int]:
    """The descendants of a process that are not zombies."""
    children: list[str] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            children += (task / "children").read_text().split()
    for child in map(int, children):
        if start_time(child):
            yield child
        yield from _alive(child)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"


def _cgroups(place: Place) -> Iterator[Path]:
    for base in place.cgroups.hierarchies():
        for folder, _, _ in os.walk(base / place.cgroup_directory):
            yield Path(folder)


async def _remove_cgroups(place: Place) -> None:
    """A cgroup can be removed a moment after its last process has died."""
    if place.cgroups.systemd:
        await process.run(process.Command(["systemctl", "stop", place.cgroup], timeout=_SECONDS))

    def gone() -> bool:
        place.cgroups.remove(place.cgroup_directory)
        return not list(_cgroups(place))

    try:
        await _until(gone)
    except TimeoutError:
        raise HostFailure(f"cgroup {place.cgroup} cannot be removed") from None


def _ports(place: Place) -> list[str]:
    """The interfaces that are attached to the demo's bridge."""
    folder = Path("/sys/class/net", place.bridge, "brif")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _files(place: Place) -> Iterator[Path]:
    """What the daemon keeps for each pod and container."""
    volatile = [place.state / name for name in ("sandboxes", "containers", "exits", "attach")]
    for folder in (*volatile, place.root / "root" / "containers"):
        yield from folder.iterdir() if folder.is_dir() else ()
