"""What happens to a sandbox after it was made: stop, removal, the end of its holder, recovery."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Coroutine
from functools import partial

import msgspec

from crishim.containers import lifecycle as containers
from crishim.errors import CrishimError
from crishim.host import namespaces
from crishim.host.files import remove_tree
from crishim.host.mounts import unmount
from crishim.host.pidfd import ProcessHandle
from crishim.host.threads import in_thread
from crishim.model.records import (
    ContainerState,
    NetworkRecord,
    SandboxRecord,
    SandboxState,
    sandbox_name,
)
from crishim.observe.timeline import step
from crishim.pods import network
from crishim.pods.room import Room
from crishim.pods.table import Sandbox
from crishim.state.events import Event, EventKind

_log = logging.getLogger(__name__)

STOP_CONTAINER_SECONDS = 0.0
"""Grace for containers that still run when their pod is stopped: the CRI wants them forcibly ended."""

_DETACH_DELAYS = (1.0, 5.0, 30.0)
_DETACH_ATTEMPTS = 3
_LINGER_SECONDS = 60.0


async def stop(room: Room, sandbox: Sandbox) -> None:
    """Stop the sandbox and its containers; one that is stopped is fine."""
    await room.containers.operations.join(("stop pod", sandbox.record.id), lambda: _stop(room, sandbox))


async def _stop(room: Room, sandbox: Sandbox) -> None:
    with sandbox.timeline.recording():
        async with sandbox.lock:
            if sandbox.record.state is SandboxState.READY:
                await _save(room, sandbox, msgspec.structs.replace(sandbox.record, state=SandboxState.NOTREADY))
                tell(room, EventKind.STOPPED, sandbox.record.id)
            # the containers get SIGKILL at once, so their network need not wait for them
            await _all(_stop_containers(room, sandbox), _detach(room, sandbox))
            await in_thread(lambda: _release_files(room, sandbox.record))


async def _stop_containers(room: Room, sandbox: Sandbox) -> None:
    for container in room.containers.table.of_sandbox(sandbox.record.id):
        if container.record.state is ContainerState.CREATING:
            await room.containers.operations.finished(container.made_by, cancel=True)
    running = room.containers.table.of_sandbox(sandbox.record.id)
    await _all(*(containers.stop(room.containers, container, STOP_CONTAINER_SECONDS) for container in running))


async def _all(*works: Coroutine[None, None, None]) -> None:
    """All at once; every one is tried to its end, then the first failure is raised."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def _detach(room: Room, sandbox: Sandbox) -> None:
    """Give back the network. One that does not let go stays on record; it stops nobody for ever.

    The first failures are the caller's, who will try again; then the pod goes on without its network's
    consent, which is sought behind the scenes (containerd#8774 is what happens otherwise).
    """
    record = sandbox.record
    if record.network is None or not record.network.config:
        return
    try:
        with step("pod network"):
            await network.detach(room.networks, room.containers.paths, record)
    except CrishimError as err:
        failed = msgspec.structs.replace(record.network, failures=record.network.failures + 1)
        await _save(room, sandbox, msgspec.structs.replace(record, network=failed))
        if failed.failures < _DETACH_ATTEMPTS:
            raise
        _log.error("pod sandbox %s goes on without its network's release: %s", record.id, err)
        return
    await _save(room, sandbox, msgspec.structs.replace(record, network=_released(record.network)))


def _released(used: NetworkRecord) -> NetworkRecord:
    return msgspec.structs.replace(used, config="", result="")


async def _save(room: Room, sandbox: Sandbox, record: SandboxRecord) -> None:
    await room.containers.store.save_sandbox(record)
    sandbox.record = record


def _release_files(room: Room, record: SandboxRecord) -> None:
    """Blocking: the holder, namespaces, shared memory. Containers hold what they still use."""
    paths = room.containers.paths
    _kill_holder(record)
    namespaces.remove(paths.namespaces(record.id))
    unmount(paths.shm(record.id))


def _kill_holder(record: SandboxRecord) -> None:
    holder = ProcessHandle.open(record.holder.pid, record.holder.started) if record.holder else None
    if holder is not None:
        holder.send(signal.SIGKILL)
        holder.close()


async def tear_down(room: Room, record: SandboxRecord) -> None:
    """Remove everything that is the sandbox's but its row; repeating it is harmless."""
    failure: CrishimError | None = None
    try:
        if record.network is not None and record.network.config:
            await network.detach(room.networks, room.containers.paths, record)
    except CrishimError as err:
        failure = err
    await in_thread(lambda: _remove_files(room, record))
    if failure is not None:
        raise failure


async def detach_later(room: Room, record: SandboxRecord) -> None:
    """Try a failed DEL of a sandbox that is gone again, a few times: its daemon may come back."""
    for delay in _DETACH_DELAYS:
        await asyncio.sleep(delay)
        try:
            await network.detach(room.networks, room.containers.paths, record)
            return
        except CrishimError as err:
            _log.warning("the network of the failed pod sandbox %s is not released: %s", record.id, err)


