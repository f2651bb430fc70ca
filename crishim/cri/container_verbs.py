"""Calls about containers."""

from __future__ import annotations

import msgspec

from crishim.containers import lifecycle
from crishim.containers.create import create, log_path
from crishim.containers.exec import exec_sync
from crishim.containers.table import Container, ContainerFilter
from crishim.containers.update import update
from crishim.cri import messages
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.cri.translate import from_proto
from crishim.errors import FailedPrecondition, InvalidArgument
from crishim.host.threads import in_thread
from crishim.model.cri import ContainerConfig, LinuxContainerResources
from crishim.model.records import ContainerRecord, ContainerState, SandboxState

_FROM_PROTO = {number: state for state, number in messages.CONTAINER_STATES.items()}


async def create_container(node: Node, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
    """Create in a sandbox; a retry after a caller left gets the result of the first call."""
    if not request.HasField("config"):
        raise InvalidArgument("config is missing")
    config = from_proto(request.config, ContainerConfig)
    if config.metadata is None:
        raise InvalidArgument("config.metadata is missing")
    sandbox = node.pods.table.get(_id(request.pod_sandbox_id, "pod_sandbox_id"))
    made = await create(node.containers, lambda: sandbox.record, config)
    return pb.CreateContainerResponse(container_id=made)


async def start_container(node: Node, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
    """Run a created container."""
    container = node.containers.table.get(_id(request.container_id))
    sandbox = node.pods.table.find(container.record.sandbox_id)
    if sandbox is None or sandbox.record.state is not SandboxState.READY:
        raise FailedPrecondition(f"pod sandbox {container.record.sandbox_id} is not ready")
    key = ("start", container.record.id)
    await node.containers.operations.join(key, lambda: lifecycle.start(node.containers, container))
    return pb.StartContainerResponse()


async def stop_container(node: Node, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
    """End a container within ``timeout`` seconds; one that is unknown or has ended is fine."""
    if request.timeout < 0:
        raise InvalidArgument(f"timeout {request.timeout} is negative")
    container = node.containers.table.find(_id(request.container_id))
    if container is not None:
        await lifecycle.stop(node.containers, container, float(request.timeout))
    return pb.StopContainerResponse()


async def remove_container(node: Node, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
    """Remove, killing what runs; one that is unknown is fine."""
    container = node.containers.table.find(_id(request.container_id))
    if container is not None:
        await lifecycle.remove(node.containers, container)
    return pb.RemoveContainerResponse()


async def container_status(node: Node, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
    """One container."""
    container = node.containers.table.get(_id(request.container_id))
    info = await in_thread(lambda: _info(node, container)) if request.verbose else {}
    return pb.ContainerStatusResponse(status=status_of(node, container.record), info=info)


async def list_containers(node: Node, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
    """All that match, from memory."""
    given = request.filter
    wanted = ContainerFilter(
        id=given.id,
        sandbox_id=given.pod_sandbox_id,
        state=_FROM_PROTO.get(given.state.state, ContainerState.CREATING) if given.HasField("state") else None,
        labels=dict(given.label_selector),
    )
    found = node.containers.table.select(wanted)
    node.container_items.prune(len(node.containers.table))
    return pb.ListContainersResponse(containers=node.container_items.all(found))


async def update_container_resources(
    node: Node, request: pb.UpdateContainerResourcesRequest
) -> pb.UpdateContainerResourcesResponse:
    """New limits; ``annotations`` are for runtimes that act on them, which none of ours does."""
    container = node.containers.table.get(_id(request.container_id))
    if request.HasField("windows"):
        raise InvalidArgument("windows is given, but this node runs Linux")
    if not request.HasField("linux"):
        raise InvalidArgument("linux is missing")
    await update(node.containers, container, from_proto(request.linux, LinuxContainerResources))
    return pb.UpdateContainerResourcesResponse()


async def exec_in_container(node: Node, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
    """Run a command to its end; of its output what fits one answer."""
    container = node.containers.table.get(_id(request.container_id))
    result = await exec_sync(node.containers, container, list(request.cmd), float(request.timeout))
    room = node.config.api.max_message_bytes - 1024  # bytes for all but the output
    stdout = result.stdout[:room]
    return pb.ExecSyncResponse(stdout=stdout, stderr=result.stderr[: room - len(stdout)], exit_code=result.exit_code)


def _id(given: str, field: str = "container_id") -> str:
    if not given:
        raise InvalidArgument(f"{field} is empty")
    return given


def status_of(node: Node, record: ContainerRecord) -> pb.ContainerStatus:
    """The status message of a container."""
    sandbox = node.pods.table.find(record.sandbox_id)
    return messages.container_status(record, log_path(sandbox.record, record.config) if sandbox else None)


def _info(node: Node, container: Container) -> dict[str, str]:
    """What ``crictl inspect`` shows; blocks."""
    record = container.record
    spec_file = node.containers.paths.bundle(record.id) / "config.json"
    linux = record.config.linux
    security = linux.security_context if linux else None
    running = record.state is ContainerState.RUNNING and record.process is not None
    info = {
        "pid": record.process.pid if running and record.process else 0,
        "sandboxID": record.sandbox_id,
        "privileged": bool(security and security.privileged),
        "runtimeHandler": record.handler or node.containers.handlers.default,
        "runtimeSpec": msgspec.json.decode(spec_file.read_bytes()) if spec_file.exists() else None,
        "config": msgspec.to_builtins(record.config),
        "timeline": container.timeline.as_json(),
    }
    return {"info": msgspec.json.encode(info).decode()}


VERBS: dict[str, Verb] = {
    "CreateContainer": create_container,
    "StartContainer": start_container,
    "StopContainer": stop_container,
    "RemoveContainer": remove_container,
    "ContainerStatus": container_status,
    "ListContainers": list_containers,
    "ExecSync": exec_in_container,
    "UpdateContainerResources": update_container_resources,
}
