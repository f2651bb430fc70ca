"""TLS for the streaming server, with certificates that are read again when their files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from crishim.errors import ConfigError

_log = logging.getLogger(__name__)

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Certificates:
    """A server context. Its certificate is looked at with each handshake, two stats of files."""

    def __init__(self, certificate: Path, key: Path, min_version: str = "1.2") -> None:
        self._files = (certificate, key)
        self._version = VERSIONS[min_version]
        self._loaded = self._stamp()
        self.context = self._load()
        self._current = self.context
        self.context.sni_callback = self._on_handshake

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [path.stat() for path in self._files]
        except OSError as err:
            raise ConfigError(f"cannot read {err.filename}: {err.strerror}") from err
        return tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in stats)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self._version
        context.set_alpn_protocols(["http/1.1"])
        certificate, key = self._files
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as err:
            raise ConfigError(f"cannot use the certificate {certificate} with the key {key}: {err}") from err
        return context

    def _on_handshake(self, connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called for every ClientHello, with or without a name in it."""
        try:
            stamp = self._stamp()
            if stamp != self._loaded:
                self._loaded = stamp
                self._current = self._load()
                _log.info("read the streaming server's certificate %s again", self._files[0])
        except ConfigError as err:
            _log.warning("keeping the old certificate: %s", err)
        connection.context = self._current