def _remove_files(room: Room, record: SandboxRecord) -> None:
    _release_files(room, record)
    remove_tree(room.containers.paths.sandbox(record.id))
    cgroups = room.containers.cgroups
    if record.cgroup_parent == cgroups.default_parent(record.id) and not cgroups.systemd:
        cgroups.remove(record.cgroup_parent)


async def remove(room: Room, sandbox: Sandbox) -> None:
    """Remove the sandbox with all its containers, stopping what runs."""
    await room.containers.operations.join(("remove pod", sandbox.record.id), lambda: _remove(room, sandbox))


async def _remove(room: Room, sandbox: Sandbox) -> None:
    await stop(room, sandbox)
    left = room.containers.table.of_sandbox(sandbox.record.id)
    await _all(*(containers.remove(room.containers, container) for container in left))
    async with sandbox.lock:
        if sandbox.record.network is not None and sandbox.record.network.config:
            await _linger(room, sandbox)
        else:
            await _save(room, sandbox, msgspec.structs.replace(sandbox.record, state=SandboxState.REMOVING))
            await tear_down(room, sandbox.record)
            await room.containers.store.drop_sandbox(sandbox.record.id)
            room.table.drop(sandbox.record.id)
        room.undelivered.pop(sandbox_name(sandbox.record.config), None)
    tell(room, EventKind.DELETED, sandbox.record.id)


async def _linger(room: Room, sandbox: Sandbox) -> None:
    """Remove all but the network, which has refused often enough; go on asking it until it lets go."""
    record = msgspec.structs.replace(sandbox.record, state=SandboxState.LINGERING)
    await room.containers.store.linger_sandbox(record)
    sandbox.record = record
    with contextlib.suppress(CrishimError, OSError):
        await in_thread(lambda: _remove_files(room, record))
    room.containers.operations.spawn(("detach", record.id), lambda: _outlast(room, record), patient=True)


async def _outlast(room: Room, record: SandboxRecord) -> None:
    """Ask at once, then ever less often."""
    for delay in itertools.chain((0.0,), _DETACH_DELAYS, itertools.repeat(_LINGER_SECONDS)):
        await asyncio.sleep(delay)
        try:
            await tear_down(room, record)
        except (CrishimError, OSError) as err:
            _log.warning("the network of the removed pod sandbox %s is not released: %s", record.id, err)
            continue
        await room.containers.store.drop_sandbox(record.id)
        room.table.drop(record.id)
        return


def tell(room: Room, kind: EventKind, sandbox_id: str) -> None:
    """Report a turn of a sandbox's life: in the CRI's events a sandbox is a container with its own ID."""
    room.containers.events.tell(Event(kind, sandbox_id, sandbox_id, time.time_ns()))


def watch(room: Room, sandbox: Sandbox) -> None:
    """A sandbox whose PID namespace dies is not ready any more."""
    holder = sandbox.record.holder
    if holder is None:
        return
    handle = ProcessHandle.open(holder.pid, holder.started)

    async def body() -> None:
        if handle is not None:
            try:
                await handle.wait()
            finally:
                handle.reap()
                handle.close()
        async with sandbox.lock:
            if sandbox.record.state is SandboxState.READY:
                _log.warning("pod sandbox %s has lost its PID namespace", sandbox.record.id)
                await _save(room, sandbox, msgspec.structs.replace(sandbox.record, state=SandboxState.NOTREADY))
                tell(room, EventKind.STOPPED, sandbox.record.id)

    sandbox.watcher = asyncio.create_task(body(), name=f"watch {sandbox.record.id}")


async def recover(room: Room, record: SandboxRecord) -> None:
    """Take up a sandbox that an earlier daemon left in the database."""
    sandbox = Sandbox(record)
    room.table.add(sandbox)
    if record.state in (SandboxState.CREATING, SandboxState.REMOVING):
        room.containers.operations.spawn(("remove pod", record.id), lambda: _finish_removal(room, sandbox))
    elif record.state is SandboxState.LINGERING:
        room.containers.operations.spawn(("detach", record.id), lambda: _outlast(room, record), patient=True)
    elif record.state is SandboxState.READY:
        if record.boot_id != room.containers.facts.boot_id or not _is_whole(room, record):
            await _save(room, sandbox, msgspec.structs.replace(record, state=SandboxState.NOTREADY))
        else:
            watch(room, sandbox)


def _is_whole(room: Room, record: SandboxRecord) -> bool:
    return record.host_network or network.is_pinned(room.containers.paths.namespaces(record.id) / "net")


async def _finish_removal(room: Room, sandbox: Sandbox) -> None:
    for container in room.containers.table.of_sandbox(sandbox.record.id):
        await room.containers.operations.join(
            ("remove", container.record.id), partial(containers.discard, room.containers, container)
        )
    try:
        await tear_down(room, sandbox.record)
    except (CrishimError, OSError) as err:
        _log.warning("cannot finish the removal of pod sandbox %s: %s", sandbox.record.id, err)
        await _linger(room, sandbox)
        return
    await room.containers.store.drop_sandbox(sandbox.record.id)
    room.table.drop(sandbox.record.id)
