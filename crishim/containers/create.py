"""CreateContainer: from the request to a created container under conmon."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import msgspec

from crishim.containers import prepare
from crishim.containers.check import check
from crishim.containers.lifecycle import tear_down, tell, watch
from crishim.containers.prepare import Plan
from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import FailedPrecondition, NotFound
from crishim.host.files import write_atomically
from crishim.host.mounts import Overlay, mount
from crishim.host.pidfd import start_time
from crishim.host.threads import in_thread
from crishim.model import signals
from crishim.model.cri import ContainerConfig, LinuxContainerUser
from crishim.model.records import (
    ContainerRecord,
    ContainerState,
    ImageRecord,
    ProcessRecord,
    SandboxRecord,
    SandboxState,
    container_name,
)
from crishim.observe.timeline import step
from crishim.runtimes import conmon
from crishim.spec.generate import generate
from crishim.state.events import EventKind

_log = logging.getLogger(__name__)
CREATE_SECONDS = 240.0
OUTSIDE_SECONDS = 20.0
"""How long the file systems of the paths that a container names may take to answer."""


async def create(room: Room, pod: Callable[[], SandboxRecord], config: ContainerConfig) -> str:
    """Create the container; the result is its ID. On failure nothing of it stays.

    ``pod`` gives the sandbox as it is at the moment. The operation is the node's: a caller who comes back with
    the same configuration gets its result, as long as nobody has been told of it.
    """
    check(config, pod(), room.facts, room.handlers.get(pod().handler).features)
    name = container_name(pod().id, config)
    made = room.table.find(room.undelivered.get(name, ""))
    if made is None or made.record.state is not ContainerState.CREATED or made.record.config != config:
        key = ("create", name, msgspec.json.encode(config))
        container_id = await room.operations.join(key, lambda: _create(room, pod, config, key))
    else:
        container_id = made.record.id
    room.undelivered.pop(name, None)
    return container_id


async def _create(room: Room, pod: Callable[[], SandboxRecord], config: ContainerConfig, operation: Hashable) -> str:
    await _old_one_gone(room, pod().id, config)
    sandbox = pod()
    if sandbox.state is not SandboxState.READY:
        raise FailedPrecondition(f"pod sandbox {sandbox.id} is not ready")
    assert config.image is not None
    image = room.images.find(config.image.image)
    if image is None:
        raise NotFound(f"image {config.image.image!r} is not here: pull it first")
    record = _new_record(room, sandbox, config, image)
    container = Container(record, made_by=operation)
    # nothing was awaited since the looks at sandbox and image: from now on both know of the container
    room.table.add(container)
    try:
        await room.store.add_container(record)
        with container.timeline.recording():
            await _make(room, container, Plan(record, sandbox, image))
    except BaseException as err:
        await asyncio.shield(_undo(room, container, err))
        raise
    container.watcher = watch(room, container)
    room.undelivered[container_name(sandbox.id, config)] = record.id
    tell(room, EventKind.CREATED, container.record)
    return record.id


async def _old_one_gone(room: Room, sandbox_id: str, config: ContainerConfig) -> None:
    """A container of the same name that is being removed does not count, but it must be out of the way."""
    name = container_name(sandbox_id, config)
    for other in room.table.of_sandbox(sandbox_id):
        if container_name(sandbox_id, other.record.config) == name:
            await room.operations.finished(("remove", other.record.id))


def _new_record(room: Room, sandbox: SandboxRecord, config: ContainerConfig, image: ImageRecord) -> ContainerRecord:
    container_id = secrets.token_hex(32)
    return ContainerRecord(
        id=container_id,
        sandbox_id=sandbox.id,
        config=config,
        handler=sandbox.handler or room.handlers.default,  # which may be another one some day
        state=ContainerState.CREATING,
        created_at=time.time_ns(),
        boot_id=room.facts.boot_id,
        image_id=image.id,
        image_ref=image.repo_digests[0] if image.repo_digests else image.id,
        stop_signal=_stop_signal(config, image),
        user=LinuxContainerUser(),
        mounts=config.mounts,
        cgroup=room.cgroups.spec_path(sandbox.cgroup_parent, container_id),
    )


def _stop_signal(config: ContainerConfig, image: ImageRecord) -> int:
    """The container's own, else the image's, else SIGTERM."""
    if config.stop_signal:
        return signals.from_cri(config.stop_signal)
    return signals.parse(image.config.stop_signal) if image.config.stop_signal else int(signal.SIGTERM)


async def _make(room: Room, container: Container, plan: Plan) -> None:
    """Root file system, bundle, and the container itself."""
    with step("look at what the kubelet names"):
        outside = await in_thread(
            lambda: prepare.look_outside(room.facts, plan.record.config, log_path(plan.sandbox, plan.record.config)),
            what=f"a path that container {plan.record.id[:13]} asks for",
            timeout=OUTSIDE_SECONDS,
        )
    with step("prepare root and bundle"):
        user = await in_thread(lambda: _prepare(room, plan, outside))
    runtime = room.handlers.get(plan.sandbox.handler)
    monitor = conmon.Monitor(
        program=room.settings.conmon,
        container_id=plan.record.id,
        name=plan.record.config.metadata.name if plan.record.config.metadata else "",
        bundle=room.paths.bundle(plan.record.id),
        runtime=runtime.path,
        runtime_args=runtime.arguments,
        log_path=log_path(plan.sandbox, plan.record.config),
        exit_dir=room.paths.exits,
        attach_dir=room.paths.attach,
        terminal=plan.record.config.tty,
        stdin=plan.record.config.stdin,
        stdin_once=plan.record.config.stdin_once,
        systemd_cgroup=room.cgroups.systemd,
        log_size_max=room.settings.log_size_max,
    )
    with step(f"conmon and {runtime.name} create"):
        created = await conmon.create(monitor, CREATE_SECONDS)
    record = msgspec.structs.replace(
        plan.record,
        state=ContainerState.CREATED,
        created_at=time.time_ns(),
        user=user,
        process=ProcessRecord(created.pid, start_time(created.pid)),
        monitor=ProcessRecord(created.monitor_pid, start_time(created.monitor_pid)),
    )
    await room.store.save_container(record)
    container.record = record


def _prepare(room: Room, plan: Plan, outside: prepare.Outside) -> LinuxContainerUser:
    """Blocking part of :func:`_make`."""
    bundle = room.paths.bundle(plan.record.id)
    writable = room.paths.writable / plan.record.id
    for folder in (bundle / "rootfs", writable / "upper", writable / "work"):
        folder.mkdir(parents=True, mode=0o711)
    (writable / "upper").chmod(0o755)
    lower = room.layers.lower_dirs(plan.image.layers)
    if not lower:
        (writable / "empty").mkdir()
        lower = (str(writable / "empty"),)
    mount(Overlay(room.layers.directory, lower, bundle / "rootfs", writable / "upper", writable / "work"))
    who = prepare.identity(plan.record.config, plan.image, bundle / "rootfs")
    generated = generate(prepare.inputs(room, plan, who, outside))
    for remark in generated.remarks:
        _log.warning("container %s: left out: %s", plan.record.id[:13], remark)
    write_atomically(bundle / "config.json", generated.spec.encode())
    return who.user


def log_path(sandbox: SandboxRecord, config: ContainerConfig) -> Path | None:
    """Where the container's log is; None if the kubelet does not want one."""
    if not sandbox.config.log_directory or not config.log_path:
        return None
    return Path(sandbox.config.log_directory, config.log_path)


async def _undo(room: Room, container: Container, err: BaseException) -> None:
    try:
        await tear_down(room, container.record)
        await room.store.drop_container(container.record.id)
        room.table.drop(container.record.id)
    except Exception as failure:
        _log.exception("cannot clean up after container %s", container.record.id)
        err.add_note(f"cleaning up failed too: {failure}")
