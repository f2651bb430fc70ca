"""Talks to registries: the OCI distribution-spec's pull half, and Docker's token authentication.

Blocking; runs in threads. Sources: opencontainers/distribution-spec (spec.md, pulling), and
distribution.github.io (token authentication specification).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from crishim.errors import BadImage, NotFound, PermissionDenied, RegistryUnavailable
from crishim.images.auth import ANONYMOUS, Credentials
from crishim.images.manifest import ACCEPT, Descriptor, Document, verify
from crishim.images.registries import Endpoint
from crishim.observe.metrics import PULLED_BYTES

_log = logging.getLogger(__name__)

_MAX_DOCUMENT = 8 << 20
_DOCUMENT_SECONDS = 120.0  # small documents come at once, or somebody wants to hold us
_CHUNK = 1 << 20
_CONNECT_SECONDS = 10.0
_RETRIES = urllib3.Retry(
    total=3, connect=2, read=2, redirect=5, status=2, backoff_factor=0.3, status_forcelist=(429, 502, 503, 504)
)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Tls:
    """How TLS connections to one host are made."""

    ca: tuple[str, ...] = ()
    certificate: str = ""
    key: str = ""


def tls_of(certs_dir: Path, host: str) -> Tls:
    """What containers-certs.d(5) has for ``host``: ``*.crt`` are CAs, ``*.cert`` with ``*.key`` is ours."""
    folder = certs_dir / host
    if not folder.is_dir():
        return Tls()
    certificate = next(iter(sorted(folder.glob("*.cert"))), None)
    key = certificate.with_suffix(".key") if certificate else None
    return Tls(
        tuple(str(path) for path in sorted(folder.glob("*.crt"))),
        str(certificate or ""),
        str(key) if key and key.exists() else "",
    )


@dataclass
class Repository:
    """One repository at one endpoint, with the credentials for it; holds its token."""

    endpoint: Endpoint
    credentials: Credentials = ANONYMOUS
    certs_dir: Path = Path("/etc/containers/certs.d")
    stall_seconds: float = 60.0
    _authorization: str = field(default="", repr=False)
    _scheme: str = "https"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _pool: urllib3.PoolManager | None = None

    def manifest(self, target: str) -> Document:
        """The manifest or index ``target`` (a tag or a digest), verified if it is a digest."""
        headers = {"Accept": ", ".join(ACCEPT)}
        with self._request(f"manifests/{target}", headers) as response:
            data = _read_document(response, _MAX_DOCUMENT, f"manifest {target}")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        digest = target if ":" in target else "sha256:" + hashlib.sha256(data).hexdigest()
        verify(data, digest, "the manifest")
        return Document(digest, data, media_type)

    def document(self, descriptor: Descriptor, what: str) -> bytes:
        """A small blob, verified."""
        if not 0 <= descriptor.size <= _MAX_DOCUMENT:
            raise BadImage(f"the {what} of {descriptor.size} bytes is too large")
        with self._request(f"blobs/{descriptor.digest}") as response:
            data = _read_document(response, descriptor.size, what)
        if len(data) != descriptor.size:
            raise BadImage(f"the {what} has {len(data)} bytes, the manifest says {descriptor.size}")
        verify(data, descriptor.digest, f"the {what}")
        return data

    def blob(self, descriptor: Descriptor, fd: int) -> None:
        """Write a blob to ``fd``; raises if what came was not exactly what ``descriptor`` says."""
        algorithm, _, expected = descriptor.digest.partition(":")
        try:
            digest = hashlib.new(algorithm)
        except ValueError as err:
            raise BadImage(f"layer {descriptor.digest} has a digest of unknown kind") from err
        count = 0
        with self._request(f"blobs/{descriptor.digest}") as response:
            for chunk in _chunks(response, descriptor.digest):
                count += len(chunk)
                if count > descriptor.size:
                    raise BadImage(f"layer {descriptor.digest} is larger than the {descriptor.size} bytes expected")
                digest.update(chunk)
                PULLED_BYTES.inc(len(chunk))
                _write_all(fd, chunk)
        if count != descriptor.size:
            raise BadImage(f"layer {descriptor.digest} has {count} bytes, the manifest says {descriptor.size}")
        if digest.hexdigest() != expected:
            raise BadImage(f"layer has digest {algorithm}:{digest.hexdigest()}, wanted {descriptor.digest}")

    @contextlib.contextmanager
    def _request(self, what: str, headers: dict[str, str] | None = None) -> Iterator[urllib3.BaseHTTPResponse]:
        """A successful GET, after authentication where it is asked for."""
        response = self._get(what, headers or {})
        try:
            if response.status == 401:
                self._authenticate(response)
                response.close()
                response = self._get(what, headers or {})
            self._check(response, what)
            yield response
        finally:
            response.close()  # a connection that was read to its end is back in the pool by now

    def _get(self, what: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        if self._authorization:
            headers = {**headers, "Authorization": self._authorization}
        path = f"/v2/{self.endpoint.repository}/{what}"
        try:
            return self._send(self._scheme, path, headers)
        except RegistryUnavailable:
            if not self.endpoint.insecure or self._scheme == "http":
                raise
            response = self._send("http", path, headers)  # containers-registries.conf(5): insecure allows this
            self._scheme = "http"
            return response

    def _send(self, scheme: str, path: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        return self._open(f"{scheme}://{self.endpoint.host}{path}", headers)

    def _open(self, url: str, headers: dict[str, str], **more: Any) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=self.stall_seconds)
        retries = _RETRIES if url.startswith("https") or self._scheme == "http" else _RETRIES.new(total=1)
        if self.endpoint.insecure and self._scheme == "https":
            retries = _RETRIES.new(total=0, connect=0, redirect=5)
        try:
            return self._manager().request(
                more.pop("method", "GET"),
                url,
                headers=headers,
                preload_content=False,
                decode_content=False,
                timeout=timeout,
                retries=retries,
                **more,
            )
        except urllib3.exceptions.HTTPError as err:
            raise RegistryUnavailable(f"cannot reach {self.endpoint.host}: {_cause(err)}") from err

    def _manager(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                tls = tls_of(self.certs_dir, self.endpoint.host)
                context = ssl.create_default_context()
                try:
                    for ca in tls.ca:
                        context.load_verify_locations(ca)
                    if tls.certificate:
                        context.load_cert_chain(tls.certificate, tls.key or None)
                except (OSError, ssl.SSLError) as err:
                    raise RegistryUnavailable(f"cannot use the certificates for {self.endpoint.host}: {err}") from err
                if self.endpoint.insecure:
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                self._pool = urllib3.PoolManager(
                    maxsize=8, ssl_context=context, assert_hostname=None if not self.endpoint.insecure else False
                )
            return self._pool

    def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            self._pool.clear()

    def _authenticate(self, response: urllib3.BaseHTTPResponse) -> None:
        """Answer a 401 as its ``WWW-Authenticate`` header asks (RFC 9110; Docker's token specification)."""
        challenge = response.headers.get("WWW-Authenticate", "")
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic" and self.credentials.basic:
            self._authorization = self.credentials.basic
        elif scheme.lower() == "bearer":
            self._authorization = "Bearer " + self._token(dict(_CHALLENGE.findall(rest)))

    def _token(self, parameters: dict[str, str]) -> str:
        if self.credentials.registry_token:
            return self.credentials.registry_token
        realm = parameters.get("realm", "")
        if not realm.startswith(("https://", "http://")):
            raise RegistryUnavailable(f"{self.endpoint.host} asks for a token from {realm!r}, which is no address")
        if realm.startswith("http://") and self.credentials != ANONYMOUS and not self.endpoint.insecure:
            raise PermissionDenied(f"{self.endpoint.host} asks for credentials over plain http, and is not insecure")
        query = {"service": parameters.get("service", ""), "scope": self._scope(parameters)}
        if self.credentials.identity_token:
            body = urlencode(
                {**query, "grant_type": "refresh_token", "client_id": "crishim",
                 "refresh_token": self.credentials.identity_token}
            )  # fmt: skip
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            response = self._open(realm, headers, method="POST", body=body, redirect=False)
        else:
            basic = self.credentials.basic
            separator = "&" if "?" in realm else "?"
            response = self._open(realm + separator + urlencode(query), {"Authorization": basic} if basic else {})
        return self._read_token(response)

    def _read_token(self, response: urllib3.BaseHTTPResponse) -> str:
        try:
            if response.status in (400, 401, 403):
                raise PermissionDenied(f"{self.endpoint.host} refuses the credentials for {self.endpoint.repository}")
            answer = json.loads(_read_document(response, 1 << 20, "token"))
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        finally:
            response.close()
        if not isinstance(token, str) or not token or response.status != 200:
            raise RegistryUnavailable(f"{self.endpoint.host} gave no token: status {response.status}")
        return token

    def _scope(self, parameters: dict[str, str]) -> str:
        return parameters.get("scope") or f"repository:{self.endpoint.repository}:pull"

    def _check(self, response: urllib3.BaseHTTPResponse, what: str) -> None:
        where = f"{self.endpoint.host}/{self.endpoint.repository}"
        if response.status == 200:
            return
        if response.status == 404:
            raise NotFound(f"{where} has no {_described(what)}")
        if response.status in (401, 403):
            raise PermissionDenied(f"{where} does not let us read {_described(what)}")
        raise RegistryUnavailable(f"{where} answers {response.status} for {_described(what)}")


def _read_document(response: urllib3.BaseHTTPResponse, limit: int, what: str) -> bytes:
    data = bytearray()
    end = time.monotonic() + _DOCUMENT_SECONDS
    for chunk in _chunks(response, what):
        data += chunk
        if time.monotonic() > end:
            raise RegistryUnavailable(f"the transfer of {what} took more than {_DOCUMENT_SECONDS:g} s")
        if len(data) > limit:
            raise BadImage(f"the {what} is larger than {limit} bytes")
    return bytes(data)


def _chunks(response: urllib3.BaseHTTPResponse, what: str) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except urllib3.exceptions.HTTPError as err:
        raise RegistryUnavailable(f"the transfer of {what} broke: {_cause(err)}") from err


def _write_all(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _cause(err: BaseException) -> str:
    """The reason at the bottom of urllib3's nested errors, in the operating system's or TLS's words."""
    root: BaseException | None = err
    while root is not None and not isinstance(root, OSError):
        inner = [getattr(root, "reason", None), *root.args, root.__cause__]
        root = next((item for item in inner if isinstance(item, BaseException)), None)
    if isinstance(root, ssl.SSLError) and root.reason:
        hint = ": it may speak plain http, which registries.conf must allow as insecure"
        reason = root.reason.lower().replace("_", " ")
        return f"tls: {reason}{hint if root.reason == 'WRONG_VERSION_NUMBER' else ''}"
    if isinstance(root, OSError) and root.strerror:
        return root.strerror.lower().rstrip(".")
    text = str(root or err).rpartition(": ")[2].rstrip(". ") or type(err).__name__
    return text[:1].lower() + text[1:]


def _described(what: str) -> str:
    """``manifests/v1`` and the like, as a person would say it."""
    kind, _, name = what.partition("/")
    if kind == "manifests":
        return f"manifest {name}" if ":" in name else f"tag {name}"
    return f"blob {name}"
