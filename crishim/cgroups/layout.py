"""Which cgroups this host has, and where those of a pod and a container are.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, systemd.slice(5), and the OCI runtime-spec
(config-linux.md, ``cgroupsPath``).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from crishim.errors import ConfigError, InvalidArgument

MOUNT = Path("/sys/fs/cgroup")
PREFIX = "crishim"

_V1_NEEDED = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")


@dataclass(frozen=True)
class Cgroups:
    """The cgroup hierarchies as OCI runtimes see them."""

    unified: bool
    """True for a pure version 2 host; hybrid hosts count as version 1, as they do for runc."""
    systemd: bool
    """Whether slices and scopes are asked of systemd instead of made as directories."""
    controllers: frozenset[str]
    swap: bool = False
    """Whether swap can be limited."""
    mount: Path = MOUNT

    @property
    def driver(self) -> str:
        """``systemd`` or ``cgroupfs``."""
        return "systemd" if self.systemd else "cgroupfs"

    def default_parent(self, sandbox_id: str) -> str:
        """The parent for a pod that names none."""
        return f"{PREFIX}.slice" if self.systemd else f"/{PREFIX}-{sandbox_id}"

    def check_parent(self, parent: str) -> str:
        """``parent`` if it has the driver's form; :class:`InvalidArgument` otherwise."""
        if self.systemd:
            name = os.path.basename(parent.rstrip("/"))
            if not _is_slice(name):
                raise InvalidArgument(f"cgroup_parent {parent!r} is not a systemd slice")
            return name
        if ".." in parent.split("/") or "\0" in parent:
            raise InvalidArgument(f"cgroup_parent {parent!r} has a part '..'")
        return "/" + parent.strip("/")

    def spec_path(self, parent: str, container_id: str) -> str:
        """``cgroupsPath`` for the OCI runtime."""
        if self.systemd:
            return f"{parent}:{PREFIX}:{container_id}"
        return f"{parent.rstrip('/')}/{PREFIX}-{container_id}"

    def relative_path(self, spec_path: str) -> str:
        """The directory of ``spec_path`` below each hierarchy, without a leading slash."""
        if not self.systemd:
            return spec_path.strip("/")
        parent, prefix, name = spec_path.split(":")
        return f"{expand_slice(parent)}/{prefix}-{name}.scope".lstrip("/")

    def parent_path(self, parent: str) -> str:
        """The directory of a pod's own cgroup below each hierarchy, without a leading slash."""
        return expand_slice(parent) if self.systemd else parent.strip("/")

    def hierarchies(self) -> list[Path]:
        """The mount points that can hold a container's cgroup."""
        if self.unified:
            return [self.mount]
        return sorted({path.resolve() for path in self.mount.iterdir() if path.is_dir()})

    def directory(self, spec_path: str, controller: str) -> Path:
        """The cgroup directory that has ``controller``'s files."""
        base = self.mount if self.unified else self.mount / controller
        return base / self.relative_path(spec_path)

    def oom_kills(self, spec_path: str) -> int:
        """How many processes of the container the kernel has killed for lack of memory."""
        name = "memory.events" if self.unified else "memory.oom_control"
        try:
            text = (self.directory(spec_path, "memory") / name).read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)

    def processes(self, spec_path: str) -> list[int]:
        """The processes in the container's own cgroup."""
        try:
            return [int(pid) for pid in (self.directory(spec_path, "pids") / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def remove(self, relative: str) -> None:
        """Remove the cgroup ``relative`` and all below it, as far as they hold no process."""
        for base in self.hierarchies():
            top = base / relative.strip("/")
            if top == base:
                continue
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def detect(manager: str, *, systemd: bool, mount: Path = MOUNT) -> Cgroups:
    """Look at the host; ``manager`` is the configuration's ``runtime.cgroup_manager``."""
    unified = (mount / "cgroup.controllers").exists()
    if manager == "systemd" and not systemd:
        raise ConfigError("runtime.cgroup_manager is systemd, but systemd does not run this host")
    if unified:
        controllers = (mount / "cgroup.controllers").read_text().split()
    else:
        controllers = [path.name for path in mount.iterdir() if path.is_dir()] if mount.is_dir() else []
    use_systemd = manager == "systemd" or (manager == "auto" and systemd)
    swap = unified or (mount / "memory" / "memory.memsw.limit_in_bytes").exists()
    return Cgroups(unified, use_systemd, frozenset(controllers), swap, mount)


def missing_controllers(cgroups: Cgroups) -> list[str]:
    """The controllers that containers need and the host lacks."""
    needed = ("cpu", "cpuset", "memory", "pids") if cgroups.unified else _V1_NEEDED
    return [name for name in needed if name not in cgroups.controllers]


def _is_slice(name: str) -> bool:
    """Whether systemd takes ``name``: systemd.slice(5) allows no empty part between dashes."""
    parts = name.removesuffix(".slice").split("-")
    return name == "-.slice" or (name.endswith(".slice") and all(parts) and not set(name) & {":", "\0"})


def expand_slice(name: str) -> str:
    """``a-b.slice`` as the path ``a.slice/a-b.slice``: systemd.slice(5)."""
    if name == "-.slice":
        return ""
    parts = name.removesuffix(".slice").split("-")
    return "/".join("-".join(parts[: count + 1]) + ".slice" for count in range(len(parts)))
