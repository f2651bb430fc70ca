"""Manifests, indexes and configs as typed values, verified against their digests.

Sources: OCI image-spec (manifest.md, image-index.md, config.md) and Docker's image manifest version 2
schema 2.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from crishim.errors import BadImage
from crishim.model.records import ImageConfig

T = TypeVar("T")

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
ACCEPT = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYERS = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")
MAX_LAYERS = 127  # overlayfs takes 500, Docker and containers/storage build no more than this

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x"}


class Platform(msgspec.Struct, frozen=True):
    """What a manifest in an index is for."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A reference to content by digest."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    urls: list[str] | None = None


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """An image index, or Docker's manifest list."""

    manifests: list[Descriptor]


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest."""

    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = 2
    artifact_type: str = ""


class _RootFs(msgspec.Struct, frozen=True):
    type: str = ""
    diff_ids: list[str] = []


class ConfigFile(msgspec.Struct, frozen=True):
    """An image's config."""

    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    config: ImageConfig | None = None


class _Kind(msgspec.Struct, rename="camel"):
    media_type: str = ""
    schema_version: int = 0
    manifests: list[msgspec.Raw] | None = None


@dataclass(frozen=True)
class Document:
    """Bytes that have been verified, and what they are."""

    digest: str
    data: bytes
    media_type: str


def verify(data: bytes, digest: str, what: str) -> None:
    """:class:`BadImage` unless ``data`` has ``digest``."""
    algorithm, _, expected = digest.partition(":")
    try:
        found = hashlib.new(algorithm, data, usedforsecurity=True).hexdigest()
    except ValueError as err:
        raise BadImage(f"{what} has a digest of unknown kind {algorithm!r}") from err
    if found != expected:
        raise BadImage(f"{what} has digest {algorithm}:{found}, wanted {digest}")


def is_index(document: Document) -> bool:
    """Whether it lists manifests; the content decides where it contradicts the header."""
    kind = _decode(document, _Kind)
    if kind.schema_version == 1 or "manifest.v1" in document.media_type.replace("image.manifest.v1", ""):
        raise BadImage("the manifest is of Docker's schema 1, which no current registry needs and nobody verifies")
    media_type = kind.media_type or document.media_type
    if media_type in (OCI_INDEX, DOCKER_LIST):
        return True
    if media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
        return False
    return kind.manifests is not None


def choose(document: Document, machine: str | None = None) -> Descriptor:
    """The manifest of an index for this node: the exact architecture, the best variant."""
    index = _decode(document, Index)
    architecture = node_architecture(machine)
    fitting = [
        item
        for item in index.manifests
        if item.platform and item.platform.os == "linux" and item.platform.architecture == architecture
    ]
    if not fitting:
        offered = sorted({f"{i.platform.os}/{i.platform.architecture}" for i in index.manifests if i.platform})
        raise BadImage(f"the image is not for linux/{architecture}, only for {', '.join(offered) or 'nothing'}")
    preferred = {"arm64": ("v8", ""), "arm": ("v7", "v6", "v5", ""), "amd64": ("", "v1")}.get(architecture, ("",))

    def rank(item: Descriptor) -> int:
        variant = item.platform.variant if item.platform else ""
        return preferred.index(variant) if variant in preferred else len(preferred)

    return min(fitting, key=rank)


def node_architecture(machine: str | None = None) -> str:
    """This machine in the words of image configs (Go's GOARCH)."""
    machine = machine or os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def read_manifest(document: Document) -> Manifest:
    """The manifest, checked for what this version can run."""
    manifest = _decode(document, Manifest)
    if manifest.config.media_type not in (*_CONFIGS, ""):
        raise BadImage(f"the manifest is an artifact of type {manifest.config.media_type!r}, not a container image")
    if len(manifest.layers) > MAX_LAYERS:
        raise BadImage(f"the image has {len(manifest.layers)} layers, more than {MAX_LAYERS}")
    for part in (manifest.config, *manifest.layers):
        if not _DIGEST.fullmatch(part.digest):
            raise BadImage(f"the manifest refers to {part.digest!r}, which is no digest that can be verified")
    for layer in manifest.layers:
        if layer.size < 0:
            raise BadImage(f"layer {layer.digest} has a negative size")
        if layer.media_type not in (*_LAYERS, ""):
            raise BadImage(f"layer {layer.digest} is of media type {layer.media_type!r}, which is not supported")
    return manifest


def read_config(data: bytes, manifest: Manifest) -> ConfigFile:
    """The config, checked against the manifest and this node."""
    config = _decode(Document(manifest.config.digest, data, ""), ConfigFile, "config")
    if config.os not in ("linux", ""):
        raise BadImage(f"the image is for {config.os}, not for linux")
    if config.architecture not in (node_architecture(), ""):
        raise BadImage(f"the image is for {config.architecture}, this node is {node_architecture()}")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise BadImage(
            f"the manifest has {len(manifest.layers)} layers, the config {len(config.rootfs.diff_ids)} diff IDs"
        )
    return config


def _decode(document: Document, kind: type[T], what: str = "manifest") -> T:
    try:
        return msgspec.json.decode(document.data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise BadImage(f"the {what} {document.digest} is malformed: {str(err)[:1].lower()}{str(err)[1:]}") from err
