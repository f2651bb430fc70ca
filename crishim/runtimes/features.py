"""What an OCI runtime says that it can do: ``features`` (runtime-spec, features.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from crishim.errors import CrishimError
from crishim.host import process

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 10.0
_FIRST_KERNEL_WITH_MOUNT_SETATTR = (5, 12)


class _IdMap(msgspec.Struct, frozen=True):
    enabled: bool = False


class _MountExtensions(msgspec.Struct, frozen=True):
    idmap: _IdMap = _IdMap()


class _Linux(msgspec.Struct, rename="camel", frozen=True):
    namespaces: list[str] = []
    mount_extensions: _MountExtensions = _MountExtensions()


class Features(msgspec.Struct, rename="camel", frozen=True):
    """The part of the document that decides something here. All empty for a runtime that does not tell."""

    mount_options: list[str] = []
    linux: _Linux = _Linux()

    def recursive_read_only(self, kernel: str) -> bool:
        """Whether mounts below a mount can be made read-only with it: mount_setattr(2)."""
        version = tuple(int(part) for part in kernel.split("-", maxsplit=1)[0].split(".")[:2] if part.isdecimal())
        return "rro" in self.mount_options and version >= _FIRST_KERNEL_WITH_MOUNT_SETATTR


async def probe(path: str, arguments: Sequence[str]) -> Features:
    """Ask the runtime at ``path``; one that does not know the question has no features."""
    if not path:
        return Features()
    try:
        done = await process.run(process.Command([path, *arguments, "features"], timeout=_PROBE_SECONDS))
        return msgspec.json.decode(done.stdout, type=Features) if done.returncode == 0 else Features()
    except (CrishimError, msgspec.MsgspecError) as err:
        _log.warning("cannot learn the features of %s: %s", path, err)
        return Features()
