"""Makes images in memory: of given files, or of this host's busybox. The same files give the same digests.

Source: OCI image-spec (manifest.md, config.md, layer.md).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from crishim.cli import elf
from crishim.errors import HostFailure
from crishim.host import process
from crishim.images.manifest import OCI_MANIFEST, node_architecture

_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_LIBRARY = re.compile(r"(/\S+) \(0x[0-9a-f]+\)$")
_SECONDS = 10.0


@dataclass(frozen=True)
class File:
    """One entry of a layer; ``link`` makes it a hard link to an earlier file, a path from the root."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    link: str = ""


@dataclass(frozen=True)
class Image:
    """An image: its manifest, and everything that the manifest refers to by digest."""

    manifest: bytes
    blobs: Mapping[str, bytes] = field(repr=False)
    media_type: str = OCI_MANIFEST

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return digest_of(self.manifest)

    @property
    def size(self) -> int:
        """Bytes that a pull transfers."""
        return len(self.manifest) + sum(map(len, self.blobs.values()))


def digest_of(data: bytes) -> str:
    """What content is known by."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def archive(files: Iterable[File]) -> bytes:
    """A tar archive of ``files``, owned by root, with the directories that they need."""
    target = io.BytesIO()
    known = {PurePosixPath(".")}
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            path = PurePosixPath(file.path.lstrip("/"))
            for parent in reversed(path.parents):
                if parent not in known:
                    known.add(parent)
                    tar.addfile(_entry(str(parent), 0o755, tarfile.DIRTYPE))
            entry = _entry(str(path), file.mode, tarfile.LNKTYPE if file.link else tarfile.REGTYPE)
            entry.linkname, entry.size = file.link.lstrip("/"), len(file.data)
            tar.addfile(entry, io.BytesIO(file.data))
    return target.getvalue()


def _entry(name: str, mode: int, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.type = mode, kind
    return entry


def assemble(layers: Sequence[bytes], config: Mapping[str, Any]) -> Image:
    """An image of tar archives, lowest first, for this machine; ``config`` is what containers run by default."""
    packed = [gzip.compress(layer, 6, mtime=0) for layer in layers]
    document = {
        "architecture": node_architecture(),
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
    }
    described = json.dumps(document).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _descriptor(_CONFIG, described),
        "layers": [_descriptor(_LAYER, blob) for blob in packed],
    }
    return Image(json.dumps(manifest).encode(), {digest_of(blob): blob for blob in (described, *packed)})


def _descriptor(media_type: str, data: bytes) -> dict[str, str | int]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


async def busybox_files(program: Path | None = None) -> list[File]:
    """busybox with every applet as a hard link, and the libraries that it loads; by default the one on PATH."""
    found = program or _find_busybox()
    listed = (await _output([str(found), "--list"])).split()
    files = [File("/bin/busybox", found.read_bytes(), 0o755)]
    files += [File(f"/bin/{name}", mode=0o755, link="/bin/busybox") for name in listed if name != "busybox"]
    for library in await libraries(found):
        files.append(File(library, Path(library).read_bytes(), 0o755))
    return files


def _find_busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise HostFailure("there is no busybox on PATH: install busybox or busybox-static")
    return Path(found).resolve()


async def libraries(program: Path) -> list[str]:
    """The shared libraries that ``program`` would load, and its loader: ld.so(8), ``--list``."""
    loader = elf.interpreter(program)
    if not loader:
        return []
    lines = (await _output([loader, "--list", str(program)])).splitlines()
    return list(dict.fromkeys([loader, *(found[1] for line in lines if (found := _LIBRARY.search(line)))]))


async def _output(argv: Sequence[str]) -> str:
    done = await process.run(process.Command(argv, timeout=_SECONDS))
    if done.timed_out or done.returncode != 0:
        raise HostFailure(f"{' '.join(argv)} failed: {'no answer' if done.timed_out else done.complaint}")
    return done.stdout.decode(errors="replace")


async def busybox(page: str = "", *, config: Mapping[str, Any] | None = None) -> Image:
    """An image of one layer: busybox, its libraries, two accounts, and ``page`` as /www/index.html."""
    files = [
        *await busybox_files(),
        File("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        File("/etc/group", b"root:x:0:\nnogroup:x:65534:\n"),
        File("/www/index.html", page.encode()),
    ]
    return assemble([archive(files)], {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], **(config or {})})
