"""What the daemon remembers of images, layers, sandboxes and containers. Times are nanoseconds since 1970."""

from __future__ import annotations

import enum

import msgspec

from crishim.model.cri import (
    ContainerConfig,
    LinuxContainerUser,
    Mount,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
    PodSandboxMetadata,
    Value,
)


class ImageConfig(msgspec.Struct, frozen=True, rename="pascal", omit_defaults=True):
    """The ``config`` object of an image: how its containers run (OCI image-spec, config.md)."""

    user: str = ""
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str = ""
    stop_signal: str = ""
    volumes: dict[str, dict[str, str]] | None = None
    labels: dict[str, str] | None = None


class ImageRecord(Value, frozen=True):
    """An image, named by the digest of its config."""

    id: str
    """``sha256:…`` of the config."""
    chain_id: str
    """Chain ID of the topmost layer; empty for an image without layers."""
    layers: list[str]
    """Chain IDs, lowest first."""
    size: int
    """Bytes unpacked, of all layers together."""
    config: ImageConfig
    repo_tags: list[str] = []
    repo_digests: list[str] = []
    pulled_at: int = 0


class LayerRecord(Value, frozen=True):
    """A layer in the store."""

    chain_id: str
    diff_id: str
    number: int
    """Names the layer's directory: short, so that 127 of them fit one mount call."""
    size: int
    """Bytes of its regular files."""
    entries: int
    durable: bool = False


class SandboxState(enum.StrEnum):
    """How far a sandbox is. ``creating`` and ``removing`` exist so that a restart can finish or undo them.

    ``lingering`` is gone for clients, its name is free, but its network has not let go yet.
    """

    CREATING = "creating"
    READY = "ready"
    NOTREADY = "notready"
    REMOVING = "removing"
    LINGERING = "lingering"


class NetworkRecord(Value, frozen=True):
    """The pod network: written before the first plugin runs; ``config`` is emptied after the last DEL."""

    config: str
    """The CNI configuration list as it was used, as JSON."""
    ifname: str = "eth0"
    result: str = ""
    """The last plugin's result, as JSON; empty while ADD runs."""
    ips: list[str] = []
    failures: int = 0
    """How often DEL has failed."""


class ProcessRecord(Value, frozen=True):
    """A process, told from a later one with the same number by its start time in ticks since boot."""

    pid: int
    started: int


class SandboxRecord(Value, frozen=True):
    """A pod sandbox."""

    id: str
    config: PodSandboxConfig
    handler: str
    state: SandboxState
    created_at: int
    boot_id: str
    cgroup_parent: str
    network: NetworkRecord | None = None
    holder: ProcessRecord | None = None
    """The process that holds a shared PID namespace; None unless the pod has one."""

    @property
    def metadata(self) -> PodSandboxMetadata:
        """The metadata, which validation has made sure of."""
        assert self.config.metadata is not None
        return self.config.metadata

    @property
    def hostname(self) -> str:
        """The host name of a pod with a network of its own."""
        return self.config.hostname or self.metadata.name

    @property
    def namespaces(self) -> NamespaceOption:
        """The namespace options, with the CRI's defaults where they are not given."""
        linux = self.config.linux
        context = linux.security_context if linux else None
        return (context.namespace_options if context else None) or NamespaceOption()

    @property
    def host_network(self) -> bool:
        """Whether the pod lives in the node's network namespace."""
        return self.namespaces.network is NamespaceMode.NODE


class ContainerState(enum.StrEnum):
    """How far a container is. ``creating`` and ``removing`` are never shown to a client."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"


class ContainerRecord(Value, frozen=True):
    """A container."""

    id: str
    sandbox_id: str
    config: ContainerConfig
    handler: str
    state: ContainerState
    created_at: int
    boot_id: str
    image_id: str
    image_ref: str
    stop_signal: int
    """Number of the signal that asks it to end."""
    user: LinuxContainerUser
    mounts: list[Mount] = []
    cgroup: str = ""
    process: ProcessRecord | None = None
    monitor: ProcessRecord | None = None
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""


def sandbox_name(config: PodSandboxConfig) -> str:
    """The name that at most one living sandbox has: CRI metadata without anything free to change."""
    meta = config.metadata
    assert meta is not None
    return "_".join([meta.name, meta.namespace, meta.uid, str(meta.attempt)])


def container_name(sandbox_id: str, config: ContainerConfig) -> str:
    """The name that at most one living container of a sandbox has."""
    meta = config.metadata
    assert meta is not None
    return "_".join([meta.name, sandbox_id, str(meta.attempt)])
