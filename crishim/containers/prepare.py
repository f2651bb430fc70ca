"""Gathers what decides a container's spec: looks at files, devices and the image; blocks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from crishim.containers.check import apparmor_profile, seccomp_profile
from crishim.containers.room import Room
from crishim.containers.table import ContainerTable
from crishim.errors import FailedPrecondition, HostFailure, InvalidArgument
from crishim.host.facts import HostFacts
from crishim.host.files import read_in_root
from crishim.host.namespaces import NamespaceKind
from crishim.images.manifest import node_architecture
from crishim.model.cri import (
    ContainerConfig,
    Device,
    LinuxContainerSecurityContext,
    Mount,
    MountPropagation,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
)
from crishim.model.records import ContainerRecord, ContainerState, ImageRecord, SandboxRecord
from crishim.spec import generate, oci
from crishim.spec.mounts import PodFiles
from crishim.spec.resources import Controllers
from crishim.spec.user import AccountFiles, Identity, resolve

_ACCOUNT_FILE_LIMIT = 4 << 20
_PROFILE_LIMIT = 4 << 20


@dataclass(frozen=True)
class Plan:
    """What is to be created."""

    record: ContainerRecord
    sandbox: SandboxRecord
    image: ImageRecord


@dataclass(frozen=True)
class Outside:
    """What was found at the paths that the kubelet names, on file systems that may be anybody's."""

    mount_sources: Mapping[str, str]
    devices: tuple[tuple[oci.LinuxDevice, str], ...]
    seccomp: generate.SeccompChoice | None


def look_outside(facts: HostFacts, config: ContainerConfig, log: Path | None) -> Outside:
    """Look, and make the log directory; a hung file system holds this for ever, so it acquires nothing."""
    _, security = generate.linux_of(config)
    if log is not None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise HostFailure(f"cannot make the log directory {log.parent}: {err.strerror}") from err
    return Outside(
        mount_sources(config.mounts),
        tuple(_all_devices() if security.privileged else _devices(config.devices)),
        _seccomp(security, facts),
    )


def identity(config: ContainerConfig, image: ImageRecord, root: Path) -> Identity:
    """Who the container runs as, by the account files of its root file system."""
    _, security = generate.linux_of(config)
    files = AccountFiles.parse(
        read_in_root(root, "/etc/passwd", _ACCOUNT_FILE_LIMIT), read_in_root(root, "/etc/group", _ACCOUNT_FILE_LIMIT)
    )
    return resolve(security, image.config.user, files)


def inputs(room: Room, plan: Plan, who: Identity, outside: Outside) -> generate.Inputs:
    """Everything that :func:`crishim.spec.generate.generate` decides from."""
    config = plan.record.config
    _, security = generate.linux_of(config)
    return generate.Inputs(
        config=config,
        image=plan.image.config,
        identity=who,
        pod=_pod(room, plan),
        host=generate.HostInputs(
            room.facts.capabilities,
            room.facts.lowest_oom_score_adj,
            Controllers(room.cgroups.controllers, room.cgroups.unified, room.cgroups.swap),
        ),
        cgroups_path=plan.record.cgroup,
        mount_sources=outside.mount_sources,
        devices=outside.devices,
        pids_limit=room.settings.pids_limit,
        apparmor_profile=apparmor_profile(security, room.facts),
        seccomp=outside.seccomp,
        annotations=_annotations(plan),
    )


def _seccomp(security: LinuxContainerSecurityContext, facts: HostFacts) -> generate.SeccompChoice | None:
    profile = seccomp_profile(security)
    if profile is None:
        return None
    architecture = node_architecture()
    if profile.profile_type is ProfileType.RuntimeDefault:
        return generate.SeccompChoice(architecture, facts.kernel)
    data = read_in_root(Path("/"), profile.localhost_ref, _PROFILE_LIMIT)
    if data is None:
        raise FailedPrecondition(f"seccomp profile {profile.localhost_ref} is not a file that can be read")
    return generate.SeccompChoice(architecture, facts.kernel, profile.localhost_ref, data)


def _pod(room: Room, plan: Plan) -> generate.PodInputs:
    sandbox = plan.sandbox
    _, security = generate.linux_of(plan.record.config)
    options = security.namespace_options or sandbox.namespaces
    folder = room.paths.sandbox(sandbox.id)
    pinned = {kind.value: str(room.paths.namespaces(sandbox.id) / kind.value) for kind in NamespaceKind}
    host_ipc = sandbox.namespaces.ipc is NamespaceMode.NODE
    return generate.PodInputs(
        hostname=os.uname().nodename if sandbox.host_network else sandbox.hostname,
        namespaces=generate.namespace_paths(
            options.network, options.ipc, pinned, _pid_namespace(room.table, options, sandbox)
        ),
        files=PodFiles(
            shm="/dev/shm" if host_ipc else str(room.paths.shm(sandbox.id)),
            resolv_conf=str(folder / "resolv.conf"),
            hostname=str(folder / "hostname"),
        ),
    )


