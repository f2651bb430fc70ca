"""What this machine is: read once at start, passed as a value to the functions that decide."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CAP_SYS_RESOURCE = 24


@dataclass(frozen=True)
class HostFacts:
    """The host as the daemon found it."""

    kernel: str
    boot_id: str
    capabilities: frozenset[int]
    """Numbers of the capabilities in the daemon's bounding and permitted sets: no container can have others."""
    oom_score_adj: int
    """The daemon's own value: without CAP_SYS_RESOURCE no process can be given a lower one."""
    apparmor: bool
    selinux: bool
    seccomp: bool
    systemd: bool

    @property
    def lowest_oom_score_adj(self) -> int:
        """The lowest ``oom_score_adj`` that a container can be given."""
        return -1000 if _CAP_SYS_RESOURCE in self.capabilities else self.oom_score_adj


def read_facts() -> HostFacts:
    """Look at this machine; see proc_pid_status(5) for the fields."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    bounding = int(status["CapBnd"], 16) & int(status["CapPrm"], 16)
    return HostFacts(
        kernel=os.uname().release,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        capabilities=frozenset(bit for bit in range(64) if bounding >> bit & 1),
        oom_score_adj=int(Path("/proc/self/oom_score_adj").read_text()),
        apparmor=_reads_yes("/sys/module/apparmor/parameters/enabled"),
        selinux=Path("/sys/fs/selinux/enforce").exists(),
        seccomp="Seccomp" in status,
        systemd=Path("/run/systemd/system").is_dir(),
    )


def _reads_yes(path: str) -> bool:
    try:
        return Path(path).read_text().strip() == "Y"
    except OSError:
        return False
