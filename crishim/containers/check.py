"""What a container may ask for: what is wrong in itself, and what this version does not do, is refused here."""

from __future__ import annotations

import posixpath

from crishim.errors import CrishimError, FailedPrecondition, InvalidArgument, Unimplemented
from crishim.host.facts import HostFacts
from crishim.model import signals
from crishim.model.cri import (
    ContainerConfig,
    LinuxContainerSecurityContext,
    Mount,
    NamespaceMode,
    NamespaceOption,
    ProfileType,
    SecurityProfile,
    SELinuxOption,
)
from crishim.model.records import SandboxRecord
from crishim.runtimes.features import Features
from crishim.spec import mounts
from crishim.spec.generate import linux_of


class RROUnsupported(CrishimError):
    """Recursive read-only mounts; the kubelet recognises the prefix (k8s.io/cri-api errors)."""

    def __str__(self) -> str:
        return f"RROUnsupported: {super().__str__()}"


def check(config: ContainerConfig, sandbox: SandboxRecord, facts: HostFacts, features: Features) -> None:
    """Refuse ``config`` with an error that names the field."""
    if config.metadata is None or not config.metadata.name:
        raise InvalidArgument("config.metadata.name is empty")
    if config.image is None or not config.image.image:
        raise InvalidArgument("config.image.image is empty")
    _check_log_path(config.log_path)
    signals.from_cri(config.stop_signal)
    if config.CDI_devices:
        raise Unimplemented(f"CDI_devices ({config.CDI_devices[0].name}) are not supported by this version")
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidArgument(f"working_dir {config.working_dir!r} is not absolute")
    for mount in config.mounts:
        _check_mount(mount, recursive_read_only=features.recursive_read_only(facts.kernel))
    _, security = linux_of(config)
    _check_security(security, facts)
    _check_privileged(security, sandbox)
    _check_namespaces(security.namespace_options or sandbox.namespaces, sandbox)


def _check_log_path(path: str) -> None:
    if path.startswith("/") or ".." in path.split("/") or (path and posixpath.normpath(path) == "."):
        raise InvalidArgument(f"log_path {path!r} leads out of the sandbox's log directory")


def _check_mount(mount: Mount, *, recursive_read_only: bool) -> None:
    if mount.image is not None and (mount.image.image or mount.image_sub_path):
        raise Unimplemented(f"image volumes (mount {mount.container_path}) are not supported by this version")
    mounts.check(mount)
    if mount.recursive_read_only and not recursive_read_only:
        raise RROUnsupported(f"mount {mount.container_path}: the OCI runtime or the kernel cannot do it")
    if mount.uidMappings or mount.gidMappings:
        raise Unimplemented(f"id mappings of mount {mount.container_path} are not supported by this version")


def _check_security(security: LinuxContainerSecurityContext, facts: HostFacts) -> None:
    check_selinux(security.selinux_options, facts)
    if security.privileged:
        return  # unconfined whatever the profiles say
    profile = seccomp_profile(security)
    if profile is not None and not facts.seccomp:
        raise FailedPrecondition(f"seccomp profile {profile.profile_type.name}: the kernel has no seccomp")
    apparmor_profile(security, facts, frozenset())


def seccomp_profile(security: LinuxContainerSecurityContext) -> SecurityProfile | None:
    """The filter that a container asks for, None for none; the typed field counts before the deprecated one."""
    profile = security.seccomp or _deprecated_seccomp(security.seccomp_profile_path)
    if profile is None or profile.profile_type is ProfileType.Unconfined or security.privileged:
        return None
    if profile.profile_type is ProfileType.Localhost and not profile.localhost_ref.startswith("/"):
        raise InvalidArgument(f"seccomp localhost_ref {profile.localhost_ref!r} is not an absolute path")
    return profile


def _deprecated_seccomp(text: str) -> SecurityProfile | None:
    if text in ("", "unconfined"):
        return None
    if text in ("runtime/default", "docker/default"):
        return SecurityProfile(ProfileType.RuntimeDefault)
    if text.startswith("localhost/"):
        return SecurityProfile(ProfileType.Localhost, text.removeprefix("localhost/"))
    raise InvalidArgument(f"seccomp_profile_path {text!r} is neither runtime/default, unconfined nor localhost/PATH")


def check_selinux(options: SELinuxOption | None, facts: HostFacts) -> None:
    """Labels mean nothing where the kernel has no SELinux; where it has, this version cannot set them."""
    if facts.selinux and options is not None and options != SELinuxOption():
        raise Unimplemented("selinux_options are not supported by this version")


def apparmor_profile(
    security: LinuxContainerSecurityContext, facts: HostFacts, loaded: frozenset[str] | None = None
) -> str:
    """The AppArmor profile to run under, empty for none; ``loaded`` has the profiles that the kernel knows."""
    profile = security.apparmor or _deprecated_apparmor(security.apparmor_profile)
    if profile is None or profile.profile_type is ProfileType.Unconfined or security.privileged:
        return ""
    if profile.profile_type is ProfileType.RuntimeDefault:
        if facts.apparmor and security.apparmor is not None:
            raise Unimplemented("the AppArmor profile RuntimeDefault is not supported by this version")
        return ""
    if not facts.apparmor:
        raise FailedPrecondition(f"AppArmor profile {profile.localhost_ref!r}: the kernel has no AppArmor")
    if loaded is not None and loaded and profile.localhost_ref not in loaded:
        raise FailedPrecondition(f"AppArmor profile {profile.localhost_ref!r} is not loaded")
    return profile.localhost_ref


def _deprecated_apparmor(text: str) -> SecurityProfile | None:
    if not text:
        return None
    if text == "unconfined":
        return SecurityProfile(ProfileType.Unconfined)
    if text == "runtime/default":
        return SecurityProfile(ProfileType.RuntimeDefault)
    if text.startswith("localhost/"):
        return SecurityProfile(ProfileType.Localhost, text.removeprefix("localhost/"))
    raise InvalidArgument(f"apparmor_profile {text!r} is neither runtime/default, unconfined nor localhost/NAME")


def _check_privileged(security: LinuxContainerSecurityContext, sandbox: SandboxRecord) -> None:
    linux = sandbox.config.linux
    pod_is = bool(linux and linux.security_context and linux.security_context.privileged)
    if security.privileged and not pod_is:
        raise FailedPrecondition("a privileged container needs a privileged pod sandbox")


def _check_namespaces(wanted: NamespaceOption, sandbox: SandboxRecord) -> None:
    if wanted.userns_options is not None and wanted.userns_options.mode is not NamespaceMode.NODE:
        raise Unimplemented("user namespaces are not supported by this version")
    if wanted.pid is NamespaceMode.TARGET and not wanted.target_id:
        raise InvalidArgument("namespace_options.pid is TARGET without a target_id")
    pod = sandbox.namespaces
    for name in ("network", "ipc"):
        mode = getattr(wanted, name)
        if mode not in (NamespaceMode.POD, NamespaceMode.NODE):
            raise InvalidArgument(f"namespace_options.{name} {mode.name} is not possible: POD or NODE")
        if (mode is NamespaceMode.NODE) != (getattr(pod, name) is NamespaceMode.NODE):
            raise InvalidArgument(f"namespace_options.{name} differs from the pod sandbox's")
    if wanted.pid is NamespaceMode.POD and pod.pid is not NamespaceMode.POD:
        raise InvalidArgument("namespace_options.pid is POD, but the pod sandbox shares no PID namespace")
