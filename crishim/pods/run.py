"""RunPodSandbox: namespaces, network and the shared files of a pod. No process, unless PIDs are shared."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from pathlib import Path

import msgspec

from crishim.errors import AlreadyExists, CrishimError, HostFailure
from crishim.host.holder import Holder
from crishim.host.mounts import Tmpfs, mount
from crishim.host.namespaces import NamespaceKind, NamespaceSet, create
from crishim.host.pidfd import start_time
from crishim.host.threads import in_thread
from crishim.model.cri import NamespaceMode, PodSandboxConfig
from crishim.model.records import ProcessRecord, SandboxRecord, SandboxState, sandbox_name
from crishim.observe.timeline import step
from crishim.pods import files, network
from crishim.pods.check import check
from crishim.pods.lifecycle import detach_later, tear_down, tell, watch
from crishim.pods.room import Room
from crishim.pods.table import Sandbox
from crishim.state.events import EventKind

_log = logging.getLogger(__name__)

LOG_DIRECTORY_SECONDS = 20.0
"""How long the log directory's file system may take to answer."""

SHM_BYTES = 64 << 20
"""Size of a pod's /dev/shm: what Docker and both peers give."""


async def run(room: Room, config: PodSandboxConfig, handler: str) -> str:
    """Make the sandbox; the result is its ID.

    The operation is the node's: a caller who leaves does not stop it, one who comes back with the same
    metadata gets its result. A sandbox that somebody has been told of is a duplicate.
    """
    check(config, room.containers.facts)
    room.containers.handlers.get(handler)
    name = sandbox_name(config)
    made = room.table.find(room.undelivered.get(name, ""))
    if made is None or made.record.state is not SandboxState.READY or not _same(made.record, config, handler):
        key = ("run", name, handler, msgspec.json.encode(config))
        sandbox_id = await room.containers.operations.join(key, lambda: _run(room, config, handler, name))
    else:
        sandbox_id = made.record.id
    room.undelivered.pop(name, None)
    return sandbox_id


def _same(record: SandboxRecord, config: PodSandboxConfig, handler: str) -> bool:
    return record.config == config and record.handler == handler


async def _run(room: Room, config: PodSandboxConfig, handler: str, name: str) -> str:
    other = room.table.named(name)
    if other is not None:
        # one that is being removed does not count, but it must be out of the way
        await room.containers.operations.finished(("remove pod", other.record.id))
    if room.table.named(name) is not None:
        raise AlreadyExists(f"pod sandbox {name} exists already")
    record = _new_record(room, config, handler)
    sandbox = Sandbox(record)
    room.table.add(sandbox)
    try:
        await room.containers.store.add_sandbox(record)
        with sandbox.timeline.recording():
            await _make(room, sandbox)
    except BaseException as err:
        await asyncio.shield(_undo(room, sandbox, err))
        raise
    room.undelivered[name] = record.id
    watch(room, sandbox)
    tell(room, EventKind.CREATED, record.id)
    tell(room, EventKind.STARTED, record.id)
    return record.id


def _new_record(room: Room, config: PodSandboxConfig, handler: str) -> SandboxRecord:
    cgroups = room.containers.cgroups
    sandbox_id = secrets.token_hex(32)
    given = config.linux.cgroup_parent if config.linux else ""
    record = SandboxRecord(
        id=sandbox_id,
        config=config,
        handler=handler,
        state=SandboxState.CREATING,
        created_at=time.time_ns(),
        boot_id=room.containers.facts.boot_id,
        cgroup_parent=cgroups.check_parent(given) if given else cgroups.default_parent(sandbox_id),
    )
    if record.host_network:
        return record
    return msgspec.structs.replace(record, network=network.plan(room.networks))


async def _make(room: Room, sandbox: Sandbox) -> None:
    paths = room.containers.paths
    if logs := sandbox.record.config.log_directory:
        await in_thread(
            lambda: _make_log_directory(Path(logs)), what=f"log_directory {logs}", timeout=LOG_DIRECTORY_SECONDS
        )
    with step("namespaces and files"):
        holder = await in_thread(lambda: _prepare(room, sandbox.record))
    record = sandbox.record = msgspec.structs.replace(sandbox.record, holder=holder)
    if holder is not None:
        await room.containers.store.save_sandbox(record)  # so that whoever cleans up after a crash knows of it
    if record.network is not None:
        with step("pod network"):
            record = msgspec.structs.replace(record, network=await network.attach(room.networks, paths, record))
    record = msgspec.structs.replace(record, state=SandboxState.READY, created_at=time.time_ns())
    await room.containers.store.save_sandbox(record)
    sandbox.record = record


def _prepare(room: Room, record: SandboxRecord) -> ProcessRecord | None:
    """Everything but the network; blocks."""
    paths = room.containers.paths
    paths.sandbox(record.id).mkdir(mode=0o711)
    hostname = os.uname().nodename if record.host_network else record.hostname
    files.write(paths.sandbox(record.id), record, hostname)
    wanted = namespaces(room, record)
    if wanted.kinds:
        create(wanted)
    if record.namespaces.ipc is not NamespaceMode.NODE:
        mount(Tmpfs(paths.shm(record.id), SHM_BYTES, 0o1777))
    if record.namespaces.pid is not NamespaceMode.POD:
        return None
    holder = Holder(
        room.containers.settings.holder,
        paths.state / "holder",
        tuple(wanted.path(kind) for kind in wanted.kinds),
    )
    pid = holder.start()
    return ProcessRecord(pid, start_time(pid))


def namespaces(room: Room, record: SandboxRecord) -> NamespaceSet:
    """The namespaces that the pod has of its own. A host name goes with a network of one's own."""
    kinds = []
    if not record.host_network:
        kinds += [NamespaceKind.NET, NamespaceKind.UTS]
    if record.namespaces.ipc is not NamespaceMode.NODE:
        kinds.append(NamespaceKind.IPC)
    sysctls = record.config.linux.sysctls if record.config.linux else {}
    return NamespaceSet(room.containers.paths.namespaces(record.id), tuple(kinds), record.hostname[:64], sysctls)


def _make_log_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as err:
        raise HostFailure(f"cannot make the log directory {path}: {err.strerror}") from err


async def _undo(room: Room, sandbox: Sandbox, err: BaseException) -> None:
    """Nothing of a failed sandbox stays; a network that does not let go is tried again behind the scenes."""
    record = sandbox.record
    try:
        await tear_down(room, record)
    except Exception as failure:
        _log.warning("cannot clean up after pod sandbox %s: %s", record.id, failure)
        err.add_note(f"cleaning up failed too: {failure}")
        if isinstance(failure, CrishimError):
            room.containers.operations.spawn(("detach", record.id), lambda: detach_later(room, record), patient=True)
    await room.containers.store.drop_sandbox(record.id)
    room.table.drop(record.id)
