"""The mounts of a container: what every container has, what the pod gives, what the kubelet asks for."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from crishim.errors import InvalidArgument
from crishim.model.cri import Mount, MountPropagation
from crishim.spec.oci import OciMount

_PROPAGATION = {
    MountPropagation.PROPAGATION_PRIVATE: "rprivate",
    MountPropagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    MountPropagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}


@dataclass(frozen=True)
class PodFiles:
    """Host paths that every container of a pod sees; empty ones are not mounted."""

    shm: str
    resolv_conf: str
    hostname: str


def system_mounts(requested: list[Mount], *, privileged: bool) -> list[OciMount]:
    """proc, dev, sys and what belongs in them (runtime-spec, config-linux.md, default filesystems).

    A ``requested`` mount on /dev brings its own pts and mqueue: nothing is put into a directory of the host.
    """
    access = "rw" if privileged else "ro"
    own_dev = all(_destination(mount) != "/dev" for mount in requested)
    everything = [
        OciMount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        OciMount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        OciMount(
            "/dev/pts", "devpts", "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        OciMount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        OciMount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", access]),
        OciMount("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", access]),
    ]  # fmt: skip
    return [mount for mount in everything if own_dev or not mount.destination.startswith("/dev/")]


def pod_mounts(files: PodFiles, *, readonly_root: bool) -> list[OciMount]:
    """What the pod's containers share."""
    access = "ro" if readonly_root else "rw"
    mounts = []
    if files.shm:
        mounts.append(OciMount("/dev/shm", "bind", files.shm, ["rbind", "rw", "nosuid", "nodev", "noexec"]))
    for destination, source in (("/etc/resolv.conf", files.resolv_conf), ("/etc/hostname", files.hostname)):
        if source:
            mounts.append(OciMount(destination, "bind", source, ["rbind", access, "nosuid", "nodev", "noexec"]))
    return mounts


def requested_mounts(mounts: list[Mount], sources: Mapping[str, str]) -> list[OciMount]:
    """The kubelet's mounts; ``sources`` maps each ``host_path`` to where its symlinks lead."""
    return [
        OciMount(
            _destination(mount),
            "bind",
            sources[mount.host_path],
            ["rbind", _PROPAGATION[mount.propagation], _access(mount)],
        )
        for mount in mounts
    ]


def _destination(mount: Mount) -> str:
    """The normal form; normpath alone would keep two leading slashes."""
    return posixpath.normpath("/" + mount.container_path.lstrip("/"))


def _access(mount: Mount) -> str:
    if mount.recursive_read_only:
        return "rro"
    return "ro" if mount.readonly else "rw"


def combine(*groups: list[OciMount]) -> list[OciMount]:
    """All mounts, a later one replacing an earlier one at the same place, parents before children."""
    by_destination = {mount.destination: mount for group in groups for mount in group}
    return sorted(by_destination.values(), key=lambda mount: mount.destination.rstrip("/").count("/"))


def root_propagation(mounts: list[Mount]) -> str:
    """What the root must be so that the mounts' own propagation can work."""
    kinds = {mount.propagation for mount in mounts}
    if MountPropagation.PROPAGATION_BIDIRECTIONAL in kinds:
        return "rshared"
    if MountPropagation.PROPAGATION_HOST_TO_CONTAINER in kinds:
        return "rslave"
    return ""


def check(mount: Mount) -> None:
    """Refuse what a mount may not be, whatever the host looks like."""
    if not mount.container_path.startswith("/"):
        raise InvalidArgument(f"mount container_path {mount.container_path!r} is not absolute")
    if _destination(mount) == "/":
        raise InvalidArgument("mount container_path '/' would hide the whole container")
    if not mount.host_path.startswith("/"):
        raise InvalidArgument(f"mount host_path {mount.host_path!r} of {mount.container_path} is not absolute")
    if mount.recursive_read_only and not mount.readonly:
        raise InvalidArgument(f"mount {mount.container_path} is recursive_read_only but not readonly")
    if mount.recursive_read_only and mount.propagation is not MountPropagation.PROPAGATION_PRIVATE:
        raise InvalidArgument(f"mount {mount.container_path} is recursive_read_only, its propagation must be private")
