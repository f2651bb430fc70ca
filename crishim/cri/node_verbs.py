"""Calls about the node itself: Version, Status, RuntimeConfig, UpdateRuntimeConfig."""

from __future__ import annotations

import msgspec

import crishim
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.errors import ConfigError, Unimplemented
from crishim.host.threads import in_thread

_KUBELET_API = "0.1.0"
CRI_VERSION = "v1"


async def version(_node: Node, _request: pb.VersionRequest) -> pb.VersionResponse:
    """Who we are."""
    return pb.VersionResponse(
        version=_KUBELET_API,
        runtime_name="crishim",
        runtime_version=crishim.__version__,
        runtime_api_version=CRI_VERSION,
    )


async def status(node: Node, request: pb.StatusRequest) -> pb.StatusResponse:
    """Whether pods can be run, and with what."""
    handlers = node.containers.handlers
    problem = handlers.problem()
    network = await in_thread(lambda: _network_problem(node))
    names = ["", *handlers.all()] if not problem else list(handlers.all())
    return pb.StatusResponse(
        status=pb.RuntimeStatus(
            conditions=[
                _condition("RuntimeReady", problem, "RuntimeNotReady"),
                _condition("NetworkReady", network, "NetworkPluginNotReady"),
            ]
        ),
        runtime_handlers=[_handler(node, name) for name in names],
        features=pb.RuntimeFeatures(supplemental_groups_policy=True),
        info=_info(node) if request.verbose else {},
    )


def _handler(node: Node, name: str) -> pb.RuntimeHandler:
    features = node.containers.handlers.get(name).features
    recursive = features.recursive_read_only(node.facts.kernel)
    return pb.RuntimeHandler(name=name, features=pb.RuntimeHandlerFeatures(recursive_read_only_mounts=recursive))


def _network_problem(node: Node) -> str:
    try:
        node.pods.networks.current()
    except ConfigError as err:
        return err.message
    return ""


def _condition(kind: str, problem: str, reason: str) -> pb.RuntimeCondition:
    return pb.RuntimeCondition(type=kind, status=not problem, reason=reason if problem else "", message=problem)


def _info(node: Node) -> dict[str, str]:
    room = node.containers
    return {
        "config": msgspec.json.encode(node.config).decode(),
        "cgroups": msgspec.json.encode(
            {"version": 2 if room.cgroups.unified else 1, "driver": room.cgroups.driver}
        ).decode(),
        "kernel": node.facts.kernel,
        "operations": str(room.operations.count()),
    }


async def runtime_config(node: Node, _request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
    """The cgroup driver, which the kubelet adopts."""
    driver = pb.SYSTEMD if node.containers.cgroups.systemd else pb.CGROUPFS
    return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))


async def update_runtime_config(_node: Node, request: pb.UpdateRuntimeConfigRequest) -> pb.UpdateRuntimeConfigResponse:
    """The pod CIDR, which only matters where a network template is configured; an empty one changes nothing."""
    if request.runtime_config.network_config.pod_cidr:
        raise Unimplemented("UpdateRuntimeConfig with a pod_cidr is not supported by this version")
    return pb.UpdateRuntimeConfigResponse()


VERBS: dict[str, Verb] = {
    "Version": version,
    "Status": status,
    "RuntimeConfig": runtime_config,
    "UpdateRuntimeConfig": update_runtime_config,
}
