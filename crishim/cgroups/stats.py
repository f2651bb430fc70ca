"""What a cgroup has used, read from its files: one read a file, no process, no walk.

Sources: Documentation/admin-guide/cgroup-v1 (cpuacct, memory, pids), cgroup-v2.rst, accounting/psi.rst.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from crishim.cgroups.layout import Cgroups

_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2**63, rounded to pages."""


@dataclass(frozen=True)
class Pressure:
    """One line of a PSI file: total stall in microseconds, averages in percent."""

    total: int = 0
    avg10: float = 0.0
    avg60: float = 0.0
    avg300: float = 0.0


@dataclass(frozen=True)
class Psi:
    """A PSI file."""

    some: Pressure
    full: Pressure


@dataclass(frozen=True)
class Usage:
    """A cgroup at one moment. ``at`` is nanoseconds since 1970; memory in bytes; None where the kernel does not say."""

    at: int
    cpu_ns: int | None = None
    memory: int | None = None
    working_set: int | None = None
    memory_limit: int | None = None
    rss: int | None = None
    faults: int | None = None
    major_faults: int | None = None
    swap: int | None = None
    swap_limit: int | None = None
    processes: int | None = None
    cpu_psi: Psi | None = None
    memory_psi: Psi | None = None
    io_psi: Psi | None = None


def read(cgroups: Cgroups, relative: str) -> Usage | None:
    """The usage of the cgroup ``relative`` (below every hierarchy), or None if it is gone; blocks for microseconds."""
    return _read_v2(cgroups.mount / relative) if cgroups.unified else _read_v1(cgroups.mount, relative)


def _read_v1(mount: Path, relative: str) -> Usage | None:
    memory = mount / "memory" / relative
    used = _number(memory / "memory.usage_in_bytes")
    cpu = _number(mount / "cpuacct" / relative / "cpuacct.usage")
    if used is None and cpu is None:
        return None
    stat = _table(memory / "memory.stat")
    both = _number(memory / "memory.memsw.usage_in_bytes")
    both_limit = _limit(_number(memory / "memory.memsw.limit_in_bytes"))
    limit = _limit(_number(memory / "memory.limit_in_bytes"))
    return Usage(
        at=time.time_ns(),
        cpu_ns=cpu,
        memory=used,
        working_set=_working_set(used, stat.get("total_inactive_file")),
        memory_limit=limit,
        rss=stat.get("total_rss"),
        faults=stat.get("total_pgfault"),
        major_faults=stat.get("total_pgmajfault"),
        swap=max(0, both - used) if both is not None and used is not None else stat.get("total_swap"),
        swap_limit=both_limit - limit if both_limit is not None and limit is not None else None,
        processes=_number(mount / "pids" / relative / "pids.current"),
    )


def _read_v2(path: Path) -> Usage | None:
    cpu = _table(path / "cpu.stat").get("usage_usec")
    used = _number(path / "memory.current")
    if used is None and cpu is None:
        return None
    stat = _table(path / "memory.stat")
    return Usage(
        at=time.time_ns(),
        cpu_ns=cpu * 1000 if cpu is not None else None,
        memory=used,
        working_set=_working_set(used, stat.get("inactive_file")),
        memory_limit=_limit(_number(path / "memory.max")),
        rss=stat.get("anon"),
        faults=stat.get("pgfault"),
        major_faults=stat.get("pgmajfault"),
        swap=_number(path / "memory.swap.current"),
        swap_limit=_limit(_number(path / "memory.swap.max")),
        processes=_number(path / "pids.current"),
        cpu_psi=_psi(path / "cpu.pressure"),
        memory_psi=_psi(path / "memory.pressure"),
        io_psi=_psi(path / "io.pressure"),
    )


def _working_set(used: int | None, inactive_file: int | None) -> int | None:
    """What cannot be reclaimed at once: the kubelet's definition, usage without inactive file pages."""
    return None if used is None else max(0, used - (inactive_file or 0))


def _limit(number: int | None) -> int | None:
    return None if number is None or number >= _UNLIMITED else number


def _number(path: Path) -> int | None:
    """The number in a file; None where it is absent or says ``max``."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(" ", 1) for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _psi(path: Path) -> Psi | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = {line.partition(" ")[0]: _pressure(line) for line in lines if line}
    return Psi(found.get("some", Pressure()), found.get("full", Pressure()))


def _pressure(line: str) -> Pressure:
    values = dict(item.split("=", 1) for item in line.split()[1:])
    return Pressure(int(values["total"]), *(float(values[name]) for name in ("avg10", "avg60", "avg300")))
