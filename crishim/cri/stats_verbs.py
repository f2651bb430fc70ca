"""Calls about what containers and pods use."""

from __future__ import annotations

import time
from pathlib import Path

from crishim.cgroups import stats as cgroup_stats
from crishim.cgroups.stats import Psi, Usage
from crishim.containers.stats import ContainerUsage
from crishim.containers.table import ContainerFilter
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.cri.translate import to_proto
from crishim.errors import InvalidArgument
from crishim.host.netdev import Interface, interfaces
from crishim.host.threads import in_thread
from crishim.model.records import ContainerState, SandboxRecord, SandboxState
from crishim.pods.network import IFNAME
from crishim.pods.table import SandboxFilter


async def container_stats(node: Node, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
    """One container."""
    if not request.container_id:
        raise InvalidArgument("container_id is empty")
    container = node.containers.table.get(request.container_id)
    (found,) = await node.meter.measure([container])
    return pb.ContainerStatsResponse(stats=_container(node, found))


async def list_container_stats(node: Node, request: pb.ListContainerStatsRequest) -> pb.ListContainerStatsResponse:
    """Every running container that matches."""
    given = request.filter
    wanted = ContainerFilter(given.id, given.pod_sandbox_id, ContainerState.RUNNING, dict(given.label_selector))
    found = await _measure(node, wanted)
    return pb.ListContainerStatsResponse(stats=[_container(node, item) for item in found])


async def pod_sandbox_stats(node: Node, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
    """One sandbox with its containers."""
    if not request.pod_sandbox_id:
        raise InvalidArgument("pod_sandbox_id is empty")
    record = node.pods.table.get(request.pod_sandbox_id).record
    return pb.PodSandboxStatsResponse(stats=await _sandbox(node, record))


async def list_pod_sandbox_stats(node: Node, request: pb.ListPodSandboxStatsRequest) -> pb.ListPodSandboxStatsResponse:
    """Every ready sandbox that matches, with its containers."""
    wanted = SandboxFilter(request.filter.id, True, dict(request.filter.label_selector))
    records = node.pods.table.select(wanted)
    return pb.ListPodSandboxStatsResponse(stats=[await _sandbox(node, record) for record in records])


async def _measure(node: Node, wanted: ContainerFilter) -> list[ContainerUsage]:
    table = node.containers.table
    return await node.meter.measure([table.get(record.id) for record in table.select(wanted)])


async def _sandbox(node: Node, record: SandboxRecord) -> pb.PodSandboxStats:
    wanted = ContainerFilter(sandbox_id=record.id, state=ContainerState.RUNNING)
    containers = await _measure(node, wanted)
    usage, devices = await in_thread(lambda: _pod_usage(node, record))
    rates = [item.nano_cores for item in containers if item.nano_cores is not None]
    stats = pb.PodSandboxStats(
        attributes=pb.PodSandboxAttributes(
            id=record.id,
            metadata=to_proto(record.metadata, pb.PodSandboxMetadata),
            labels=record.config.labels,
            annotations=record.config.annotations,
        ),
        linux=pb.LinuxPodSandboxStats(
            network=_network(devices), containers=[_container(node, item) for item in containers]
        ),
    )
    if usage is not None:
        stats.linux.cpu.CopyFrom(_cpu(usage, sum(rates)))
        stats.linux.memory.CopyFrom(_memory(usage))
        stats.linux.process.CopyFrom(
            pb.ProcessUsage(timestamp=usage.at, process_count=pb.UInt64Value(value=usage.processes or 0))
        )
        if usage.io_psi is not None:
            stats.linux.io.CopyFrom(pb.IoUsage(timestamp=usage.at, psi=_psi(usage.io_psi)))
    return stats


def _pod_usage(node: Node, record: SandboxRecord) -> tuple[Usage | None, list[Interface]]:
    """Blocking: the pod's cgroup and its network."""
    cgroups = node.containers.cgroups
    namespace: Path | None = node.containers.paths.namespaces(record.id) / "net"
    if record.host_network:
        namespace = None
    devices = interfaces(namespace) if record.state is SandboxState.READY else []
    return cgroup_stats.read(cgroups, cgroups.parent_path(record.cgroup_parent)), devices


def _container(node: Node, found: ContainerUsage) -> pb.ContainerStats:
    record, usage = found.record, found.usage
    assert record.config.metadata is not None
    stats = pb.ContainerStats(
        attributes=pb.ContainerAttributes(
            id=record.id,
            metadata=to_proto(record.config.metadata, pb.ContainerMetadata),
            labels=record.config.labels,
            annotations=record.config.annotations,
        ),
    )
    if found.layer is not None:
        stats.writable_layer.CopyFrom(
            pb.FilesystemUsage(
                timestamp=found.layer.at,
                fs_id=pb.FilesystemIdentifier(mountpoint=node.config.root),
                used_bytes=pb.UInt64Value(value=found.layer.used),
                inodes_used=pb.UInt64Value(value=found.layer.inodes),
            )
        )
    if usage is not None:
        stats.cpu.CopyFrom(_cpu(usage, found.nano_cores))
        stats.memory.CopyFrom(_memory(usage))
        stats.swap.CopyFrom(_swap(usage))
        if usage.io_psi is not None:
            stats.io.CopyFrom(pb.IoUsage(timestamp=usage.at, psi=_psi(usage.io_psi)))
    return stats


def _number(value: int | None) -> pb.UInt64Value | None:
    return None if value is None else pb.UInt64Value(value=value)


def _cpu(usage: Usage, nano_cores: int | None) -> pb.CpuUsage:
    return pb.CpuUsage(
        timestamp=usage.at,
        usage_core_nano_seconds=_number(usage.cpu_ns),
        usage_nano_cores=_number(nano_cores),
        psi=_psi(usage.cpu_psi),
    )


def _memory(usage: Usage) -> pb.MemoryUsage:
    available = None
    if usage.memory_limit is not None and usage.working_set is not None:
        available = max(0, usage.memory_limit - usage.working_set)
    return pb.MemoryUsage(
        timestamp=usage.at,
        working_set_bytes=_number(usage.working_set),
        available_bytes=_number(available),
        usage_bytes=_number(usage.memory),
        rss_bytes=_number(usage.rss),
        page_faults=_number(usage.faults),
        major_page_faults=_number(usage.major_faults),
        psi=_psi(usage.memory_psi),
    )


def _swap(usage: Usage) -> pb.SwapUsage:
    available = None
    if usage.swap_limit is not None and usage.swap is not None:
        available = max(0, usage.swap_limit - usage.swap)
    return pb.SwapUsage(
        timestamp=usage.at, swap_available_bytes=_number(available), swap_usage_bytes=_number(usage.swap)
    )


def _psi(psi: Psi | None) -> pb.PsiStats | None:
    if psi is None:
        return None
    some, full = (
        pb.PsiData(Total=line.total, Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300)
        for line in (psi.some, psi.full)
    )
    return pb.PsiStats(Full=full, Some=some)


def _network(devices: list[Interface]) -> pb.NetworkUsage:
    usage = [
        pb.NetworkInterfaceUsage(
            name=device.name,
            rx_bytes=pb.UInt64Value(value=device.rx_bytes),
            rx_errors=pb.UInt64Value(value=device.rx_errors),
            tx_bytes=pb.UInt64Value(value=device.tx_bytes),
            tx_errors=pb.UInt64Value(value=device.tx_errors),
        )
        for device in devices
    ]
    default = next((item for item in usage if item.name == IFNAME), usage[0] if usage else None)
    return pb.NetworkUsage(timestamp=time.time_ns(), default_interface=default, interfaces=usage)


VERBS: dict[str, Verb] = {
    "ContainerStats": container_stats,
    "ListContainerStats": list_container_stats,
    "PodSandboxStats": pod_sandbox_stats,
    "ListPodSandboxStats": list_pod_sandbox_stats,
}
