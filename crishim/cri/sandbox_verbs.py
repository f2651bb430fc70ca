"""Calls about pod sandboxes."""

from __future__ import annotations

import json
import time

import msgspec

from crishim.cri import container_verbs, messages
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.cri.translate import from_proto
from crishim.errors import InvalidArgument
from crishim.model.cri import PodSandboxConfig
from crishim.pods import lifecycle
from crishim.pods.run import run
from crishim.pods.table import Sandbox, SandboxFilter


async def run_pod_sandbox(node: Node, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
    """Make and start a sandbox."""
    if not request.HasField("config"):
        raise InvalidArgument("config is missing")
    config = from_proto(request.config, PodSandboxConfig)
    return pb.RunPodSandboxResponse(pod_sandbox_id=await run(node.pods, config, request.runtime_handler))


async def stop_pod_sandbox(node: Node, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
    """Stop; one that is unknown is fine."""
    sandbox = node.pods.table.find(_id(request.pod_sandbox_id))
    if sandbox is not None:
        await lifecycle.stop(node.pods, sandbox)
    return pb.StopPodSandboxResponse()


async def remove_pod_sandbox(node: Node, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
    """Remove with all containers; one that is unknown is fine."""
    sandbox = node.pods.table.find(_id(request.pod_sandbox_id))
    if sandbox is not None:
        await lifecycle.remove(node.pods, sandbox)
    return pb.RemovePodSandboxResponse()


async def pod_sandbox_status(node: Node, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
    """One sandbox, with the statuses of its containers as the evented PLEG wants them."""
    sandbox = node.pods.table.get(_id(request.pod_sandbox_id))
    containers = node.containers.table.of_sandbox(sandbox.record.id)
    return pb.PodSandboxStatusResponse(
        status=messages.sandbox_status(sandbox.record),
        info=_info(node, sandbox) if request.verbose else {},
        containers_statuses=[container_verbs.status_of(node, item.record) for item in containers if item.shown],
        timestamp=time.time_ns(),
    )


async def list_pod_sandbox(node: Node, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
    """All that match, from memory."""
    given = request.filter
    wanted = SandboxFilter(
        id=given.id,
        ready=(given.state.state == pb.SANDBOX_READY) if given.HasField("state") else None,
        labels=dict(given.label_selector),
    )
    found = node.pods.table.select(wanted)
    node.sandbox_items.prune(len(node.pods.table))
    return pb.ListPodSandboxResponse(items=node.sandbox_items.all(found))


def _id(sandbox_id: str) -> str:
    if not sandbox_id:
        raise InvalidArgument("pod_sandbox_id is empty")
    return sandbox_id


def _info(node: Node, sandbox: Sandbox) -> dict[str, str]:
    """What ``crictl inspectp`` shows."""
    record = sandbox.record
    paths = node.containers.paths
    network = record.network
    info = {
        "pid": record.holder.pid if record.holder else 0,
        "config": msgspec.to_builtins(record.config),
        "runtimeHandler": record.handler or node.containers.handlers.default,
        "namespaces": str(paths.namespaces(record.id)),
        "cgroupParent": record.cgroup_parent,
        "cniResult": json.loads(network.result) if network and network.result else None,
        "timeline": sandbox.timeline.as_json(),
    }
    return {"info": msgspec.json.encode(info).decode()}


VERBS: dict[str, Verb] = {
    "RunPodSandbox": run_pod_sandbox,
    "StopPodSandbox": stop_pod_sandbox,
    "RemovePodSandbox": remove_pod_sandbox,
    "PodSandboxStatus": pod_sandbox_status,
    "ListPodSandbox": list_pod_sandbox,
}
