"""What happens to a container after it was created: start, end, stop, removal, and recovery of all that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time

import msgspec

from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import CrishimError, DeadlineExceeded, FailedPrecondition
from crishim.host.files import remove_tree
from crishim.host.mounts import unmount
from crishim.host.pidfd import ProcessHandle
from crishim.host.threads import in_thread
from crishim.model.records import ContainerRecord, ContainerState, container_name
from crishim.observe.timeline import step
from crishim.runtimes.exits import Exit, wait_exit
from crishim.state.events import Event, EventKind

_log = logging.getLogger(__name__)

START_FAILED_CODE = 128
_KILL_SECONDS = 30.0
"""How long a container may take to disappear after SIGKILL before the caller is told."""
_RECORD_AGAIN_SECONDS = 2.0


async def start(room: Room, container: Container) -> None:
    """Run a created container; a failure is recorded with exit code 128 and its reason."""
    async with container.lock:
        if container.record.state is not ContainerState.CREATED:
            raise FailedPrecondition(
                f"container {container.record.id} is {container.record.state.value}, only a created one can be started"
            )
        runtime = room.handlers.get(container.record.handler)
        with container.timeline.recording():
            try:
                await runtime.start(container.record.id)
            except CrishimError as err:
                await _start_failed(room, container, err)
                raise
        running = msgspec.structs.replace(
            container.record,
            state=ContainerState.RUNNING,
            started_at=max(time.time_ns(), container.record.created_at),
        )
        await room.store.save_container(running)
        container.record = running
    tell(room, EventKind.STARTED, container.record)


def tell(room: Room, kind: EventKind, record: ContainerRecord) -> None:
    """Report a turn of a container's life that is on record."""
    room.events.tell(Event(kind, record.id, record.sandbox_id, time.time_ns()))


async def _start_failed(room: Room, container: Container, err: CrishimError) -> None:
    now = max(time.time_ns(), container.record.created_at)
    failed = msgspec.structs.replace(
        container.record,
        state=ContainerState.EXITED,
        started_at=now,
        finished_at=now,
        exit_code=START_FAILED_CODE,
        reason="StartError",
        message=err.message,
    )
    await room.store.save_container(failed)
    container.record = failed
    tell(room, EventKind.STOPPED, failed)
    container.send(signal.SIGKILL)


def watch(room: Room, container: Container) -> asyncio.Task[None]:
    """Wait for the end of the container in a task of its own, and record it."""
    record = container.record
    container.handle = ProcessHandle.open(record.process.pid, record.process.started) if record.process else None
    monitor = ProcessHandle.open(record.monitor.pid, record.monitor.started) if record.monitor else None
    exit_file = room.paths.exits / record.id

    async def body() -> None:
        ended = await wait_exit(container.handle, monitor, exit_file)
        while True:
            try:
                await _on_exit(room, container, ended)
                return
            except CrishimError:
                _log.exception("cannot record the exit of container %s, trying again", record.id)
                await asyncio.sleep(_RECORD_AGAIN_SECONDS)

    return asyncio.create_task(body(), name=f"watch {record.id}")


async def _on_exit(room: Room, container: Container, ended: Exit) -> None:
    """The exit is durable before anybody is told of it; then what the container held is given back."""
    async with container.lock:
        record = container.record
        if record.state in (ContainerState.CREATED, ContainerState.RUNNING):
            oom = room.cgroups.oom_kills(record.cgroup) > 0
            record = exited(record, ended, oom=oom)
            await room.store.save_container(record)
            container.record = record
            tell(room, EventKind.STOPPED, record)
        if container.kill_timer is not None:
            container.kill_timer.cancel()
        container.exited.set()
    if container.record.state is ContainerState.EXITED:
        with contextlib.suppress(CrishimError):
            await release(room, record)


def exited(record: ContainerRecord, ended: Exit, *, oom: bool) -> ContainerRecord:
    """``record`` after its end."""
    reason, message = "Error", ""
    if ended.code == 0:
        reason = "Completed"
    elif oom:
        reason = "OOMKilled"
    elif not ended.known:
        message = "the exit code is unknown: the monitor of the container is gone"
    return msgspec.structs.replace(
        record,
        state=ContainerState.EXITED,
        finished_at=max(ended.finished_at, record.started_at, record.created_at),
        exit_code=ended.code,
        reason=reason,
        message=message,
    )


async def release(room: Room, record: ContainerRecord) -> None:
    """Give back what only a living container needs: the OCI runtime's state, the cgroup, the root mount."""
    failure: CrishimError | None = None
    try:
        await room.handlers.get(record.handler).delete(record.id)
    except CrishimError as err:
        _log.warning("container %s: %s", record.id[:13], err)
        failure = err
    with step("unmount root"):
        await in_thread(lambda: _release_files(room, record))
    if failure is not None:
        raise failure


def _release_files(room: Room, record: ContainerRecord) -> None:
    unmount(room.paths.bundle(record.id) / "rootfs")
    if record.cgroup:
        room.cgroups.remove(room.cgroups.relative_path(record.cgroup))


