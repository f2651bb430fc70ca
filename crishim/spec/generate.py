"""From what the kubelet asks, what the image says and what the host can do, to the OCI runtime spec.

Pure: everything that had to be looked up is in :class:`Inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crishim.errors import InvalidArgument
from crishim.model.cri import (
    ContainerConfig,
    LinuxContainerConfig,
    LinuxContainerResources,
    LinuxContainerSecurityContext,
    NamespaceMode,
)
from crishim.model.records import ImageConfig
from crishim.spec import capabilities, mounts, oci, resources, seccomp
from crishim.spec.user import Identity

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class PodInputs:
    """What the container's pod contributes."""

    hostname: str
    namespaces: Mapping[str, str]
    """Namespace type to path; types that are not named are the host's own."""
    files: mounts.PodFiles


@dataclass(frozen=True)
class HostInputs:
    """What the host contributes."""

    capabilities: frozenset[int]
    lowest_oom_score_adj: int
    controllers: resources.Controllers


@dataclass(frozen=True)
class SeccompChoice:
    """Which filter: the default profile, or one read from a file."""

    architecture: str
    kernel: str
    file: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Inputs:
    """All that decides a container's spec."""

    config: ContainerConfig
    image: ImageConfig
    identity: Identity
    pod: PodInputs
    host: HostInputs
    cgroups_path: str
    mount_sources: Mapping[str, str]
    devices: tuple[tuple[oci.LinuxDevice, str], ...] = ()
    """Devices of the host with the access that the container has to each."""
    pids_limit: int = 0
    apparmor_profile: str = ""
    seccomp: SeccompChoice | None = None
    annotations: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Generated:
    """The spec, and remarks for the log."""

    spec: oci.Spec
    remarks: tuple[str, ...]


def linux_of(config: ContainerConfig) -> tuple[LinuxContainerResources, LinuxContainerSecurityContext]:
    """The Linux parts of ``config``, empty where absent."""
    linux = config.linux or LinuxContainerConfig()
    return linux.resources or LinuxContainerResources(), linux.security_context or LinuxContainerSecurityContext()


def generate(inputs: Inputs) -> Generated:
    """The spec of one container."""
    wanted, security = linux_of(inputs.config)
    decided = resources.decide(wanted, inputs.host.controllers, inputs.pids_limit, _device_rules(inputs))
    unified = inputs.host.controllers.unified
    all_mounts = mounts.combine(
        mounts.system_mounts(inputs.config.mounts, privileged=security.privileged),
        mounts.pod_mounts(inputs.pod.files, readonly_root=security.readonly_rootfs),
        mounts.requested_mounts(inputs.config.mounts, inputs.mount_sources),
    )
    namespaces = [oci.Namespace("mount"), *(oci.Namespace(k, p) for k, p in inputs.pod.namespaces.items())]
    if unified and not security.privileged:
        namespaces.append(oci.Namespace("cgroup"))
    masked = [] if security.privileged else security.masked_paths
    readonly = [] if security.privileged else security.readonly_paths
    process = _process(inputs, wanted, security)
    spec = oci.Spec(
        oci_version=oci.VERSION,
        process=process,
        root=oci.Root("rootfs", security.readonly_rootfs),
        hostname=inputs.pod.hostname if inputs.pod.namespaces.get("uts") == "" else "",
        mounts=all_mounts,
        annotations=dict(inputs.annotations or {}),
        linux=oci.Linux(
            namespaces=namespaces,
            cgroups_path=inputs.cgroups_path,
            resources=decided.resources,
            devices=[device for device, _ in inputs.devices],
            masked_paths=masked,
            readonly_paths=readonly,
            rootfs_propagation=mounts.root_propagation(inputs.config.mounts),
            seccomp=_seccomp(inputs.seccomp, process.capabilities.bounding),
        ),
    )
    return Generated(spec, decided.left_out + _oom_remark(wanted, inputs.host))


