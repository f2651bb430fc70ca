"""Limits, as the kernel has them in the container's cgroup and process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness.client import Cri, connect, container_config, refused, sleeping
from root.harness.daemon import CGROUPS, Daemon
from root.harness.leaks import unchanged

from .conftest import MakeDaemon

UNIFIED = (CGROUPS / "cgroup.controllers").exists()
PIDS_LIMIT = 77


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """One with a limit on processes."""
    daemon = make_module_daemon({"runtime": {"pids_limit": PIDS_LIMIT}})
    daemon.start()
    daemon.pull(image)
    return daemon


def resources(**fields: object) -> pb.LinuxContainerConfig:
    """The Linux part of a container with only resources."""
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def cgroup_file(pod: str, container: str, controller: str, name: str, parent: str = "") -> str:
    """What a file of the container's cgroup says."""
    base = CGROUPS if UNIFIED else CGROUPS / controller
    return (base / (parent or f"crishim-{pod}") / f"crishim-{container}" / name).read_text().strip()


async def test_limits_reach_the_cgroup(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    linux = resources(
        memory_limit_in_bytes=64 << 20, cpu_shares=512, cpu_quota=50_000, cpu_period=100_000, cpuset_cpus="0"
    )
    container = await cri.run(pod, container_config(image, sleeping(), linux=linux))
    if UNIFIED:
        expected = {"memory.max": str(64 << 20), "cpu.max": "50000 100000", "cpuset.cpus": "0"}
        controllers = dict.fromkeys(expected, "")
    else:
        expected = {
            "memory.limit_in_bytes": str(64 << 20),
            "cpu.shares": "512",
            "cpu.cfs_quota_us": "50000",
            "cpu.cfs_period_us": "100000",
            "cpuset.cpus": "0",
        }
        controllers = {name: name.partition(".")[0] for name in expected}
    assert {name: cgroup_file(pod, container, controllers[name], name) for name in expected} == expected
    assert cgroup_file(pod, container, "pids", "pids.max") == str(PIDS_LIMIT)
    shown = (await cri.status(container)).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_shares, shown.cpu_quota) == (64 << 20, 512, 50_000)
    assert await cri.sh(container, "grep Cpus_allowed_list /proc/self/status") == "Cpus_allowed_list:\t0\n"


async def test_container_without_limits(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    if UNIFIED:
        assert cgroup_file(pod, container, "", "memory.max") == "max"
    else:
        assert int(cgroup_file(pod, container, "memory", "memory.limit_in_bytes")) > 1 << 60
        assert cgroup_file(pod, container, "cpu", "cpu.cfs_quota_us") == "-1"


async def test_processes_are_limited(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    done = await cri.exec(container, ["sh", "-c", f"for n in $(seq {PIDS_LIMIT}); do sleep 9 & done; echo all"])
    assert b"all" not in done.stdout or b"can't fork" in done.stderr


async def test_cgroup_parent_of_the_kubelet(cri: Cri, image: str) -> None:
    """It is the kubelet's: used, and left alone."""
    parent = f"{cri.daemon.bridge}-kubepods/burstable/pod1"
    linux = pb.LinuxPodSandboxConfig(cgroup_parent=f"/{parent}")
    config = container_config(image, sleeping(), linux=resources(cpu_shares=300))
    try:
        pod = await cri.run_pod(cri.pod_config(linux=linux))
        container = await cri.run(pod, config)
        name = "cpu.weight" if UNIFIED else "cpu.shares"
        assert int(cgroup_file(pod, container, "cpu", name, parent)) == (12 if UNIFIED else 300)
        await cri.remove_pod(pod)
        tops = [CGROUPS] if UNIFIED else [CGROUPS / "cpu", CGROUPS / "memory", CGROUPS / "pids"]
        for top in tops:
            assert (top / parent).is_dir() and not list((top / parent).glob("crishim-*"))
    finally:
        _remove_parents(Path(parent))


def _remove_parents(parent: Path) -> None:
    for top in [CGROUPS] if UNIFIED else [path for path in CGROUPS.iterdir() if path.is_dir()]:
        for path in (parent, *parent.parents[:-1]):
            if (top / path).is_dir():
                (top / path).rmdir()


async def test_oom_score(cri: Cri, image: str) -> None:
    """As asked for, but never lower than the daemon may set it."""
    pod = await cri.run_pod()
    for wanted in (0, 500, 1000):
        container = await cri.run(pod, container_config(image, sleeping(), linux=resources(oom_score_adj=wanted)))
        assert await cri.sh(container, "cat /proc/self/oom_score_adj") == f"{wanted}\n"
    container = await cri.run(pod, container_config(image, sleeping(), linux=resources(oom_score_adj=-998)))
    shown = int(await cri.sh(container, "cat /proc/self/oom_score_adj"))
    lowest = -1000 if _may_lower_oom_scores() else int(Path("/proc/self/oom_score_adj").read_text())
    assert shown == max(-998, lowest)


def _may_lower_oom_scores() -> bool:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd"))
    return bool(int(line.split()[1], 16) >> 24 & 1)


async def test_limits_without_a_controller_are_left_out(cri: Cri, image: str) -> None:
    """The kubelet sends limits of 0 for every page size; a host without the controller must not fail for that."""
    pod = await cri.run_pod()
    linux = resources(
        hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=0), pb.HugepageLimit(page_size="1GB", limit=0)],
        unified={} if UNIFIED else {"memory.high": "1000000000"},
        memory_limit_in_bytes=64 << 20,
        memory_swap_limit_in_bytes=64 << 20,
    )
    container = await cri.run(pod, container_config(image, sleeping(), linux=linux))
    assert await cri.sh(container, "echo alive") == "alive\n"
    if not (CGROUPS / "hugetlb").exists() and not UNIFIED:
        assert "left out: " in cri.daemon.log() and "hugepage limits" in cri.daemon.log()


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"cpu_period": -1}, "cpu_period"),
        ({"cpu_shares": -5}, "cpu_shares"),
        ({"memory_limit_in_bytes": -1}, "memory_limit_in_bytes"),
        ({"oom_score_adj": 1001}, "oom_score_adj 1001"),
        ({"oom_score_adj": -1001}, "oom_score_adj -1001"),
    ],
)
async def test_limits_that_no_container_can_have(cri: Cri, image: str, fields: dict[str, int], mention: str) -> None:
    pod = await cri.run_pod()
    async with unchanged(cri.daemon):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, mention):
            await cri.create(pod, container_config(image, sleeping(), linux=resources(**fields)))


async def test_limits_that_the_kernel_refuses(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    await cri.remove(await cri.create(pod, container_config(image, sleeping())))  # makes the pod's cgroup, which stays
    async with unchanged(cri.daemon):
        for fields, mention in (({"cpuset_cpus": "4096"}, "cpuset"), ({"cpu_quota": 1}, "cpu")):
            with refused(grpc.StatusCode.INTERNAL, mention):
                await cri.create(pod, container_config(image, sleeping(), linux=resources(**fields)))


async def test_limits_stay_when_the_daemon_ends(make_daemon: MakeDaemon, image: str) -> None:
    daemon = make_daemon()
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as cri:
        await cri.pull(image)
        pod = await cri.run_pod()
        linux = resources(memory_limit_in_bytes=64 << 20)
        container = await cri.run(pod, container_config(image, sleeping(), linux=linux))
    await asyncio.to_thread(daemon.restart)
    name = "memory.max" if UNIFIED else "memory.limit_in_bytes"
    assert cgroup_file(pod, container, "memory", name) == str(64 << 20)
