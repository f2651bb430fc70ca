"""The registry of the suite's images: filled once, kept in the cache, served on a loopback port."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import root.harness.images
from root.harness.registry import Registry

from . import images, programs

_SOURCES = ("bash", "busybox", "catatonit", "ipcs", "pgrep")


def stored(cache: Path, nginx: Path) -> Path:
    """The directory of a registry that has all images, made now unless it is in ``cache``."""
    place = cache / f"registry-{_key(nginx)}"
    if not place.exists():
        for old in cache.glob("registry-*"):
            shutil.rmtree(old)
        # Every repository gets its own upload of the same layers: in memory that costs no disk writes.
        with tempfile.TemporaryDirectory(dir=_memory()) as made:
            _fill(Path(made) / "registry", nginx)
            shutil.move(Path(made) / "registry", place)
    return place


def _fill(directory: Path, nginx: Path) -> None:
    registry = Registry(directory)
    registry.start()
    try:
        for name, image in images.catalog(nginx).items():
            repository, _, tag = name.rpartition(":")
            registry.push(repository, image, tag)
    finally:
        registry.stop()


def _key(nginx: Path) -> str:
    """Changes with the programs and with what makes images of them."""
    found = [Path(module.__file__ or "").read_bytes() for module in (images, root.harness.images)]
    for path in (nginx, *(programs.find(name) for name in _SOURCES)):
        status = path.stat()
        found.append(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return hashlib.sha256(b"\0".join(found)).hexdigest()[:16]


def _memory() -> Path | None:
    place = Path("/dev/shm")
    return place if place.is_dir() else None


@contextlib.contextmanager
def serving(directory: Path, port: int = 0) -> Iterator[int]:
    """Serve what is in ``directory``; the value is the port, a free one unless it is given."""
    registry = Registry(directory)
    if port:
        registry.host = f"127.0.0.1:{port}"
    try:
        registry.start()
        yield int(registry.host.rpartition(":")[2])
    finally:
        registry.stop()