def _pid_namespace(table: ContainerTable, options: NamespaceOption, sandbox: SandboxRecord) -> str | None:
    """The path of the PID namespace to join, empty for a new one, None for the host's."""
    if options.pid is NamespaceMode.CONTAINER:
        return ""
    if options.pid is NamespaceMode.NODE:
        return None
    if options.pid is NamespaceMode.POD:
        if sandbox.holder is None:
            raise FailedPrecondition(f"pod sandbox {sandbox.id} has lost its PID namespace")
        return f"/proc/{sandbox.holder.pid}/ns/pid"
    target = table.get(options.target_id)
    if target.record.sandbox_id != sandbox.id:
        raise InvalidArgument(f"target_id {options.target_id} is a container of another pod sandbox")
    if target.record.process is None or target.record.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"target_id {options.target_id} is not running")
    return f"/proc/{target.record.process.pid}/ns/pid"


def mount_sources(mounts: list[Mount]) -> dict[str, str]:
    """Where each ``host_path`` leads; a missing one is an error, as the CRI says, and is never made."""
    sources = {}
    for mount in mounts:
        source = os.path.realpath(mount.host_path)
        try:
            os.stat(source)
        except OSError as err:
            reason = "does not exist" if err.errno == errno.ENOENT else f"cannot be used: {err.strerror}"
            raise FailedPrecondition(f"mount source {mount.host_path} of {mount.container_path} {reason}") from err
        sources[mount.host_path] = source
    _check_propagation(mounts, sources)
    return sources


def _check_propagation(mounts: list[Mount], sources: Mapping[str, str]) -> None:
    """A mount can only pass events on if the host's own mount does (mount_namespaces(7))."""
    for mount in mounts:
        if mount.propagation is MountPropagation.PROPAGATION_PRIVATE:
            continue
        tags = _propagation_of(sources[mount.host_path])
        bidirectional = mount.propagation is MountPropagation.PROPAGATION_BIDIRECTIONAL
        if "shared" not in tags and (bidirectional or "master" not in tags):
            needed = "shared" if bidirectional else "shared or slave"
            raise FailedPrecondition(f"mount source {mount.host_path} is not on a {needed} mount")


def _propagation_of(path: str) -> set[str]:
    """The optional fields of the mount that holds ``path``: proc_pid_mountinfo(5)."""
    best, tags = "", set[str]()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        point = fields[4].replace("\\040", " ")
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, tags = point, {field.partition(":")[0] for field in fields[6 : fields.index("-")]}
    return tags


def _devices(wanted: list[Device]) -> Iterator[tuple[oci.LinuxDevice, str]]:
    for device in wanted:
        access = device.permissions or "rwm"
        if set(access) - set("rwm"):
            raise InvalidArgument(f"device {device.host_path} has permissions {access!r}: a subset of rwm is possible")
        host = Path(os.path.realpath(device.host_path))
        if not host.exists():
            raise FailedPrecondition(f"device {device.host_path} does not exist")
        target = device.container_path or device.host_path
        if host.is_dir():
            for below in sorted(host.rglob("*")):
                node = _node(below, f"{target}/{below.relative_to(host)}")
                if node is not None:
                    yield node, access
            continue
        node = _node(host, target)
        if node is None:
            raise InvalidArgument(f"device {device.host_path} is not a device")
        yield node, access


def _node(host: Path, target: str) -> oci.LinuxDevice | None:
    found = host.lstat()
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return None
    return oci.LinuxDevice(
        path=target,
        type="c" if stat.S_ISCHR(found.st_mode) else "b",
        major=os.major(found.st_rdev),
        minor=os.minor(found.st_rdev),
        file_mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
    )


_RUNTIME_OWN = ("pts", "shm", "fd", "mqueue", "console", "ptmx", "stdin", "stdout", "stderr", ".lxc", ".udev")


def _all_devices() -> Iterator[tuple[oci.LinuxDevice, str]]:
    """Every device of the host, for a privileged container; what the OCI runtime makes itself is left to it."""
    for top, folders, files in os.walk("/dev"):
        if top == "/dev":
            folders[:] = [name for name in folders if name not in _RUNTIME_OWN]
        for name in files:
            if top == "/dev" and name in _RUNTIME_OWN:
                continue
            path = Path(top, name)
            try:
                node = _node(path, str(path))
            except OSError:
                continue
            if node is not None:
                yield node, "rwm"


def _annotations(plan: Plan) -> dict[str, str]:
    """What tools that look at bundles know containers by: the names that CRI-O and containerd share."""
    meta, config = plan.sandbox.metadata, plan.record.config
    return {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": config.metadata.name if config.metadata else "",
        "io.kubernetes.cri.sandbox-id": plan.sandbox.id,
        "io.kubernetes.cri.sandbox-name": meta.name,
        "io.kubernetes.cri.sandbox-namespace": meta.namespace,
        "io.kubernetes.cri.sandbox-uid": meta.uid,
        "io.kubernetes.cri.image-name": config.image.image if config.image else "",
    }
