"""What the kernel gives us: privileges, system calls, namespaces, overlayfs, security modules."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from crishim.cli.requirements.files import existing
from crishim.cli.requirements.requirement import Requirement, gist
from crishim.errors import HostFailure
from crishim.host import libc
from crishim.host.facts import HostFacts
from crishim.host.mounts import Overlay, mount, unmount
from crishim.host.threads import run_in_own_thread
from crishim.spec.capabilities import NAMES

NEEDED_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_ADMIN", "SYS_CHROOT",
    "SYS_PTRACE", "SYS_ADMIN", "MKNOD", "SETFCAP",
)  # fmt: skip
OLDEST_KERNEL = (5, 6)
"""The first with openat2(2); pidfds are older."""

_NAMESPACES = {
    "net": libc.CLONE_NEWNET,
    "ipc": libc.CLONE_NEWIPC,
    "uts": libc.CLONE_NEWUTS,
    "pid": libc.CLONE_NEWPID,
    "mnt": libc.CLONE_NEWNS,
}


def examine(facts: HostFacts, root: Path) -> list[Requirement]:
    """All of this module; ``root`` is where overlays will be written."""
    return [
        user(os.geteuid()),
        *capabilities(effective_capabilities(Path("/proc/self/status").read_text())),
        version(facts.kernel),
        system_calls(),
        namespaces(),
        overlay(root),
        Requirement("seccomp", "yes" if facts.seccomp else "no, system calls cannot be filtered", needed=False),
        security_modules(facts),
    ]


def user(uid: int) -> Requirement:
    """Who runs this: the daemon has to be root."""
    return Requirement("user", "root" if uid == 0 else f"user {uid}", uid == 0, advice="run it as root")


def effective_capabilities(status: str) -> frozenset[str]:
    """The names in ``CapEff`` of a /proc/PID/status."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    mask = int(found[1], 16) if found else 0
    return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)


def capabilities(effective: frozenset[str]) -> list[Requirement]:
    """Those that pods cannot be made without, and the one whose lack only clamps."""
    lacking = [name for name in NEEDED_CAPABILITIES if name not in effective]
    found = f"lacks {', '.join(lacking)}" if lacking else f"{len(effective)}, with all that are needed"
    resource = "SYS_RESOURCE" in effective
    return [
        Requirement("capabilities", found, not lacking, advice="give the daemon these capabilities"),
        Requirement(
            "CAP_SYS_RESOURCE",
            "yes" if resource else "no",
            resource,
            needed=False,
            advice="oom_score_adj of containers cannot go below the daemon's own: it is clamped",
        ),
    ]


def version(release: str) -> Requirement:
    """The kernel's release against the oldest that will do."""
    found = re.match(r"(\d+)\.(\d+)", release)
    new_enough = found is not None and (int(found[1]), int(found[2])) >= OLDEST_KERNEL
    oldest = ".".join(map(str, OLDEST_KERNEL))
    return Requirement("kernel", release, new_enough, advice=f"boot a kernel of version {oldest} or later")


def system_calls() -> Requirement:
    """openat2 and pidfd_open, which a filter around us may forbid even where the kernel has them."""
    refused = [name for name, call in (("openat2", _openat2), ("pidfd_open", _pidfd)) if not _works(call)]
    found = f"no {', '.join(refused)}" if refused else "openat2, pidfd_open"
    return Requirement("system calls", found, not refused, advice="lift the seccomp filter around the daemon")


def _openat2() -> None:
    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(libc.openat2(folder, "proc", os.O_PATH, resolve=libc.RESOLVE_IN_ROOT))
    finally:
        os.close(folder)


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _works(call: Callable[[], None]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def namespaces() -> Requirement:
    """Each kind made for a moment, in a thread that ends with it."""
    refused = []
    for name, flag in _NAMESPACES.items():
        try:
            run_in_own_thread(lambda flag=flag: libc.unshare(flag))  # type: ignore[misc]
        except OSError as err:
            refused.append(f"{name} ({gist(err)})")
    found = f"no {', '.join(refused)}" if refused else ", ".join(_NAMESPACES)
    return Requirement("namespaces", found, not refused, advice="needs CAP_SYS_ADMIN and /proc/sys/user/max_* above 0")


def overlay(root: Path) -> Requirement:
    """An overlay really mounted and written to where ``root`` is, seen by nobody else."""
    place = existing(root)
    advice = "put root on ext4, xfs with ftype=1, btrfs or tmpfs: an overlay cannot write to another overlay or to nfs"
    try:
        with tempfile.TemporaryDirectory(prefix=".crishim-check-", dir=place) as folder:
            run_in_own_thread(lambda: _try_overlay(Path(folder)))
    except HostFailure as err:
        return Requirement("overlayfs", err.message.rpartition(": ")[2].lower(), False, advice=advice)
    except OSError as err:
        return Requirement("overlayfs", f"cannot be tried in {place}: {gist(err)}", False, advice=advice)
    return Requirement("overlayfs", f"works in {place}", advice=advice)


def _try_overlay(folder: Path) -> None:
    """In a mount namespace that ends with the thread: deleting a lower file must leave a whiteout."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", libc.MS_REC | libc.MS_PRIVATE)
    for name in ("lower", "upper", "work", "merged"):
        (folder / name).mkdir()
    (folder / "lower" / "file").touch()
    mount(Overlay(folder, ("lower",), folder / "merged", folder / "upper", folder / "work"))
    try:
        (folder / "merged" / "file").unlink()
        if not stat.S_ISCHR((folder / "upper" / "file").lstat().st_mode):
            raise HostFailure("overlay: leaves no whiteouts")
    finally:
        unmount(folder / "merged")


def security_modules(facts: HostFacts) -> Requirement:
    """AppArmor and SELinux: used where they are, not missed where they are not."""
    found = [name for name, there in (("AppArmor", facts.apparmor), ("SELinux", facts.selinux)) if there]
    return Requirement("security modules", ", ".join(found) or "neither AppArmor nor SELinux", needed=False)
