"""What the kubelet asks for, as frozen values with the CRI's own field names.

A test compares every struct with the message of the same name in ``proto/runtime/v1/api.proto``, so that a
field that the CRI gains cannot be lost on its way in. Wrapped integers (``Int64Value``) are ``int | None``.
Defaults are proto3's: empty, zero, false.
"""

from __future__ import annotations

import enum

import msgspec


class Value(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all frozen values that are stored or sent."""


class NamespaceMode(enum.IntEnum):
    """Who shares a namespace with a container."""

    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class MountPropagation(enum.IntEnum):
    """Which mount events cross between host and container."""

    PROPAGATION_PRIVATE = 0
    PROPAGATION_HOST_TO_CONTAINER = 1
    PROPAGATION_BIDIRECTIONAL = 2


class Protocol(enum.IntEnum):
    """The transport of a port mapping."""

    TCP = 0
    UDP = 1
    SCTP = 2


class SupplementalGroupsPolicy(enum.IntEnum):
    """Whether the groups of the image's /etc/group count."""

    Merge = 0
    Strict = 1


class ProfileType(enum.IntEnum):
    """Which seccomp or AppArmor profile."""

    RuntimeDefault = 0
    Unconfined = 1
    Localhost = 2


class DNSConfig(Value, frozen=True):
    """The content of resolv.conf(5)."""

    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []


class PortMapping(Value, frozen=True):
    """A port of the host that leads into the pod."""

    protocol: Protocol = Protocol.TCP
    container_port: int = 0
    host_port: int = 0
    host_ip: str = ""


class IDMapping(Value, frozen=True):
    """One range of a user namespace's map."""

    host_id: int = 0
    container_id: int = 0
    length: int = 0


class ImageSpec(Value, frozen=True):
    """An image as the caller names it."""

    image: str = ""
    annotations: dict[str, str] = {}
    user_specified_image: str = ""
    runtime_handler: str = ""
    image_ref: str = ""


class Mount(Value, frozen=True):
    """A mount into the container."""

    container_path: str = ""
    host_path: str = ""
    readonly: bool = False
    selinux_relabel: bool = False
    propagation: MountPropagation = MountPropagation.PROPAGATION_PRIVATE
    uidMappings: list[IDMapping] = []
    gidMappings: list[IDMapping] = []
    recursive_read_only: bool = False
    image: ImageSpec | None = None
    image_sub_path: str = ""


class UserNamespace(Value, frozen=True):
    """The user namespace of a pod."""

    mode: NamespaceMode = NamespaceMode.POD
    uids: list[IDMapping] = []
    gids: list[IDMapping] = []


class NamespaceOption(Value, frozen=True):
    """Which namespaces are shared with whom."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    userns_options: UserNamespace | None = None


class SELinuxOption(Value, frozen=True):
    """The parts of an SELinux label."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class SecurityProfile(Value, frozen=True):
    """A seccomp or AppArmor profile; ``localhost_ref`` only with Localhost."""

    profile_type: ProfileType = ProfileType.RuntimeDefault
    localhost_ref: str = ""


class HugepageLimit(Value, frozen=True):
    """A limit in bytes for one page size such as ``2MB``."""

    page_size: str = ""
    limit: int = 0


class LinuxContainerResources(Value, frozen=True):
    """Limits; CPU times in microseconds, memory in bytes, zero meaning not given."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit_in_bytes: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: list[HugepageLimit] = []
    unified: dict[str, str] = {}
    memory_swap_limit_in_bytes: int = 0


class LinuxSandboxSecurityContext(Value, frozen=True):
    """What all of a pod's processes may do."""

    namespace_options: NamespaceOption | None = None
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: list[int] = []
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.Merge
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    seccomp_profile_path: str = ""


class LinuxPodSandboxConfig(Value, frozen=True):
    """The Linux part of a pod."""

    cgroup_parent: str = ""
    security_context: LinuxSandboxSecurityContext | None = None
    sysctls: dict[str, str] = {}
    overhead: LinuxContainerResources | None = None
    resources: LinuxContainerResources | None = None


class PodSandboxMetadata(Value, frozen=True):
    """What identifies a pod sandbox to the kubelet."""

    name: str = ""
    uid: str = ""
    namespace: str = ""
    attempt: int = 0


class PodSandboxConfig(Value, frozen=True):
    """A pod, as the kubelet wants it. The Windows part is refused at the door."""

    metadata: PodSandboxMetadata | None = None
    hostname: str = ""
    log_directory: str = ""
    dns_config: DNSConfig | None = None
    port_mappings: list[PortMapping] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    linux: LinuxPodSandboxConfig | None = None


class KeyValue(Value, frozen=True):
    """An environment variable; the value may be any bytes."""

    key: str = ""
    value: bytes = b""


class Capability(Value, frozen=True):
    """Changes to the default capability set; names with or without ``CAP_``, or ``ALL``."""

    add_capabilities: list[str] = []
    drop_capabilities: list[str] = []
    add_ambient_capabilities: list[str] = []


class LinuxContainerSecurityContext(Value, frozen=True):
    """What a container's processes may do."""

    capabilities: Capability | None = None
    privileged: bool = False
    namespace_options: NamespaceOption | None = None
    selinux_options: SELinuxOption | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: list[int] = []
    supplemental_groups_policy: SupplementalGroupsPolicy = SupplementalGroupsPolicy.Merge
    no_new_privs: bool = False
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None
    apparmor_profile: str = ""
    seccomp_profile_path: str = ""


class LinuxContainerConfig(Value, frozen=True):
    """The Linux part of a container."""

    resources: LinuxContainerResources | None = None
    security_context: LinuxContainerSecurityContext | None = None


class LinuxContainerUser(Value, frozen=True):
    """The identity that a container's first process got."""

    uid: int = 0
    gid: int = 0
    supplemental_groups: list[int] = []


class Device(Value, frozen=True):
    """A device of the host for the container; permissions are a subset of ``rwm``."""

    container_path: str = ""
    host_path: str = ""
    permissions: str = ""


class CDIDevice(Value, frozen=True):
    """A device by its Container Device Interface name."""

    name: str = ""


class ContainerMetadata(Value, frozen=True):
    """What identifies a container within its pod."""

    name: str = ""
    attempt: int = 0


class ContainerConfig(Value, frozen=True):
    """A container, as the kubelet wants it. The Windows part is refused at the door."""

    metadata: ContainerMetadata | None = None
    image: ImageSpec | None = None
    command: list[str] = []
    args: list[str] = []
    working_dir: str = ""
    envs: list[KeyValue] = []
    mounts: list[Mount] = []
    devices: list[Device] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    linux: LinuxContainerConfig | None = None
    CDI_devices: list[CDIDevice] = []
    stop_signal: int = 0
