"""The settings, their defaults and what they mean.

Field docstrings are shown by ``crishim config --explain`` and in ``docs/configuration.md``.
"""

from __future__ import annotations

import shutil

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class ApiSettings(Settings, frozen=True):
    """The CRI socket and the streaming server."""

    listen: str = "/run/crishim/crishim.sock"
    stream_address: str = "127.0.0.1"
    stream_port: int = 0
    """0: any free port."""
    stream_idle_timeout: float = 14400.0
    """Seconds without data after which a streaming connection is closed."""
    stream_creation_timeout: float = 30.0
    """Seconds that a client may take for its request, and again for opening its streams."""
    stream_tls_cert: str = ""
    """Certificate chain of the streaming server, PEM, read again when it changes; empty: no TLS."""
    stream_tls_key: str = ""
    stream_tls_min_version: str = "1.2"
    """``1.2`` or ``1.3``."""
    max_message_bytes: int = 16 << 20
    """Largest request or answer, in bytes; the kubelet's own limit is 16 MiB."""


class HandlerSettings(Settings, frozen=True):
    """One runtime handler: an OCI runtime and how it is called."""

    path: str = ""
    """Absolute path; empty: the handler's name, looked up on PATH."""
    args: list[str] = []
    """Global arguments put before the runtime's command."""


class RuntimeSettings(Settings, frozen=True):
    """How containers are run."""

    default: str = "runc"
    cgroup_manager: str = "auto"
    """``auto``, ``cgroupfs`` or ``systemd``."""
    conmon: str = "/usr/bin/conmon"
    pids_limit: int = 0
    """Most processes in one container; 0: no limit but the pod's."""
    holder: str = "/usr/bin/catatonit"
    """A static init that holds a pod's shared PID namespace."""
    log_size_max: int = -1
    """Bytes after which conmon starts a container's log anew; -1: the kubelet rotates."""
    handlers: dict[str, HandlerSettings] = {}


class ImageSettings(Settings, frozen=True):
    """Where images come from and what they may be."""

    registries_conf: str = "/etc/containers/registries.conf"
    certs_dir: str = "/etc/containers/certs.d"
    policy: str = "/etc/containers/policy.json"
    auth_file: str = ""
    parallel_layers: int = 3
    """Layers of one image downloaded and unpacked at the same time."""
    max_layer_bytes: int = 64 << 30
    """Most bytes that one layer may unpack to."""
    max_layer_entries: int = 4_000_000
    stall_seconds: float = 60.0
    """A download that brings no byte for so long is given up."""


class NetworkSettings(Settings, frozen=True):
    """Pod networks."""

    conf_dir: str = "/etc/cni/net.d"
    bin_dirs: list[str] = msgspec.field(default_factory=lambda: ["/opt/cni/bin", "/usr/lib/cni"])
    plugin_timeout: float = 60.0
    """Seconds that one CNI plugin may take."""


class MetricsSettings(Settings, frozen=True):
    """The Prometheus endpoint."""

    listen: str = ""


class LogSettings(Settings, frozen=True):
    """The daemon's own log, on standard error."""

    level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""
    format: str = "text"
    """``text`` or ``json``."""


class Config(Settings, frozen=True):
    """All settings of the daemon."""

    root: str = "/var/lib/crishim"
    state: str = "/run/crishim"
    api: ApiSettings = ApiSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    image: ImageSettings = ImageSettings()
    network: NetworkSettings = NetworkSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()


KNOWN_HANDLERS = ("runc", "crun")


def effective_handlers(runtime: RuntimeSettings) -> dict[str, HandlerSettings]:
    """The configured handlers with their paths, and runc and crun where they are found on PATH."""
    handlers = {}
    for name in dict.fromkeys([*runtime.handlers, *KNOWN_HANDLERS]):
        given = runtime.handlers.get(name, HandlerSettings())
        path = given.path or shutil.which(name) or ""
        if path or name in runtime.handlers:
            handlers[name] = msgspec.structs.replace(given, path=path)
    return handlers
