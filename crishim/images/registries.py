"""Where images are fetched from: containers-registries.conf(5), version 2.

This version reads ``unqualified-search-registries`` and, of each ``[[registry]]``, ``prefix``, ``location``,
``insecure``, ``blocked`` and ``mirror`` (``location``, ``insecure``, ``pull-from-mirror``); keys that it
does not know are refused rather than ignored.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from crishim.errors import ConfigError, PermissionDenied
from crishim.images.reference import DEFAULT_DOMAIN, Reference, is_short, parse


class MirrorEntry(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """A ``[[registry.mirror]]`` table."""

    location: str
    insecure: bool = False
    pull_from_mirror: str = "all"


class RegistryEntry(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """A ``[[registry]]`` table."""

    location: str = ""
    prefix: str = ""
    insecure: bool = False
    blocked: bool = False
    mirror: list[MirrorEntry] = []
    mirror_by_digest_only: bool = False

    @property
    def scope(self) -> str:
        """What the table applies to."""
        return self.prefix or self.location


class RegistriesConf(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """The file."""

    unqualified_search_registries: list[str] = []
    short_name_mode: str = "permissive"
    registry: list[RegistryEntry] = []


@dataclass(frozen=True)
class Endpoint:
    """One place to try: a registry host and the repository there."""

    host: str
    repository: str
    insecure: bool
    mirror: bool = False
    """Whether it stands in for the registry that was named: credentials for that one are not for it."""


class Registries:
    """The configuration, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._conf = RegistriesConf()

    def candidates(self, text: str) -> list[Reference]:
        """What ``text`` may mean: itself, or for a short name each search registry's image of that name."""
        conf = self._read()
        if not is_short(text) or not conf.unqualified_search_registries:
            return [parse(text)]
        return [parse(f"{registry}/{text}") for registry in conf.unqualified_search_registries]

    def endpoints(self, reference: Reference) -> list[Endpoint]:
        """Where to look for ``reference``, in order: mirrors, then the registry itself."""
        entry = _match(self._read().registry, reference)
        if entry is None:
            return [_endpoint(reference.name, insecure=False)]
        if entry.blocked:
            raise PermissionDenied(f"registry {entry.scope} is blocked by {self._path}")
        rest = reference.name.removeprefix(entry.scope) if not entry.scope.startswith("*.") else ""
        places = [
            _endpoint(mirror.location + rest, insecure=mirror.insecure, mirror=True)
            for mirror in entry.mirror
            if _mirror_applies(mirror, entry, reference)
        ]
        own = (entry.location or entry.scope) + rest if rest or not entry.scope.startswith("*.") else reference.name
        return [*places, _endpoint(own, insecure=entry.insecure)]

    def _read(self) -> RegistriesConf:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return RegistriesConf()
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            self._conf = load(self._path)
            self._stamp = stamp
        return self._conf


def load(path: Path) -> RegistriesConf:
    """Parse the file; :class:`ConfigError` names what is wrong."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
        conf = msgspec.convert(data, RegistriesConf)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as err:
        raise ConfigError(f"{path}: {str(err)[:1].lower()}{str(err)[1:]}") from err
    for entry in conf.registry:
        if not entry.scope:
            raise ConfigError(f"{path}: a registry has neither prefix nor location")
    return conf


def _match(entries: list[RegistryEntry], reference: Reference) -> RegistryEntry | None:
    """The entry with the longest matching prefix; a match ends at a component boundary."""
    matching = [entry for entry in entries if _covers(entry.scope, reference)]
    return max(matching, key=lambda entry: len(entry.scope), default=None)


def _covers(scope: str, reference: Reference) -> bool:
    if scope.startswith("*."):
        return reference.domain.partition(":")[0].endswith(scope[1:])
    full = f"{reference.name}:{reference.tag}" if reference.tag else reference.with_digest(reference.digest)
    return full == scope or (full.startswith(scope) and full[len(scope)] in "/:@")


def _mirror_applies(mirror: MirrorEntry, entry: RegistryEntry, reference: Reference) -> bool:
    wanted = "digest-only" if entry.mirror_by_digest_only else mirror.pull_from_mirror
    if wanted == "all":
        return True
    return (wanted == "digest-only") == bool(reference.digest)


def _endpoint(place: str, *, insecure: bool, mirror: bool = False) -> Endpoint:
    host, _, repository = place.partition("/")
    if host == DEFAULT_DOMAIN:
        host = "registry-1.docker.io"
    return Endpoint(host, repository, insecure, mirror)
