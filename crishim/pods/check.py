"""What a pod sandbox may ask for: what is wrong in itself, and what this version does not do, is refused here."""

from __future__ import annotations

import ipaddress
import re

from crishim.containers.check import check_selinux
from crishim.errors import InvalidArgument, Unimplemented
from crishim.host.facts import HostFacts
from crishim.model.cri import (
    LinuxSandboxSecurityContext,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
    PortMapping,
)

_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "fs.mqueue.")
_IPC_EXACT = ("kernel.sem",)
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_HOSTNAME_MAX = 64


def check(config: PodSandboxConfig, facts: HostFacts) -> None:
    """Refuse ``config`` with an error that names the field."""
    meta = config.metadata
    if meta is None:
        raise InvalidArgument("config.metadata is missing")
    for name in ("name", "namespace", "uid"):
        if not getattr(meta, name):
            raise InvalidArgument(f"config.metadata.{name} is empty")
    if config.log_directory and not config.log_directory.startswith("/"):
        raise InvalidArgument(f"log_directory {config.log_directory!r} is not absolute")
    if config.hostname and not (_HOSTNAME.fullmatch(config.hostname) and len(config.hostname) <= _HOSTNAME_MAX):
        raise InvalidArgument(f"hostname {config.hostname!r} is not a host name of at most {_HOSTNAME_MAX} characters")
    security = _security(config)
    options = security.namespace_options or NamespaceOption()
    _check_namespaces(options)
    check_selinux(security.selinux_options, facts)
    for mapping in config.port_mappings:
        _check_port(mapping)
    for name in config.linux.sysctls if config.linux else ():
        _check_sysctl(name, options)
    if security.run_as_group is not None and security.run_as_user is None:
        raise InvalidArgument("run_as_group needs run_as_user")


def _security(config: PodSandboxConfig) -> LinuxSandboxSecurityContext:
    linux = config.linux
    return (linux.security_context if linux else None) or LinuxSandboxSecurityContext()


def _check_namespaces(options: NamespaceOption) -> None:
    for name in ("network", "ipc"):
        mode = getattr(options, name)
        if mode not in (NamespaceMode.POD, NamespaceMode.NODE):
            raise InvalidArgument(f"namespace_options.{name} {mode.name} is not possible: POD or NODE")
    if options.pid is NamespaceMode.TARGET:
        raise InvalidArgument("namespace_options.pid TARGET is only possible for a container")
    if options.userns_options is not None and options.userns_options.mode is not NamespaceMode.NODE:
        raise Unimplemented("user namespaces are not supported by this version")


def _check_port(mapping: PortMapping) -> None:
    for name in ("container_port", "host_port"):
        port = getattr(mapping, name)
        if not 0 <= port <= 65535:
            raise InvalidArgument(f"{name} {port} is not a port")
    if mapping.host_port and not mapping.container_port:
        raise InvalidArgument(f"port mapping of host_port {mapping.host_port} has no container_port")
    if mapping.host_ip:
        try:
            ipaddress.ip_address(mapping.host_ip)
        except ValueError as err:
            raise InvalidArgument(f"host_ip {mapping.host_ip!r} is not an IP address") from err


def _check_sysctl(name: str, options: NamespaceOption) -> None:
    """Only what belongs to a namespace of the pod: the kubelet's list of namespaced sysctls."""
    dotted = name.replace("/", ".")
    if ".." in dotted or not re.fullmatch(r"[A-Za-z0-9_.\-]+", dotted):
        raise InvalidArgument(f"sysctl {name!r} is malformed")
    if dotted.startswith("net."):
        if options.network is NamespaceMode.NODE:
            raise InvalidArgument(f"sysctl {name} needs a network namespace, the pod has the node's")
    elif dotted.startswith(_IPC_SYSCTLS) or dotted in _IPC_EXACT:
        if options.ipc is NamespaceMode.NODE:
            raise InvalidArgument(f"sysctl {name} needs an IPC namespace, the pod has the node's")
    else:
        raise InvalidArgument(f"sysctl {name} does not belong to a namespace of a pod")
