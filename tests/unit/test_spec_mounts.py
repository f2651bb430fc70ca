"""The mounts of a container: what it always has, what the pod gives, and how the kubelet's replace them."""

from __future__ import annotations

from typing import Any

import pytest

from crishim.errors import InvalidArgument
from crishim.model.cri import Mount, MountPropagation
from crishim.spec.mounts import (
    PodFiles,
    check,
    combine,
    pod_mounts,
    requested_mounts,
    root_propagation,
    system_mounts,
)
from crishim.spec.oci import OciMount

PRIVATE = MountPropagation.PROPAGATION_PRIVATE
SLAVE = MountPropagation.PROPAGATION_HOST_TO_CONTAINER
SHARED = MountPropagation.PROPAGATION_BIDIRECTIONAL
FILES = PodFiles(shm="/pod/shm", resolv_conf="/pod/resolv.conf", hostname="/pod/hostname")


def everything(*requested: Mount, files: PodFiles = FILES, privileged: bool = False) -> list[OciMount]:
    """All mounts of a container, the sources being what was asked for."""
    sources = {mount.host_path: mount.host_path for mount in requested}
    return combine(
        system_mounts(list(requested), privileged=privileged),
        pod_mounts(files, readonly_root=False),
        requested_mounts(list(requested), sources),
    )


def at(mounts: list[OciMount], destination: str) -> OciMount:
    """The only mount at a place."""
    (found,) = [mount for mount in mounts if mount.destination == destination]
    return found


def places(mounts: list[OciMount]) -> list[str]:
    """Where they are, in order."""
    return [mount.destination for mount in mounts]


