"""cgroups as the daemon would use them, and what runtimes think of them."""

from __future__ import annotations

import os
from pathlib import Path

from crishim.cgroups import layout
from crishim.cli.requirements.requirement import Requirement
from crishim.config.settings import RuntimeSettings
from crishim.errors import ConfigError

_ADVICE = "boot with cgroup version 2, or mount the version 1 hierarchies"


def examine(settings: RuntimeSettings, *, systemd: bool, mount: Path = layout.MOUNT) -> list[Requirement]:
    """Version, driver and controllers of the hierarchies at ``mount``."""
    try:
        found = layout.detect(settings.cgroup_manager, systemd=systemd, mount=mount)
    except ConfigError as err:
        return [Requirement("cgroups", err.message, False, advice="set runtime.cgroup_manager to auto")]
    return [
        Requirement("cgroups", describe(found), bool(found.controllers), advice=_ADVICE),
        controllers(found),
        writable(mount),
    ]


def describe(found: layout.Cgroups) -> str:
    """Version and driver in words."""
    if not found.controllers:
        return f"none in {found.mount}"
    version = "version 2" if found.unified else "version 1"
    if not found.unified and (found.mount / "unified").is_dir():
        version = "hybrid (version 1, and a version 2 hierarchy beside it)"
    return f"{version}, driver {found.driver}"


def controllers(found: layout.Cgroups) -> Requirement:
    """Those that limits of pods are made of."""
    missing = layout.missing_controllers(found)
    words = f"no {', '.join(missing)}" if missing else "all that are needed"
    return Requirement(
        "cgroup controllers", words, not missing, advice="enable them on the kernel's command line (cgroup_enable=)"
    )


def writable(mount: Path) -> Requirement:
    """Whether cgroups can be made."""
    first = next((path for path in sorted(mount.glob("*")) if path.is_dir()), mount)
    place = mount if (mount / "cgroup.controllers").exists() else first
    may = os.access(place, os.W_OK)
    found = "writable" if may else f"{place} is not writable"
    return Requirement("cgroup access", found, may, advice="run as root, with cgroups mounted read-write")


def hybrid_controllers(mount: Path = layout.MOUNT) -> list[str]:
    """The controllers of the version 2 hierarchy on a hybrid host; none elsewhere."""
    try:
        return (mount / "unified" / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def crun_on_hybrid(controllers: list[str], *, is_default: bool) -> Requirement:
    """crun runs nothing where version 2 has controllers beside version 1."""
    return Requirement(
        "crun with hybrid cgroups",
        f"crun refuses hosts whose version 2 hierarchy has controllers ({', '.join(controllers)})"
        if controllers
        else "version 2 has no controllers",
        not controllers,
        needed=is_default,
        advice="use runc, or boot with version 2 alone (systemd.unified_cgroup_hierarchy=1)",
    )
