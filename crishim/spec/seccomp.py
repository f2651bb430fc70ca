"""Seccomp filters: the default profile, and profiles from files.

Sources: runtime-spec (config-linux.md, seccomp), seccomp(2), and for files the format of Docker's profiles,
which Kubernetes uses ("Restrict a Container's Syscalls with seccomp").
"""

from __future__ import annotations

import errno
from collections.abc import Collection

import msgspec

from crishim.errors import InvalidArgument
from crishim.spec import seccomp_default as default
from crishim.spec.oci import Seccomp, SeccompArg, Syscall

_ARCHITECTURES = {
    "amd64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "arm64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
_ALLOW, _ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
_AF_VSOCK = 40


def runtime_default(architecture: str, capabilities: Collection[str]) -> Seccomp:
    """The default profile for a container with these capabilities; ``architecture`` in Go's words."""
    names = [*default.ALWAYS, *default.BY_ARCHITECTURE.get(architecture, [])]
    for capability, calls in default.BY_CAPABILITY.items():
        if capability in capabilities:
            names += calls
    rules = [
        Syscall(sorted(set(names)), _ALLOW),
        *(Syscall(["personality"], _ALLOW, args=[SeccompArg(0, value)]) for value in default.PERSONALITIES),
        Syscall(["socket"], _ALLOW, args=[SeccompArg(0, _AF_VSOCK, op="SCMP_CMP_NE")]),
    ]
    if "CAP_SYS_ADMIN" not in capabilities:
        masked = SeccompArg(0, default.CLONE_NAMESPACES, value_two=0, op="SCMP_CMP_MASKED_EQ")
        rules.append(Syscall(["clone"], _ALLOW, args=[masked]))
        # its flags are behind a pointer: libc falls back to clone when told that there is no clone3
        rules.append(Syscall(["clone3"], _ERRNO, errno_ret=errno.ENOSYS))
    return Seccomp(_ERRNO, _ARCHITECTURES.get(architecture, []), rules, default_errno_ret=errno.EPERM)


class _Condition(msgspec.Struct, rename="camel", frozen=True):
    caps: list[str] = []
    arches: list[str] = []
    min_kernel: str = ""


class _Rule(msgspec.Struct, rename="camel", frozen=True):
    action: str
    names: list[str] = []
    name: str = ""
    args: list[SeccompArg] | None = None
    errno_ret: int | None = None
    includes: _Condition = _Condition()
    excludes: _Condition = _Condition()


class _ArchMap(msgspec.Struct, rename="camel", frozen=True):
    architecture: str
    sub_architectures: list[str] | None = None


class _Profile(msgspec.Struct, rename="camel", frozen=True):
    default_action: str
    default_errno_ret: int | None = None
    architectures: list[str] = []
    arch_map: list[_ArchMap] = []
    syscalls: list[_Rule] = []
    flags: list[str] = []
    listener_path: str = ""


def from_file(data: bytes, where: str, architecture: str, capabilities: Collection[str], kernel: str) -> Seccomp:
    """A profile file as the filter of a container; :class:`InvalidArgument` says what is wrong with it."""
    try:
        profile = msgspec.json.decode(data, type=_Profile)
    except msgspec.MsgspecError as err:
        raise InvalidArgument(f"seccomp profile {where}: {str(err)[:1].lower()}{str(err)[1:]}") from err
    rules = [
        Syscall(rule.names or [rule.name], rule.action, args=rule.args or [], errno_ret=rule.errno_ret)
        for rule in profile.syscalls
        if _applies(rule, architecture, capabilities, kernel)
    ]
    return Seccomp(
        profile.default_action,
        _architectures(profile, architecture),
        rules,
        default_errno_ret=profile.default_errno_ret,
        flags=profile.flags,
        listener_path=profile.listener_path,
    )


def _architectures(profile: _Profile, architecture: str) -> list[str]:
    own = _ARCHITECTURES.get(architecture, [""])[0]
    for entry in profile.arch_map:
        if entry.architecture == own:
            return [entry.architecture, *(entry.sub_architectures or [])]
    return profile.architectures


def _applies(rule: _Rule, architecture: str, capabilities: Collection[str], kernel: str) -> bool:
    include, exclude = rule.includes, rule.excludes
    wanted = (
        (not include.arches or architecture in include.arches)
        and all(capability in capabilities for capability in include.caps)
        and (not include.min_kernel or _version(kernel) >= _version(include.min_kernel))
    )
    unwanted = (
        architecture in exclude.arches
        or any(capability in capabilities for capability in exclude.caps)
        or (bool(exclude.min_kernel) and _version(kernel) >= _version(exclude.min_kernel))
    )
    return wanted and not unwanted


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-", maxsplit=1)[0].split(".")[:2] if part.isdecimal())
