"""The OCI runtime specification's configuration, as typed values (runtime-spec 1.0.2, config.md).

Only what this daemon sets is here; names are the specification's in camel case.
"""

from __future__ import annotations

import msgspec

VERSION = "1.0.2"


class Oci(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of the specification's objects."""


class User(Oci, frozen=True):
    """Numeric identity of the first process."""

    uid: int
    gid: int
    additional_gids: list[int] = []
    umask: int | None = None


class Capabilities(Oci, frozen=True):
    """The five capability sets, by name."""

    bounding: list[str] = []
    effective: list[str] = []
    permitted: list[str] = []
    inheritable: list[str] = []
    ambient: list[str] = []


class Rlimit(Oci, frozen=True):
    """One resource limit."""

    type: str
    hard: int
    soft: int


class Process(Oci, frozen=True):
    """The first process, and the pattern of those that exec adds."""

    user: User
    args: list[str]
    cwd: str
    env: list[str] = []
    terminal: bool = False
    capabilities: Capabilities = Capabilities()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None
    apparmor_profile: str = ""
    rlimits: list[Rlimit] = []


class Root(Oci, frozen=True):
    """The root file system; ``path`` is relative to the bundle."""

    path: str
    readonly: bool = False


class OciMount(Oci, frozen=True):
    """One mount, done in the order of the list."""

    destination: str
    type: str = ""
    source: str = ""
    options: list[str] = []


class Namespace(Oci, frozen=True):
    """A namespace to make, or to join where ``path`` is given."""

    type: str
    path: str = ""


class LinuxDevice(Oci, frozen=True):
    """A device node to make in the container."""

    path: str
    type: str
    major: int
    minor: int
    file_mode: int | None = None
    uid: int | None = None
    gid: int | None = None


class DeviceRule(Oci, frozen=True, omit_defaults=False):
    """A rule of the device controller; absent numbers are wildcards."""

    allow: bool
    access: str = "rwm"
    type: str = "a"
    major: int | None = None
    minor: int | None = None


class Memory(Oci, frozen=True):
    """Bytes; -1 is no limit."""

    limit: int | None = None
    swap: int | None = None


class Cpu(Oci, frozen=True):
    """Times in microseconds."""

    shares: int | None = None
    quota: int | None = None
    period: int | None = None
    cpus: str = ""
    mems: str = ""


class Pids(Oci, frozen=True, omit_defaults=False):
    """Most processes."""

    limit: int


class HugepageLimit(Oci, frozen=True, omit_defaults=False):
    """Bytes of pages of one size."""

    page_size: str
    limit: int


class Resources(Oci, frozen=True):
    """Cgroup settings."""

    devices: list[DeviceRule] = []
    memory: Memory | None = None
    cpu: Cpu | None = None
    pids: Pids | None = None
    hugepage_limits: list[HugepageLimit] = []
    unified: dict[str, str] = {}


class SeccompArg(Oci, frozen=True, omit_defaults=False):
    """A condition on an argument of a system call."""

    index: int
    value: int
    value_two: int = 0
    op: str = "SCMP_CMP_EQ"


class Syscall(Oci, frozen=True):
    """What happens to some system calls."""

    names: list[str]
    action: str
    args: list[SeccompArg] = []
    errno_ret: int | None = None


class Seccomp(Oci, frozen=True):
    """A system call filter."""

    default_action: str
    architectures: list[str] = []
    syscalls: list[Syscall] = []
    default_errno_ret: int | None = None
    flags: list[str] = []
    listener_path: str = ""


class Linux(Oci, frozen=True):
    """The Linux part."""

    namespaces: list[Namespace]
    cgroups_path: str
    resources: Resources = Resources()
    devices: list[LinuxDevice] = []
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    rootfs_propagation: str = ""
    seccomp: Seccomp | None = None


class Spec(Oci, frozen=True):
    """``config.json`` of a bundle."""

    oci_version: str
    process: Process
    root: Root
    linux: Linux
    hostname: str = ""
    mounts: list[OciMount] = []
    annotations: dict[str, str] = {}

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)
