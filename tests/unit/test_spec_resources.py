"""Cgroup settings: what is asked for, as far as the host can do it."""

from __future__ import annotations

import pytest

from crishim.errors import InvalidArgument
from crishim.model.cri import HugepageLimit, LinuxContainerResources
from crishim.spec import oci
from crishim.spec.resources import Controllers, Decided, decide

EVERY = frozenset({"cpu", "cpuset", "memory", "pids", "hugetlb", "io"})
V2 = Controllers(EVERY, unified=True, swap=True)
V1 = Controllers(EVERY, unified=False, swap=True)
Wanted = LinuxContainerResources
MANY = Wanted(
    cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=1 << 30, cpuset_cpus="0-1",
    cpuset_mems="0", hugepage_limits=[HugepageLimit("2MB", 4 << 20), HugepageLimit("1GB", 0)],
    memory_swap_limit_in_bytes=2 << 30,
)  # fmt: skip


def ask(wanted: LinuxContainerResources, controllers: Controllers = V2, pids_limit: int = 0) -> Decided:
    """The decision, with no devices."""
    return decide(wanted, controllers, pids_limit, [])


def lacking(*names: str) -> Controllers:
    """A host without some controllers."""
    return Controllers(EVERY - set(names), unified=True, swap=True)


@pytest.mark.parametrize("controllers", [V1, V2])
def test_everything(controllers: Controllers) -> None:
    """Passed on as it is; a limit of 0 for huge pages is a limit."""
    assert ask(MANY, controllers, 100) == Decided(
        oci.Resources(
            memory=oci.Memory(1 << 30, 2 << 30),
            cpu=oci.Cpu(512, 50_000, 100_000, "0-1", "0"),
            pids=oci.Pids(100),
            hugepage_limits=[oci.HugepageLimit("2MB", 4 << 20), oci.HugepageLimit("1GB", 0)],
        )
    )


def test_nothing() -> None:
    """Zero means not given."""
    assert ask(Wanted()) == Decided(oci.Resources())
    assert ask(Wanted(), Controllers(frozenset(), unified=False, swap=False)).left_out == ()


def test_single_settings() -> None:
    """One of a controller's settings alone leaves the others to the kernel."""
    assert ask(Wanted(cpu_shares=2)).resources.cpu == oci.Cpu(shares=2)
    assert ask(Wanted(cpuset_mems="0")).resources.cpu == oci.Cpu(mems="0")
    assert ask(Wanted(cpu_quota=-1, cpu_period=1000)).resources.cpu == oci.Cpu(quota=-1, period=1000)
    assert ask(Wanted(memory_limit_in_bytes=1)).resources.memory == oci.Memory(1)


@pytest.mark.parametrize(
    ("controller", "field", "remark"),
    [
        ("memory", "memory", "memory limit"),
        ("pids", "pids", "pids limit"),
        ("hugetlb", "hugepage_limits", "hugepage limits"),
    ],
)
def test_missing_controller(controller: str, field: str, remark: str) -> None:
    """Its limit is left out and named, the rest stays."""
    found = ask(MANY, lacking(controller), 10)
    assert not getattr(found.resources, field)
    assert found.left_out == (f"{remark}: the host has no {controller} controller",)
    assert found.resources.cpu == ask(MANY).resources.cpu


def test_missing_cpu_controllers() -> None:
    """Times and sets are two controllers with one object in the specification."""
    found = ask(MANY, lacking("cpu"))
    assert found.resources.cpu == oci.Cpu(cpus="0-1", mems="0")
    assert found.left_out == ("cpu: the host has no cpu controller",)
    found = ask(MANY, lacking("cpuset"))
    assert found.resources.cpu == oci.Cpu(512, 50_000, 100_000)
    assert found.left_out == ("cpuset: the host has no cpuset controller",)
    assert ask(MANY, lacking("cpu", "cpuset")).resources.cpu is None


def test_swap_that_is_not_accounted() -> None:
    """Runtimes fail on the missing file: left out and named, the memory limit stays."""
    found = ask(MANY, Controllers(EVERY, unified=False, swap=False))
    assert found.resources.memory == oci.Memory(1 << 30)
    assert found.left_out == ("swap limit: the host does not account for swap",)


def test_unified() -> None:
    """Settings of cgroup version 2 as they are."""
    wanted = {"memory.high": "1000", "cpu.weight.nice": "1"}
    assert ask(Wanted(unified=wanted)).resources.unified == wanted


def test_unified_on_version_1() -> None:
    """There are no such files: left out, and each one named."""
    found = ask(Wanted(unified={"memory.high": "1", "io.max": "2"}), V1)
    assert found.resources.unified == {}
    assert found.left_out == ("io.max, memory.high: the host has no cgroup version 2",)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_pids_limit(limit: int) -> None:
    """Then the pod's holds; 0 must not become a limit of no process at all."""
    assert ask(Wanted(), V2, limit).resources.pids is None


def test_smallest_pids_limit() -> None:
    """One process."""
    assert ask(Wanted(), V2, 1).resources.pids == oci.Pids(1)


def test_device_rules_are_passed_on() -> None:
    """In their order."""
    rules = [oci.DeviceRule(False), oci.DeviceRule(True, "rw", "c", 1, 3)]
    assert decide(Wanted(), V2, 0, rules).resources.devices == rules


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (Wanted(cpu_period=-1), "cpu_period"),
        (Wanted(cpu_shares=-2), "cpu_shares"),
        (Wanted(memory_limit_in_bytes=-1), "memory_limit_in_bytes"),
        (Wanted(oom_score_adj=1001), "oom_score_adj 1001"),
        (Wanted(oom_score_adj=-1001), "oom_score_adj -1001"),
    ],
)
def test_impossible_values(wanted: LinuxContainerResources, name: str) -> None:
    """Refused by name, whatever the host has."""
    with pytest.raises(InvalidArgument, match=f"^{name} is"):
        ask(wanted, Controllers(frozenset(), unified=False, swap=False))


@pytest.mark.parametrize("value", [-1000, 0, 1000])
def test_possible_oom_score_adj(value: int) -> None:
    """Both ends are allowed."""
    ask(Wanted(oom_score_adj=value))
