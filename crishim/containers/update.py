"""UpdateContainerResources: new limits for a container that is created or running."""

from __future__ import annotations

import logging

import msgspec

from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import FailedPrecondition
from crishim.model.cri import ContainerConfig, LinuxContainerConfig, LinuxContainerResources
from crishim.model.records import ContainerState
from crishim.spec.generate import linux_of
from crishim.spec.resources import Controllers, decide, merge

_log = logging.getLogger(__name__)


async def update(room: Room, container: Container, wanted: LinuxContainerResources) -> None:
    """Set what ``wanted`` gives and keep the rest; the status shows the result."""
    async with container.lock:
        record = container.record
        if record.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise FailedPrecondition(f"container {record.id} is {record.state.value}: its resources cannot be updated")
        current, _ = linux_of(record.config)
        merged = merge(current, wanted)
        controllers = Controllers(room.cgroups.controllers, room.cgroups.unified, room.cgroups.swap)
        decided = decide(merged, controllers, room.settings.pids_limit, [])
        for remark in decided.left_out:
            _log.warning("container %s: left out: %s", record.id[:13], remark)
        # huge pages are limited at creation only: OCI runtimes have no way to change that
        changed = msgspec.structs.replace(decided.resources, devices=[], hugepage_limits=[])
        await room.handlers.get(record.handler).update(record.id, msgspec.json.encode(changed))
        updated = msgspec.structs.replace(record, config=_with_resources(record.config, merged))
        await room.store.save_container(updated)
        container.record = updated


def _with_resources(config: ContainerConfig, resources: LinuxContainerResources) -> ContainerConfig:
    linux = msgspec.structs.replace(config.linux or LinuxContainerConfig(), resources=resources)
    return msgspec.structs.replace(config, linux=linux)
