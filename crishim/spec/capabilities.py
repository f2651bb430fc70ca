"""Capability sets from the CRI's additions and removals: capabilities(7)."""

from __future__ import annotations

from collections.abc import Iterable

from crishim.errors import InvalidArgument
from crishim.model.cri import Capability
from crishim.spec.oci import Capabilities

NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""By number: include/uapi/linux/capability.h."""

DEFAULT = frozenset({
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
})  # fmt: skip
"""What a container has unless told otherwise: the set of Docker and containerd, which images expect."""


def wanted(change: Capability | None, *, privileged: bool, host: frozenset[int], root: bool) -> Capabilities:
    """The sets for a container.

    A privileged container, and ``ALL``, get what the daemon itself has: the kernel gives no more. Changes
    mean nothing to a privileged container; what is dropped by name is in no set, whoever adds it. A process
    that does not run as root keeps only ambient capabilities effective, as execve(2) would have it.
    """
    available = {NAMES[number] for number in host if number < len(NAMES)}
    change = Capability() if change is None or privileged else change
    add, drop = _names(change.add_capabilities), _names(change.drop_capabilities)
    ambient = _names(change.add_ambient_capabilities)
    if "ALL" in drop:
        chosen = set()  # what is added by name stays: the additions are the more specific wish
    elif privileged or "ALL" in add:
        chosen = set(available)
    else:
        chosen = set(DEFAULT)
    if "ALL" in ambient:
        ambient = available | ambient - {"ALL"}
    ambient -= drop
    chosen = (chosen | (add - {"ALL"}) | ambient) - drop
    missing = (chosen - available) & (add | ambient)
    if missing:
        raise InvalidArgument(f"capability {min(missing)} is not among those that this node's runtime has")
    chosen &= available
    names = _sorted(chosen)
    effective = names if root else _sorted(ambient)
    permitted = names if root else _sorted(ambient)
    return Capabilities(
        bounding=names, effective=effective, permitted=permitted, inheritable=_sorted(ambient), ambient=_sorted(ambient)
    )


def _names(given: Iterable[str]) -> set[str]:
    names = set()
    for name in given:
        short = name.upper().removeprefix("CAP_")
        if short not in NAMES and short != "ALL":
            raise InvalidArgument(f"unknown capability {name!r}")
        names.add(short)
    return names


def _sorted(names: Iterable[str]) -> list[str]:
    return [f"CAP_{name}" for name in sorted(names)]