async def tear_down(room: Room, record: ContainerRecord) -> None:
    """Remove everything that is the container's but its row and its log; repeating it is harmless."""
    await release(room, record)
    await in_thread(lambda: _remove_files(room, record))


def _remove_files(room: Room, record: ContainerRecord) -> None:
    for path in (
        room.paths.bundle(record.id),
        room.paths.writable / record.id,
        room.paths.exits / record.id,
        room.paths.attach / record.id,
    ):
        remove_tree(path)


async def stop(room: Room, container: Container, timeout: float) -> None:
    """End the container: its stop signal, then SIGKILL after ``timeout`` seconds.

    A later call with an earlier deadline wins. The operation goes on when its caller leaves.
    """
    if container.record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
        return
    if timeout > 0:
        _arm(room, container, timeout)
    else:
        kill(room, container)
    key = ("stop", container.record.id)
    await room.operations.join(key, lambda: _stop(room, container))


def _arm(room: Room, container: Container, timeout: float) -> None:
    """Kill the container after ``timeout`` seconds, unless it is to be killed earlier already."""
    loop = asyncio.get_running_loop()
    due = loop.time() + timeout
    if container.kill_timer is not None and not container.kill_timer.cancelled():
        if container.kill_timer.when() <= due:
            return
        container.kill_timer.cancel()
    container.kill_timer = loop.call_at(due, kill, room, container)


def kill(room: Room, container: Container) -> None:
    """SIGKILL to the first process, and to the others where that does not end them."""
    container.killed = True
    container.send(signal.SIGKILL)
    for pid in room.cgroups.processes(container.record.cgroup):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _stop(room: Room, container: Container) -> None:
    if container.record.state is ContainerState.CREATED:
        kill(room, container)  # its process cannot handle a signal yet
    if not container.killed:
        container.send(container.record.stop_signal)
    while not container.exited.is_set():
        timer = container.kill_timer
        left = (timer.when() if timer else 0) - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, left) + _KILL_SECONDS):
                await container.exited.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"container {container.record.id} has not ended {_KILL_SECONDS:g} s after SIGKILL"
            ) from None


async def remove(room: Room, container: Container) -> None:
    """Remove the container, killing it if it runs; its log stays, it is the kubelet's."""
    await room.operations.join(("remove", container.record.id), lambda: _remove(room, container))


async def _remove(room: Room, container: Container) -> None:
    await stop(room, container, 0.0)
    if container.watcher is not None:
        await asyncio.wait([container.watcher])
    async with container.lock:
        removing = msgspec.structs.replace(container.record, state=ContainerState.REMOVING)
        await room.store.save_container(removing)
        container.record = removing
        await tear_down(room, removing)
        await room.store.drop_container(removing.id)
        room.table.drop(removing.id)
        room.undelivered.pop(container_name(removing.sandbox_id, removing.config), None)
    tell(room, EventKind.DELETED, container.record)


async def recover(room: Room, record: ContainerRecord) -> None:
    """Take up a container that an earlier daemon left in the database."""
    container = Container(record)
    room.table.add(container)
    if record.state in (ContainerState.CREATING, ContainerState.REMOVING):
        room.operations.spawn(("remove", record.id), lambda: discard(room, container))
        return
    if record.state is ContainerState.EXITED:
        container.exited.set()
        if (room.paths.runtime_root(record.handler) / record.id).exists():
            room.operations.spawn(("release", record.id), lambda: release(room, record))
        return
    if record.boot_id != room.facts.boot_id:
        ended = Exit(255, time.time_ns(), known=False)
        container.record = msgspec.structs.replace(
            exited(record, ended, oom=False), reason="Unknown", message="the node was restarted"
        )
        container.exited.set()
        await room.store.save_container(container.record)
        return
    if record.state is ContainerState.CREATED and _was_started(room, record):
        container.record = msgspec.structs.replace(record, state=ContainerState.RUNNING, started_at=time.time_ns())
        await room.store.save_container(container.record)
    container.watcher = watch(room, container)


def _was_started(room: Room, record: ContainerRecord) -> bool:
    """Whether the earlier daemon died between starting the container and recording it.

    runc and crun remove ``exec.fifo`` from the container's state when it is started.
    """
    state = room.paths.runtime_root(record.handler) / record.id
    return state.is_dir() and not (state / "exec.fifo").exists()


async def discard(room: Room, container: Container) -> None:
    """Finish what an earlier daemon began: the removal of a container, or one whose creation it left half-done."""
    await _kill_monitor(container.record)
    await tear_down(room, container.record)
    await room.store.drop_container(container.record.id)
    room.table.drop(container.record.id)


async def _kill_monitor(record: ContainerRecord) -> None:
    monitor = ProcessHandle.open(record.monitor.pid, record.monitor.started) if record.monitor else None
    if monitor is not None:
        monitor.send(signal.SIGKILL)
        await monitor.wait()
        monitor.close()
