"""Where cgroups are, on hosts of each kind, as trees of directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from crishim.cgroups.layout import Cgroups, detect, expand_slice, missing_controllers
from crishim.errors import ConfigError, InvalidArgument

V1_CONTROLLERS = ("blkio", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "pids")


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    """A host with version 2 alone."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
    (tmp_path / "system.slice").mkdir()
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A host with version 1, cpu being a link to the two that are mounted together."""
    for name in V1_CONTROLLERS:
        (tmp_path / name).mkdir()
    (tmp_path / "cpu,cpuacct").mkdir()
    (tmp_path / "cpuacct").rmdir()
    for name in ("cpu", "cpuacct"):
        (tmp_path / name).symlink_to("cpu,cpuacct")
    return tmp_path


@pytest.fixture
def hybrid(v1: Path) -> Path:
    """Version 1 for the controllers, version 2 for systemd."""
    (v1 / "systemd").mkdir()
    (v1 / "unified").mkdir()
    (v1 / "unified" / "cgroup.controllers").write_text("\n")
    return v1


def cgroupfs(mount: Path) -> Cgroups:
    """The host at ``mount`` without systemd."""
    return detect("auto", systemd=False, mount=mount)


def with_systemd(mount: Path) -> Cgroups:
    """The host at ``mount`` with systemd."""
    return detect("auto", systemd=True, mount=mount)


def test_detects_version_2(v2: Path) -> None:
    """The controllers are those of the root's file, not its directories."""
    found = cgroupfs(v2)
    assert found.unified
    assert found.controllers == {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc"}
    assert missing_controllers(found) == []
    assert found.hierarchies() == [v2]


def test_detects_version_1(v1: Path) -> None:
    """The controllers are the directories; links count as what they are called."""
    found = cgroupfs(v1)
    assert not found.unified
    assert {"cpu", "cpuacct", *V1_CONTROLLERS} <= found.controllers
    assert missing_controllers(found) == []
    assert v1 / "cpu,cpuacct" in found.hierarchies()
    assert len(found.hierarchies()) == len(V1_CONTROLLERS), "each hierarchy once"


def test_hybrid_counts_as_version_1(hybrid: Path) -> None:
    """As for runc; containers have a cgroup in the version 2 tree as well."""
    found = cgroupfs(hybrid)
    assert not found.unified
    assert hybrid / "unified" in found.hierarchies()
    assert hybrid / "systemd" in found.hierarchies()


def test_files_are_no_controllers(v1: Path) -> None:
    """Whatever else lies there."""
    (v1 / "README").touch()
    assert "README" not in cgroupfs(v1).controllers
    assert v1 / "README" not in cgroupfs(v1).hierarchies()


def test_swap(v1: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Version 2 can limit it; version 1 where the kernel was told to account for it."""
    assert not cgroupfs(v1).swap
    (v1 / "memory/memory.memsw.limit_in_bytes").touch()
    assert cgroupfs(v1).swap
    other = tmp_path_factory.mktemp("v2")
    (other / "cgroup.controllers").touch()
    assert cgroupfs(other).swap


def test_host_without_cgroups(tmp_path: Path) -> None:
    """Everything is missing, nothing fails."""
    found = cgroupfs(tmp_path / "nothing")
    assert not found.controllers
    assert {"memory", "pids", "devices"} <= set(missing_controllers(found))


def test_missing_controllers(v1: Path) -> None:
    """Only those that containers need; huge pages are not among them."""
    (v1 / "memory").rmdir()
    (v1 / "hugetlb").rmdir()
    assert missing_controllers(cgroupfs(v1)) == ["memory"]


def test_missing_controllers_of_version_2(v2: Path) -> None:
    """Devices and freezer are not controllers there."""
    (v2 / "cgroup.controllers").write_text("cpu io pids\n")
    assert missing_controllers(cgroupfs(v2)) == ["cpuset", "memory"]


@pytest.mark.parametrize(
    ("manager", "systemd", "driver"),
    [
        ("auto", True, "systemd"),
        ("auto", False, "cgroupfs"),
        ("cgroupfs", True, "cgroupfs"),
        ("cgroupfs", False, "cgroupfs"),
        ("systemd", True, "systemd"),
    ],
)
def test_driver(v2: Path, manager: str, systemd: bool, driver: str) -> None:
    """What the kubelet is told."""
    assert detect(manager, systemd=systemd, mount=v2).driver == driver


def test_systemd_driver_without_systemd(v2: Path) -> None:
    """Refused with the name of the setting."""
    with pytest.raises(ConfigError, match=r"runtime\.cgroup_manager is systemd"):
        detect("systemd", systemd=False, mount=v2)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kubepods.slice", "kubepods.slice"),
        ("kubepods-burstable.slice", "kubepods.slice/kubepods-burstable.slice"),
        (
            "kubepods-burstable-pod1a_2b.slice",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a_2b.slice",
        ),
        ("-.slice", ""),
    ],
)
def test_expand_slice(name: str, path: str) -> None:
    """A dash is a level: systemd.slice(5)."""
    assert expand_slice(name) == path


@pytest.mark.parametrize(
    "given",
    [
        "kubepods-besteffort.slice",
        "/kubepods-besteffort.slice",
        "/kubepods.slice/kubepods-besteffort.slice",
        "kubepods.slice/kubepods-besteffort.slice/",
    ],
)
def test_systemd_parent(v2: Path, given: str) -> None:
    """The last part of the path counts: the kubelet sends the whole of it."""
    assert with_systemd(v2).check_parent(given) == "kubepods-besteffort.slice"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "/",
        "/kubepods/pod1",
        "kubepods",
        "a.slice/b",
        ".slice",
        "-a.slice",
        "a--b.slice",
        "a-.slice",
        "a:b.slice",
        "a\0.slice",
    ],
)
def test_no_systemd_parent(v2: Path, given: str) -> None:
    """What systemd would not take; the message has what was given."""
    with pytest.raises(InvalidArgument, match="is not a systemd slice") as caught:
        with_systemd(v2).check_parent(given)
    assert repr(given) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "parent"),
    [
        ("/kubepods/pod1", "/kubepods/pod1"),
        ("kubepods/pod1", "/kubepods/pod1"),
        ("/kubepods/pod1/", "/kubepods/pod1"),
        ("", "/"),
        ("/a..b", "/a..b"),
    ],
)
def test_cgroupfs_parent(v2: Path, given: str, parent: str) -> None:
    """A path, always absolute."""
    assert cgroupfs(v2).check_parent(given) == parent


@pytest.mark.parametrize("given", ["/a/../../b", "..", "/a\0b"])
def test_no_cgroupfs_parent(v2: Path, given: str) -> None:
    """Nothing that leads out of the hierarchy."""
    with pytest.raises(InvalidArgument, match="cgroup_parent"):
        cgroupfs(v2).check_parent(given)


def test_paths_of_cgroupfs(v1: Path) -> None:
    """The same relative directory in each hierarchy."""
    cgroups = cgroupfs(v1)
    path = cgroups.spec_path("/kubepods/pod1", "c1")
    assert path == "/kubepods/pod1/crishim-c1"
    assert cgroups.relative_path(path) == "kubepods/pod1/crishim-c1"
    assert cgroups.directory(path, "memory") == v1 / "memory/kubepods/pod1/crishim-c1"
    assert cgroups.spec_path("/", "c1") == cgroups.spec_path("", "c1") == "/crishim-c1"
    assert cgroups.spec_path("/a/", "c1") == "/a/crishim-c1"


def test_paths_of_systemd(v2: Path) -> None:
    """SLICE:PREFIX:NAME for the runtime, which makes it a scope."""
    cgroups = with_systemd(v2)
    path = cgroups.spec_path("kubepods-pod1.slice", "c1")
    assert path == "kubepods-pod1.slice:crishim:c1"
    assert cgroups.relative_path(path) == "kubepods.slice/kubepods-pod1.slice/crishim-c1.scope"
    assert cgroups.directory(path, "memory") == v2 / "kubepods.slice/kubepods-pod1.slice/crishim-c1.scope"


def test_paths_below_the_root_slice(v2: Path) -> None:
    """Stay inside the hierarchy."""
    cgroups = with_systemd(v2)
    assert cgroups.relative_path("-.slice:crishim:c1") == "crishim-c1.scope"
    assert cgroups.directory("-.slice:crishim:c1", "memory") == v2 / "crishim-c1.scope"


def test_default_parent(v2: Path) -> None:
    """Valid for the driver, and one for each pod where that costs nothing."""
    for cgroups in (cgroupfs(v2), with_systemd(v2)):
        parent = cgroups.default_parent("s1")
        assert cgroups.check_parent(parent) == parent
    assert cgroupfs(v2).default_parent("s1") != cgroupfs(v2).default_parent("s2")


def test_oom_kills_of_version_1(v1: Path) -> None:
    """Not to be confused with oom_kill_disable."""
    cgroups = cgroupfs(v1)
    folder = v1 / "memory/p/crishim-c"
    folder.mkdir(parents=True)
    (folder / "memory.oom_control").write_text("oom_kill_disable 1\nunder_oom 0\noom_kill 3\n")
    assert cgroups.oom_kills("/p/crishim-c") == 3


def test_oom_kills_of_version_2(v2: Path) -> None:
    """Not to be confused with oom or oom_group_kill."""
    cgroups = with_systemd(v2)
    folder = v2 / "p.slice/crishim-c.scope"
    folder.mkdir(parents=True)
    (folder / "memory.events").write_text("low 0\nhigh 5\nmax 6\noom 7\noom_kill 2\noom_group_kill 9\n")
    assert cgroups.oom_kills("p.slice:crishim:c") == 2


def test_oom_kills_of_a_cgroup_that_is_gone(v1: Path) -> None:
    """None; old kernels do not count them either."""
    assert cgroupfs(v1).oom_kills("/p/crishim-c") == 0
    folder = v1 / "memory/p/crishim-c"
    folder.mkdir(parents=True)
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
    assert cgroupfs(v1).oom_kills("/p/crishim-c") == 0


def test_processes(v1: Path) -> None:
    """Those in the cgroup itself; none where it is gone."""
    folder = v1 / "pids/p/crishim-c"
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text("12\n7\n")
    assert cgroupfs(v1).processes("/p/crishim-c") == [12, 7]
    assert cgroupfs(v1).processes("/p/crishim-d") == []


def test_remove(v1: Path) -> None:
    """From every hierarchy, with all below it, and nothing beside it."""
    for controller in ("memory", "pids", "cpu,cpuacct"):
        (v1 / controller / "pods/one/a/b").mkdir(parents=True)
        (v1 / controller / "pods/other").mkdir(parents=True)
    cgroupfs(v1).remove("/pods/one/")
    for controller in ("memory", "pids", "cpu,cpuacct"):
        assert [path.name for path in (v1 / controller / "pods").iterdir()] == ["other"]


def test_remove_as_far_as_possible(v2: Path) -> None:
    """A cgroup with a process stays, with its parents; its siblings go. (A file stands for the process.)"""
    for name in ("a", "busy", "z"):
        (v2 / "pods/one" / name / "deep").mkdir(parents=True)
    (v2 / "pods/one/busy/deep/process").touch()
    cgroupfs(v2).remove("pods/one")
    assert [path.name for path in (v2 / "pods/one").iterdir()] == ["busy"]
    assert (v2 / "pods/one/busy/deep/process").exists()


@pytest.mark.parametrize("relative", ["", "/", "."])
def test_remove_nothing_means_nothing(v1: Path, relative: str) -> None:
    """An empty path does not mean every cgroup of the host."""
    (v1 / "memory/someone").mkdir()
    cgroupfs(v1).remove(relative)
    assert (v1 / "memory/someone").is_dir()


def test_remove_what_is_gone(v1: Path) -> None:
    """Is no error."""
    cgroupfs(v1).remove("pods/one")
