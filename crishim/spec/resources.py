"""Cgroup settings from the CRI's resources, as far as this host has the controllers."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from crishim.errors import InvalidArgument
from crishim.model.cri import LinuxContainerResources
from crishim.spec import oci


@dataclass(frozen=True)
class Controllers:
    """What the host's cgroups can do."""

    available: frozenset[str]
    unified: bool
    swap: bool


@dataclass(frozen=True)
class Decided:
    """The settings, and for the log what was left out because the host cannot do it."""

    resources: oci.Resources
    left_out: tuple[str, ...] = ()


def decide(
    wanted: LinuxContainerResources, controllers: Controllers, pids_limit: int, devices: list[oci.DeviceRule]
) -> Decided:
    """The OCI resources; a limit whose controller the host lacks is left out and named."""
    _check(wanted)
    left_out: list[str] = []
    have = controllers.available

    def offered(name: str, *needed: str) -> bool:
        if not any(controller in have for controller in needed):
            left_out.append(f"{name}: the host has no {needed[0]} controller")
            return False
        return True

    cpu = memory = pids = None
    if (wanted.cpu_period or wanted.cpu_quota or wanted.cpu_shares) and offered("cpu", "cpu"):
        cpu = oci.Cpu(wanted.cpu_shares or None, wanted.cpu_quota or None, wanted.cpu_period or None)
    if (wanted.cpuset_cpus or wanted.cpuset_mems) and offered("cpuset", "cpuset"):
        base = cpu or oci.Cpu()
        cpu = oci.Cpu(base.shares, base.quota, base.period, wanted.cpuset_cpus, wanted.cpuset_mems)
    if wanted.memory_limit_in_bytes and offered("memory limit", "memory"):
        swap = wanted.memory_swap_limit_in_bytes or None
        if swap is not None and not controllers.swap:
            left_out.append("swap limit: the host does not account for swap")
            swap = None
        memory = oci.Memory(wanted.memory_limit_in_bytes, swap)
    if pids_limit > 0 and offered("pids limit", "pids"):
        pids = oci.Pids(pids_limit)
    pages = [oci.HugepageLimit(page.page_size, page.limit) for page in wanted.hugepage_limits]
    if pages and not offered("hugepage limits", "hugetlb"):
        pages = []
    unified = wanted.unified
    if unified and not controllers.unified:
        left_out.append(f"{', '.join(sorted(unified))}: the host has no cgroup version 2")
        unified = {}
    return Decided(oci.Resources(devices, memory, cpu, pids, pages, unified), tuple(left_out))


def merge(current: LinuxContainerResources, wanted: LinuxContainerResources) -> LinuxContainerResources:
    """``current`` with everything that ``wanted`` gives: zero and empty mean unchanged."""
    given = {
        field.name: value
        for field in msgspec.structs.fields(LinuxContainerResources)
        if (value := getattr(wanted, field.name)) not in (0, "", [], {})
    }
    if wanted.unified:
        given["unified"] = {**current.unified, **wanted.unified}
    return msgspec.structs.replace(current, **given)


def _check(wanted: LinuxContainerResources) -> None:
    for name in ("cpu_period", "cpu_shares", "memory_limit_in_bytes"):
        if getattr(wanted, name) < 0:
            raise InvalidArgument(f"{name} is negative")
    if not -1000 <= wanted.oom_score_adj <= 1000:
        raise InvalidArgument(f"oom_score_adj {wanted.oom_score_adj} is not between -1000 and 1000")