def test_system_mounts() -> None:
    """The default file systems of the runtime specification; sysfs and cgroups read-only."""
    assert system_mounts([], privileged=False) == [
        OciMount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        OciMount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        OciMount(
            "/dev/pts", "devpts", "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        OciMount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        OciMount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
        OciMount("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ]  # fmt: skip


def test_system_mounts_of_a_privileged_container() -> None:
    """sysfs and cgroups can be written."""
    by_place = {mount.destination: mount for mount in system_mounts([], privileged=True)}
    for place in ("/sys", "/sys/fs/cgroup"):
        assert "rw" in by_place[place].options
        assert "ro" not in by_place[place].options


def test_pod_mounts() -> None:
    """Shared memory, resolv.conf and hostname of the pod: no devices, programs or set-user-ID bits in them."""
    options = ["rbind", "rw", "nosuid", "nodev", "noexec"]
    assert pod_mounts(FILES, readonly_root=False) == [
        OciMount("/dev/shm", "bind", "/pod/shm", options),
        OciMount("/etc/resolv.conf", "bind", "/pod/resolv.conf", options),
        OciMount("/etc/hostname", "bind", "/pod/hostname", options),
    ]


def test_pod_mounts_with_a_read_only_root() -> None:
    """The files are part of the root then; shared memory can still be written."""
    mounts = pod_mounts(FILES, readonly_root=True)
    assert "rw" in at(mounts, "/dev/shm").options
    for place in ("/etc/resolv.conf", "/etc/hostname"):
        assert "ro" in at(mounts, place).options
        assert "rw" not in at(mounts, place).options


def test_pod_without_files() -> None:
    """What the pod has not is not mounted."""
    assert pod_mounts(PodFiles("", "", ""), readonly_root=False) == []
    assert places(pod_mounts(PodFiles("", "/r", ""), readonly_root=False)) == ["/etc/resolv.conf"]


@pytest.mark.parametrize("propagation", [(PRIVATE, "rprivate"), (SLAVE, "rslave"), (SHARED, "rshared")])
@pytest.mark.parametrize("readonly", [False, True])
def test_requested_mounts(propagation: tuple[MountPropagation, str], readonly: bool) -> None:
    """Recursive binds with the propagation that was asked for, from where the symlinks lead."""
    wanted = Mount(container_path="/data", host_path="/link", readonly=readonly, propagation=propagation[0])
    assert requested_mounts([wanted], {"/link": "/real"}) == [
        OciMount("/data", "bind", "/real", ["rbind", propagation[1], "ro" if readonly else "rw"])
    ]


@pytest.mark.parametrize(
    "spelling", ["/etc/resolv.conf", "/etc/resolv.conf/", "//etc//./resolv.conf", "/a/../etc/resolv.conf"]
)
def test_requested_mount_replaces_that_of_the_pod(spelling: str) -> None:
    """However the path is written."""
    found = everything(Mount(container_path=spelling, host_path="/mine"))
    assert at(found, "/etc/resolv.conf").source == "/mine"
    assert len(found) == len(everything())


@pytest.mark.parametrize("place", ["/dev/shm", "/etc/hostname", "/sys/fs/cgroup", "/proc", "/dev/mqueue"])
def test_requested_mount_replaces_the_default(place: str) -> None:
    """A memory volume at /dev/shm, say: one mount, and it is the kubelet's."""
    assert at(everything(Mount(container_path=place, host_path="/mine")), place).source == "/mine"


def test_recursive_read_only_mount() -> None:
    """``rro`` takes in the mounts below, which ``ro`` does not."""
    wanted = Mount(container_path="/data", host_path="/d", readonly=True, recursive_read_only=True)
    check(wanted)
    assert requested_mounts([wanted], {"/d": "/d"})[0].options == ["rbind", "rprivate", "rro"]


@pytest.mark.parametrize(
    "fields",
    [{"readonly": False}, {"readonly": True, "propagation": SLAVE}, {"readonly": True, "propagation": SHARED}],
)
def test_impossible_recursive_read_only_mounts(fields: dict[str, Any]) -> None:
    """The CRI wants it read-only and private: it must not be quietly ignored."""
    with pytest.raises(InvalidArgument, match="/data is recursive_read_only"):
        check(Mount(container_path="/data", host_path="/d", recursive_read_only=True, **fields))
    check(Mount(container_path="/data", host_path="/d", **fields))


@pytest.mark.parametrize("spelling", ["/dev", "/dev/", "//dev"])
def test_host_dev(spelling: str) -> None:
    """With /dev of the host nothing is mounted over its pts and mqueue; the pod keeps its shared memory."""
    found = everything(Mount(container_path=spelling, host_path="/dev", propagation=SHARED), privileged=True)
    assert at(found, "/dev").source == "/dev"
    assert [place for place in places(found) if place.startswith("/dev/")] == ["/dev/shm"]


def test_mounts_inside_a_requested_dev() -> None:
    """What the kubelet itself asks for below /dev is mounted."""
    found = everything(
        Mount(container_path="/dev", host_path="/dev"), Mount(container_path="/dev/pts", host_path="/dev/pts")
    )
    assert at(found, "/dev/pts").type == "bind"
    assert at(found, "/dev/pts").source == "/dev/pts"


def test_parents_come_before_children() -> None:
    """Else the parent would hide the child; those of the same depth stay as they were given."""
    found = places(
        everything(
            Mount(container_path="/data/a/b", host_path="/1"),
            Mount(container_path="/z", host_path="/2"),
            Mount(container_path="/data/a", host_path="/3"),
            Mount(container_path="/data", host_path="/4"),
            Mount(container_path="/etc", host_path="/5"),
            Mount(container_path="/a", host_path="/6"),
        )
    )
    assert found.index("/data") < found.index("/data/a") < found.index("/data/a/b")
    assert found.index("/etc") < found.index("/etc/resolv.conf")
    assert found.index("/dev") < found.index("/dev/shm")
    assert found.index("/sys") < found.index("/sys/fs/cgroup")
    assert found.index("/z") < found.index("/a")


def test_the_last_request_for_a_place_counts() -> None:
    """One mount is made, as if the second had hidden the first."""
    found = everything(Mount(container_path="/d", host_path="/1"), Mount(container_path="/d/", host_path="/2"))
    assert at(found, "/d").source == "/2"


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ([], ""),
        ([PRIVATE], ""),
        ([SLAVE, PRIVATE], "rslave"),
        ([SHARED], "rshared"),
        ([SLAVE, SHARED, PRIVATE], "rshared"),
    ],
)
def test_root_propagation(kinds: list[MountPropagation], wanted: str) -> None:
    """The most that any mount needs."""
    assert root_propagation([Mount(propagation=kind) for kind in kinds]) == wanted


@pytest.mark.parametrize("path", ["", "data", "./data", "/", "//", "///", "/.", "/..", "/a/.."])
def test_impossible_container_paths(path: str) -> None:
    """Relative ones, and the root itself in any spelling."""
    with pytest.raises(InvalidArgument, match=r"container_path '.*' (is not absolute|would hide the whole container)$"):
        check(Mount(container_path=path, host_path="/x"))


@pytest.mark.parametrize("path", ["", "data", "../data"])
def test_impossible_host_paths(path: str) -> None:
    """The message names the mount as the pod's author knows it."""
    with pytest.raises(InvalidArgument, match=r"host_path .* of /d is"):
        check(Mount(container_path="/d", host_path=path))


def test_possible_mounts() -> None:
    """The root of the host is one of them."""
    check(Mount(container_path="/host", host_path="/"))
    check(Mount(container_path="/a b/ü", host_path="/a:b,c"))
