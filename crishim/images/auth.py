"""Credentials for registries: from the CRI's AuthConfig or from a containers-auth.json(5) file.

They are never logged and never stored.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from crishim.errors import ConfigError, InvalidArgument
from crishim.images.reference import Reference


@dataclass(frozen=True)
class Credentials:
    """How to introduce ourselves to one registry; empty for anonymous."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """An OAuth2 refresh token, exchanged for access tokens."""
    registry_token: str = field(default="", repr=False)
    """A bearer token, sent as it is."""

    @property
    def basic(self) -> str:
        """The value of a Basic ``Authorization`` header, or empty."""
        if not self.username:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


ANONYMOUS = Credentials()


@dataclass(frozen=True)
class AuthConfig:
    """The CRI's AuthConfig message."""

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    def credentials(self, reference: Reference) -> Credentials | None:
        """What it says for ``reference``; None if it is empty or meant for another server."""
        if self.server_address and not _same_server(self.server_address, reference.domain):
            return None
        if self.identity_token:
            return Credentials(identity_token=self.identity_token)
        if self.registry_token:
            return Credentials(registry_token=self.registry_token)
        if self.auth:
            return _decode(self.auth, "auth of the pull request")
        return Credentials(self.username, self.password) if self.username else None


def from_file(path: Path, name: str) -> Credentials | None:
    """The most specific entry for the repository ``name``, with its registry, in an ``auth.json``."""
    try:
        entries = json.loads(path.read_text()).get("auths", {})
    except (OSError, ValueError, AttributeError) as err:
        raise ConfigError(f"cannot read image.auth_file {path}: {type(err).__name__}") from err
    while name:
        for key in (name, f"https://{name}", f"https://{name}/v1/", f"https://{name}/v2/"):
            entry = entries.get(key)
            if isinstance(entry, dict):
                if entry.get("identitytoken"):
                    return Credentials(identity_token=str(entry["identitytoken"]))
                if entry.get("auth"):
                    return _decode(str(entry["auth"]), f"{key} in {path}")
        name = name.rpartition("/")[0]
    return None


def _decode(auth: str, where: str) -> Credentials:
    try:
        username, found, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as err:
        raise InvalidArgument(f"{where} is not base64 of USER:PASSWORD") from err
    if not found:
        raise InvalidArgument(f"{where} is not base64 of USER:PASSWORD")
    return Credentials(username, password.rstrip("\0"))


def _same_server(address: str, domain: str) -> bool:
    host = urlsplit(address).netloc if "://" in address else address.partition("/")[0]
    aliases = {"docker.io", "index.docker.io", "registry-1.docker.io"}
    return host == domain or {host, domain} <= aliases