def _seccomp(choice: SeccompChoice | None, granted: list[str]) -> oci.Seccomp | None:
    if choice is None:
        return None
    if choice.file:
        return seccomp.from_file(choice.data, choice.file, choice.architecture, granted, choice.kernel)
    return seccomp.runtime_default(choice.architecture, granted)


def _process(inputs: Inputs, wanted: LinuxContainerResources, security: LinuxContainerSecurityContext) -> oci.Process:
    user = inputs.identity.user
    return oci.Process(
        # the main group is also an additional one, else a set-group-ID program could shed it (CVE-2022-2995)
        user=oci.User(user.uid, user.gid, user.supplemental_groups),
        args=arguments(inputs.config, inputs.image),
        cwd=inputs.config.working_dir or inputs.image.working_dir or "/",
        env=environment(inputs.config, inputs.image, inputs.pod.hostname, inputs.identity.home),
        terminal=inputs.config.tty,
        capabilities=capabilities.wanted(
            security.capabilities,
            privileged=security.privileged,
            host=inputs.host.capabilities,
            root=user.uid == 0,
        ),
        no_new_privileges=security.no_new_privs,
        oom_score_adj=max(wanted.oom_score_adj, inputs.host.lowest_oom_score_adj),
        apparmor_profile=inputs.apparmor_profile,
    )


def arguments(config: ContainerConfig, image: ImageConfig) -> list[str]:
    """``command`` replaces ENTRYPOINT and drops CMD; ``args`` replace CMD: the Kubernetes rules."""
    command, args = config.command, config.args
    if not command:
        command = image.entrypoint or []
        args = args or image.cmd or []
    if not [*command, *args]:
        raise InvalidArgument("no command: neither the container nor its image names one")
    return [*command, *args]


def environment(config: ContainerConfig, image: ImageConfig, hostname: str, home: str) -> list[str]:
    """The image's variables, then the container's own, the last one of a name winning."""
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if config.tty:
        merged["TERM"] = "xterm"
    for item in image.env or []:
        name, found, value = item.partition("=")
        if found and name:
            merged[name] = value
    for pair in config.envs:
        if not pair.key or "=" in pair.key or "\0" in pair.key:
            raise InvalidArgument(f"environment variable name {pair.key!r} is empty or has '=' or NUL in it")
        try:
            merged[pair.key] = pair.value.decode()
        except UnicodeDecodeError as err:
            raise InvalidArgument(
                f"environment variable {pair.key} is not UTF-8, which the OCI runtime spec cannot carry"
            ) from err
        if "\0" in merged[pair.key]:
            raise InvalidArgument(f"environment variable {pair.key} has a NUL in its value")
    merged.setdefault("HOME", home)
    return [f"{name}={value}" for name, value in merged.items()]


def _device_rules(inputs: Inputs) -> list[oci.DeviceRule]:
    _, security = linux_of(inputs.config)
    if security.privileged:
        return [oci.DeviceRule(allow=True)]
    rules = [oci.DeviceRule(allow=False)]
    rules += [
        oci.DeviceRule(True, access, device.type, device.major, device.minor) for device, access in inputs.devices
    ]
    return rules


def _oom_remark(wanted: LinuxContainerResources, host: HostInputs) -> tuple[str, ...]:
    if wanted.oom_score_adj >= host.lowest_oom_score_adj:
        return ()
    return (f"oom_score_adj {wanted.oom_score_adj}: the daemon may set no lower than {host.lowest_oom_score_adj}",)


def namespace_paths(
    network: NamespaceMode, ipc: NamespaceMode, pinned: Mapping[str, str], pid: str | None
) -> dict[str, str]:
    """Namespace type to path for a container of a pod; ``pid`` is a path, empty for a new one, None for the host's."""
    paths = {}
    if network is not NamespaceMode.NODE:
        paths["network"] = pinned["net"]
        paths["uts"] = pinned["uts"]
    if ipc is not NamespaceMode.NODE:
        paths["ipc"] = pinned["ipc"]
    if pid is not None:
        paths["pid"] = pid
    return paths
