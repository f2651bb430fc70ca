"""Which images may be used: containers-policy.json(5).

This version decides ``insecureAcceptAnything`` and ``reject``; an image that a policy wants signed is
refused, since signatures are not verified yet.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from crishim.config.settings import ImageSettings
from crishim.errors import ConfigError, SignatureValidationFailed
from crishim.images.reference import Reference

_log = logging.getLogger(__name__)


class Policy:
    """The trust policy of the node, read for every decision."""

    def __init__(self, settings: ImageSettings) -> None:
        self._path = Path(settings.policy)
        self._optional = settings.policy == ImageSettings().policy
        self._told = False

    def check(self, reference: Reference) -> None:
        """:class:`SignatureValidationFailed` if the policy does not let ``reference`` in."""
        document = self._read()
        if document is None:
            return
        for requirement in _requirements(document, reference, self._path):
            kind = requirement.get("type") if isinstance(requirement, dict) else None
            if kind == "insecureAcceptAnything":
                continue
            if kind == "reject":
                raise SignatureValidationFailed(f"image {reference} is rejected by {self._path}")
            raise SignatureValidationFailed(
                f"image {reference} needs {kind!r} by {self._path}, which this version cannot verify"
            )

    def _read(self) -> dict[str, Any] | None:
        try:
            document = json.loads(self._path.read_text())
        except FileNotFoundError:
            if not self._optional:
                raise ConfigError(f"image.policy {self._path} does not exist") from None
            if not self._told:
                _log.warning("there is no %s: images are accepted without signatures", self._path)
                self._told = True
            return None
        except (OSError, ValueError) as err:
            raise ConfigError(f"image.policy {self._path} cannot be read: {err}") from err
        if not isinstance(document, dict) or not isinstance(document.get("default"), list):
            raise ConfigError(f"image.policy {self._path} has no list 'default'")
        return document


def _requirements(document: dict[str, Any], reference: Reference, path: Path) -> list[Any]:
    """The list of the most specific scope (containers-policy.json(5), docker transport)."""
    scopes = document.get("transports", {}).get("docker", {})
    for scope in _scopes(reference):
        if scope in scopes:
            found = scopes[scope]
            if not isinstance(found, list) or not found:
                raise ConfigError(f"image.policy {path} has no requirements for {scope!r}")
            return found
    default: list[Any] = document["default"]
    if not default:
        raise ConfigError(f"image.policy {path} has an empty list 'default'")
    return default


def _scopes(reference: Reference) -> list[str]:
    parts = reference.name.split("/")
    repositories = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    labels = reference.domain.partition(":")[0].split(".")
    wildcards = ["*." + ".".join(labels[count:]) for count in range(1, len(labels))]
    return [str(reference), *repositories, *wildcards, ""]
