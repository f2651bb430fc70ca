"""Directories and files: root and state, room in them, what the image settings name, who else is there."""

from __future__ import annotations

import os
from pathlib import Path

from crishim.cli.requirements.requirement import Requirement, gist
from crishim.config.paths import Paths
from crishim.config.settings import Config, ImageSettings
from crishim.errors import ConfigError, CrishimError, SignatureValidationFailed
from crishim.images import registries
from crishim.images.policy import Policy
from crishim.images.reference import Reference

_LOW_BYTES = {"root": 2 << 30, "state": 32 << 20}
_LOW_INODES = 10_000


def examine(config: Config) -> list[Requirement]:
    """All of this module."""
    found = []
    for key, path in (("root", Path(config.root)), ("state", Path(config.state))):
        found += [writable(key, path), space(key, path)]
    return [*found, registries_conf(config.image), policy(config.image), holder_of(Paths.of(config).database)]


def existing(path: Path) -> Path:
    """``path``, or the closest directory above it that is there."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def writable(key: str, path: Path) -> Requirement:
    """Whether the directory can be used, or made."""
    there = existing(path)
    if not there.is_dir():
        return Requirement(key, f"{there} is not a directory", False, advice=f"set {key} to another path")
    if not os.access(there, os.W_OK | os.X_OK):
        return Requirement(key, f"{there} is not writable", False, advice=f"run as root, or set {key} to another path")
    return Requirement(key, f"{path}" if there == path else f"{path}, to be made in {there}")


def space(key: str, path: Path) -> Requirement:
    """Free bytes and inodes; file systems that do not count inodes report none at all."""
    there = existing(path)
    try:
        seen = os.statvfs(there)
    except OSError as err:
        return Requirement(f"space in {key}", gist(err), False, needed=False)
    free = seen.f_bavail * seen.f_frsize
    low = free < _LOW_BYTES[key] or (seen.f_files > 0 and seen.f_favail < _LOW_INODES)
    inodes = f", {seen.f_favail} inodes" if seen.f_files else ""
    return Requirement(
        f"space in {key}", f"{in_words(free)}{inodes} free", not low, needed=False, advice=f"make room in {there}"
    )


def in_words(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def registries_conf(settings: ImageSettings) -> Requirement:
    """Whether the file parses; without one, names mean what they mean to Docker."""
    path = Path(settings.registries_conf)
    advice = "mend the file: no image can be pulled"
    if not os.path.exists(path):
        return Requirement("registries.conf", f"no {path}: registries are reached over TLS by their names")
    try:
        conf = registries.load(path)
    except ConfigError as err:
        return Requirement("registries.conf", err.message, False, advice=advice)
    return Requirement("registries.conf", f"{path}, {len(conf.registry)} registries", advice=advice)


def policy(settings: ImageSettings) -> Requirement:
    """Whether the file parses; the default one may be absent."""
    path = Path(settings.policy)
    if not os.path.exists(path) and settings.policy == ImageSettings().policy:
        return Requirement("policy.json", f"no {path}: images are accepted without signatures")
    try:
        Policy(settings).check(Reference("localhost", "crishim/check", "latest"))
    except SignatureValidationFailed:
        pass  # it is a decision, so the file is in order
    except CrishimError as err:
        return Requirement("policy.json", err.message, False, advice="mend the file: no image can be pulled")
    return Requirement("policy.json", str(path))


def holder_of(database: Path, locks: Path = Path("/proc/locks")) -> Requirement:
    """Who has locked ``database`` (proc_locks(5)): looking does not touch the lock."""
    try:
        seen = database.with_suffix(".lock").stat()
        wanted = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
        lines = [line.split() for line in locks.read_text().splitlines()]
    except OSError:
        return Requirement("other crishim", "none", needed=False)
    pids = [line[4] for line in lines if line[1] == "FLOCK" and line[5] == wanted]
    return Requirement("other crishim", f"process {pids[0]} uses this root" if pids else "none", needed=False)
