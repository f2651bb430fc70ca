"""Builds container images in memory: layers with tarfile, manifests and indexes in OCI's and Docker's form."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_PLAIN = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
OTHER_ARCHITECTURE = "arm64" if ARCHITECTURE == "amd64" else "amd64"
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


def sha256(data: bytes) -> str:
    """The digest of ``data`` as registries write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One member of a layer; a regular file unless ``kind`` says otherwise."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    uid: int = 0
    gid: int = 0

    def header(self) -> tarfile.TarInfo:
        """The member's header."""
        info = tarfile.TarInfo(self.name)
        info.mode, info.type, info.linkname = self.mode, self.kind, self.link
        info.uid, info.gid, info.size = self.uid, self.gid, len(self.data)
        return info


def folder(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, mode=mode, kind=tarfile.DIRTYPE)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, mode=0o777, kind=tarfile.SYMTYPE, link=target)


def hard_link(name: str, target: str) -> Entry:
    """Another name of a file."""
    return Entry(name, mode=0o755, kind=tarfile.LNKTYPE, link=target)


@dataclass(frozen=True)
class Layer:
    """A layer: what the registry has of it, and what it says it is."""

    data: bytes
    diff_id: str
    compressed: bool = True

    @property
    def digest(self) -> str:
        """The digest of what is transferred."""
        return sha256(self.data)


def layer(entries: Iterable[Entry], *, compress: bool = True) -> Layer:
    """Pack ``entries``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            archive.addfile(entry.header(), io.BytesIO(entry.data) if entry.data else None)
    plain = buffer.getvalue()
    return Layer(gzip.compress(plain, 1, mtime=0) if compress else plain, sha256(plain), compress)


@dataclass(frozen=True)
class Document:
    """A manifest or an index, as it is pushed."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        """Its name."""
        return sha256(self.data)


@dataclass(frozen=True)
class Image:
    """An image for one platform, in OCI's form or in Docker's schema 2."""

    layers: tuple[Layer, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The ``config`` object: Cmd, Env, User and so on."""
    docker: bool = False
    architecture: str = ARCHITECTURE
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What to write into the manifest instead of what is true: for tests of what is wrong."""

    @property
    def config_data(self) -> bytes:
        """The config blob."""
        return json.dumps(
            {
                "architecture": self.architecture,
                "os": "linux",
                "config": dict(self.config),
                "rootfs": {"type": "layers", "diff_ids": [item.diff_id for item in self.layers]},
            }
        ).encode()

    @property
    def id(self) -> str:
        """The image ID: the digest of the config."""
        return sha256(self.config_data)

    @property
    def manifest(self) -> Document:
        """The manifest."""
        media_type = DOCKER_MANIFEST if self.docker else OCI_MANIFEST
        config = self.config_data
        body: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": _descriptor(config, DOCKER_CONFIG if self.docker else OCI_CONFIG),
            "layers": [_descriptor(item.data, self._layer_type(item)) for item in self.layers],
        }
        return Document(json.dumps(body | dict(self.overrides)).encode(), media_type)

    @property
    def blobs(self) -> dict[str, bytes]:
        """Everything that the manifest refers to, by digest."""
        return {sha256(self.config_data): self.config_data, **{item.digest: item.data for item in self.layers}}

    def _layer_type(self, item: Layer) -> str:
        if self.docker:
            return DOCKER_LAYER
        return OCI_LAYER if item.compressed else OCI_LAYER_PLAIN

    def with_config(self, **config: Any) -> Image:
        """The same layers with another config."""
        return dataclasses.replace(self, config={**self.config, **config})

    def above(self, *more: Layer, **config: Any) -> Image:
        """This image with more layers on top."""
        return dataclasses.replace(self, layers=(*self.layers, *more), config={**self.config, **config})


def _descriptor(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


def index(images: Sequence[Image], *, docker: bool = False) -> Document:
    """An index with one image for each platform."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    manifests = [
        {
            **_descriptor(image.manifest.data, image.manifest.media_type),
            "platform": {"os": "linux", "architecture": image.architecture},
        }
        for image in images
    ]
    body = {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}
    return Document(json.dumps(body).encode(), media_type)


PASSWD = b"""root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/bin/sh
"""
GROUP = b"""root:x:0:
daemon:x:1:
adm:x:4:www-data
www-data:x:33:
tape:x:26:www-data
"""


@functools.cache
def busybox() -> Image:
    """An image of the host's busybox with its libraries; the applets are hard links to it."""
    program = shutil.which("busybox")
    assert program is not None, "busybox is not installed"
    entries = [
        *(folder(name) for name in ("bin", "etc", "proc", "sys", "dev", "root", "var", "var/www", "usr", "lib64")),
        folder("tmp", 0o1777),
        Entry("etc/passwd", PASSWD),
        Entry("etc/group", GROUP),
        Entry("bin/busybox", Path(program).read_bytes(), 0o755),
    ]
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    entries += [hard_link(f"bin/{name}", "bin/busybox") for name in applets if name != "busybox"]
    entries += [Entry(path.lstrip("/"), Path(path).read_bytes(), 0o755) for path in _libraries(program)]
    return Image((layer(entries),), {"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]})


def _libraries(program: str) -> list[str]:
    """The loader and the libraries of ``program``; none of one that is static."""
    loader = next((path for path in _LOADERS if Path(path).exists()), "")
    done = subprocess.run([loader, "--list", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return []
    words = [word for line in done.stdout.splitlines() for word in line.split()]
    return list(dict.fromkeys([loader, *(word for word in words if word.startswith("/"))]))
