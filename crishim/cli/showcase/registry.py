"""A registry on the loopback interface that serves images from memory: the pull half of the distribution-spec.

It speaks plain HTTP on a port of the kernel's choosing, answers GET and HEAD, and ranges of blobs.
"""

from __future__ import annotations

import functools
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from crishim.cli.showcase.image import Image, digest_of

_ROUTE = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_TLS_HANDSHAKE = b"\x16"
_IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """What somebody asked for, and the status of the answer."""

    method: str
    path: str
    range: str
    status: int


@dataclass(frozen=True)
class _Content:
    data: bytes
    media_type: str = "application/octet-stream"
    digest: str = ""


@dataclass
class _Shelf:
    manifests: dict[tuple[str, str], _Content] = field(default_factory=dict)
    blobs: dict[str, _Content] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def find(self, path: str) -> _Content | None:
        route = _ROUTE.fullmatch(path)
        if route is None:
            return _Content(b"{}", "application/json") if path in ("/v2", "/v2/") else None
        if route["kind"] == "manifests":
            return self.manifests.get((route["repository"], route["reference"]))
        return self.blobs.get(route["reference"])


class Registry:
    """A running registry while its ``with`` block lasts."""

    def __init__(self) -> None:
        self._shelf = _Shelf()
        self._server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self._shelf))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="registry", daemon=True)

    @property
    def host(self) -> str:
        """Address and port: the first part of every image's name."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Request]:
        """Everything asked so far."""
        return list(self._shelf.requests)

    def add(self, repository: str, tag: str, image: Image) -> str:
        """Offer an image; the result is the name to pull it by."""
        for blob in image.blobs.values():
            self.add_blob(blob)
        self.add_manifest(repository, tag, image.manifest, image.media_type)
        return f"{self.host}/{repository}:{tag}"

    def add_blob(self, data: bytes) -> str:
        """Offer content in every repository; the result is its digest."""
        digest = digest_of(data)
        self._shelf.blobs[digest] = _Content(data, digest=digest)
        return digest

    def add_manifest(self, repository: str, tag: str, data: bytes, media_type: str) -> str:
        """Offer a manifest or index by tag and by digest; the result is the digest."""
        digest = digest_of(data)
        for reference in (tag, digest):
            self._shelf.manifests[(repository, reference)] = _Content(data, media_type, digest)
        return digest

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _IDLE_SECONDS

    def __init__(self, shelf: _Shelf, *arguments: Any) -> None:
        self._shelf = shelf
        super().__init__(*arguments)

    def handle(self) -> None:
        """Hang up on TLS at once: its first message has no line end for the HTTP parser to find."""
        if self.connection.recv(1, socket.MSG_PEEK) != _TLS_HANDSHAKE:
            super().handle()

    def do_GET(self) -> None:
        """A document, a blob, or a part of one."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """The same without the content."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        wanted = self.headers.get("Range", "")
        found = self._shelf.find(self.path.partition("?")[0])
        if found is None:
            error = {"errors": [{"code": "NAME_UNKNOWN", "message": "there is nothing here"}]}
            found = _Content(json.dumps(error).encode(), "application/json")
            status, part = HTTPStatus.NOT_FOUND, (0, len(found.data))
        else:
            status, part = select(wanted, len(found.data))
        self._shelf.requests.append(Request(self.command, self.path, wanted, status))
        self._send_head(status, part, found)
        if body:
            self.wfile.write(memoryview(found.data)[slice(*part)])

    def _send_head(self, status: HTTPStatus, part: tuple[int, int], content: _Content) -> None:
        start, end = part
        self.send_response(status)
        self.send_header("Content-Type", content.media_type)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        if content.digest:
            self.send_header("Docker-Content-Digest", content.digest)
        if status is HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content.data)}")
        if status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.send_header("Content-Range", f"bytes */{len(content.data)}")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Whoever wants to know asks :attr:`Registry.requests`."""


def select(wanted: str, length: int) -> tuple[HTTPStatus, tuple[int, int]]:
    """The status for a ``Range`` header and the part to send (RFC 9110, section 14); one range at most."""
    found = _RANGE.fullmatch(wanted)
    if found is None or found.groups() == ("", ""):
        return HTTPStatus.OK, (0, length)
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return HTTPStatus.OK, (0, length)
    start = int(first) if first else max(0, length - int(last))
    end = min(int(last) + 1, length) if first and last else length
    if start >= end:
        return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, (0, 0)
    return HTTPStatus.PARTIAL_CONTENT, (start, end)
