"""ExecSync: one command in a running container, to its end."""

from __future__ import annotations

import secrets

import msgspec

from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.errors import FailedPrecondition, InvalidArgument
from crishim.model.records import ContainerState
from crishim.runtimes.driver import ExecResult
from crishim.spec.oci import Process


class _Bundle(msgspec.Struct):
    process: Process


async def exec_sync(room: Room, container: Container, command: list[str], timeout: float) -> ExecResult:
    """Run ``command`` as the container's own user; a ``timeout`` of 0 seconds is none."""
    if not command:
        raise InvalidArgument("cmd is empty")
    if timeout < 0:
        raise InvalidArgument(f"timeout {timeout:g} is negative")
    if container.record.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"container {container.record.id} is not running")
    bundle = room.paths.bundle(container.record.id)
    spec = msgspec.json.decode((bundle / "config.json").read_bytes(), type=_Bundle).process
    wanted = msgspec.structs.replace(spec, args=command, terminal=False)
    runtime = room.handlers.get(container.record.handler)
    scratch = bundle / f"exec-{secrets.token_hex(8)}"
    return await runtime.exec_sync(container.record.id, msgspec.json.encode(wanted), timeout or None, scratch)
