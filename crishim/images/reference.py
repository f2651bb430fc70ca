"""Image references: parsed, normalised as Docker does, and spelled out.

Grammar and normalisation are those of github.com/distribution/reference (regexp.go, normalize.go).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from crishim.errors import InvalidArgument

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_DOMAIN = re.compile(_HOST)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}")
_HEX_LENGTH = {"sha256": 64, "sha384": 96, "sha512": 128}

DEFAULT_DOMAIN = "docker.io"
_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library"
_MAX_NAME = 255


@dataclass(frozen=True)
class Reference:
    """A normalised reference: a repository, and a tag or a digest."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """The repository with its registry."""
        return f"{self.domain}/{self.path}"

    @property
    def target(self) -> str:
        """What to ask the registry for; a digest counts more than a tag."""
        return self.digest or self.tag

    def with_digest(self, digest: str) -> str:
        """The repo digest for ``digest``."""
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        return self.name + (f"@{self.digest}" if self.digest else f":{self.tag}")


def parse(text: str) -> Reference:
    """The reference that ``text`` means; without tag and digest the tag is ``latest``.

    Where both are given the digest decides and the tag is dropped, as containerd does.
    """
    rest, _, digest = text.partition("@")
    if "@" in text:
        check_digest(digest, text)
    name, tag = _split_tag(rest)
    if not name:
        raise InvalidArgument(f"image reference {text!r} has no name")
    domain, path = _split_domain(name)
    if re.fullmatch(r"[a-f0-9]{64}", name):
        raise InvalidArgument(f"image reference {text!r} is a bare identifier, not a name")
    if not _DOMAIN.fullmatch(domain):
        raise InvalidArgument(f"image reference {text!r} has a malformed registry {domain!r}")
    if not _PATH.fullmatch(path):
        hint = ": repository names are lowercase" if path != path.lower() else ""
        raise InvalidArgument(f"image reference {text!r} has a malformed repository {path!r}{hint}")
    if len(domain) + 1 + len(path) > _MAX_NAME:
        raise InvalidArgument(f"image reference {text[:64]!r}… has a name of more than {_MAX_NAME} characters")
    if tag is not None and not _TAG.fullmatch(tag):
        raise InvalidArgument(f"image reference {text!r} has a malformed tag {tag!r}")
    return Reference(domain, path, "" if digest else tag or "latest", digest)


def is_short(text: str) -> bool:
    """Whether ``text`` leaves the registry open, so that search registries apply."""
    first, slash, _ = text.partition("/")
    return not slash or not _looks_like_domain(first)


def check_digest(digest: str, where: str) -> str:
    """``digest`` if it is well formed and of an algorithm that we can verify."""
    algorithm, _, value = digest.partition(":")
    if not _DIGEST.fullmatch(digest) or len(value) != _HEX_LENGTH.get(algorithm, -1) or value != value.lower():
        raise InvalidArgument(f"{where!r} has a malformed or unknown digest {digest!r}")
    return digest


def _split_tag(rest: str) -> tuple[str, str | None]:
    colon = rest.rfind(":")
    if colon > rest.rfind("/"):
        return rest[:colon], rest[colon + 1 :]
    return rest, None


def _looks_like_domain(first: str) -> bool:
    return any(char in first for char in ".:") or first == "localhost" or first != first.lower()


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _looks_like_domain(first):
        domain, path = DEFAULT_DOMAIN, name
    else:
        domain, path = first, rest
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"{_OFFICIAL}/{path}"
    return domain, path
