"""A pod's network: what CNI plugins are told of the pod, and what is remembered of their answer."""

from __future__ import annotations

import ipaddress
import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from crishim.cni import config as cni
from crishim.cni.network import Attachment, Networks, result_ips
from crishim.config.paths import Paths
from crishim.errors import ConfigError, HostFailure, Unavailable
from crishim.model.cri import PodSandboxConfig
from crishim.model.records import NetworkRecord, SandboxRecord

_log = logging.getLogger(__name__)

IFNAME = "eth0"


def plan(networks: Networks) -> NetworkRecord:
    """What is recorded before the first plugin runs, so that a crash cannot lose an address."""
    try:
        config = networks.current()
    except ConfigError as err:
        raise Unavailable(f"the pod network is not ready: {err}") from err
    return NetworkRecord(config=config.as_json(), ifname=IFNAME)


async def attach(networks: Networks, paths: Paths, record: SandboxRecord) -> NetworkRecord:
    """ADD; the result has the pod's addresses."""
    assert record.network is not None
    result = await networks.add(_attachment(paths, record, record.network))
    pod = f"{record.metadata.namespace}/{record.metadata.name}"
    try:
        ips = [str(ipaddress.ip_address(address)) for address in result_ips(result, record.network.ifname)]
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise HostFailure(f"the pod network gave {pod} a malformed result: {json.dumps(result)[:500]}") from err
    if not ips:
        raise HostFailure(f"the pod network gave {pod} no address")
    return msgspec.structs.replace(record.network, result=json.dumps(result), ips=ips)


async def detach(networks: Networks, paths: Paths, record: SandboxRecord) -> None:
    """DEL with the configuration and result that ADD had, whatever the node's configuration is now."""
    if record.network is None or not record.network.config:
        return
    previous = json.loads(record.network.result) if record.network.result else None
    await networks.delete(_attachment(paths, record, record.network), previous)


def _attachment(paths: Paths, record: SandboxRecord, network: NetworkRecord) -> Attachment:
    netns = paths.namespaces(record.id) / "net"
    meta = record.metadata
    return Attachment(
        config=cni.parse(network.config, "in the database"),
        sandbox_id=record.id,
        netns=str(netns) if is_pinned(netns) else "",
        ifname=network.ifname,
        arguments={
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": meta.namespace,
            "K8S_POD_NAME": meta.name,
            "K8S_POD_INFRA_CONTAINER_ID": record.id,
            "K8S_POD_UID": meta.uid,
        },
        capability_args=capability_args(record.config),
    )


def is_pinned(path: Path) -> bool:
    """Whether a namespace is there: after a reboot only an empty file is, or nothing."""
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except OSError:
        return False


def capability_args(config: PodSandboxConfig) -> dict[str, Any]:
    """What plugins that declare a capability are told (CNI conventions, CONVENTIONS.md)."""
    mappings = [
        {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.name.lower(),
            **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
        }
        for mapping in config.port_mappings
        if mapping.host_port
    ]
    return {"portMappings": mappings} if mappings else {}
