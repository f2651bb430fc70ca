"""Registries: a real one on a loopback port, and one in this process that can be told to misbehave."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import urllib3

from .images import Document, Image

_START_SECONDS = 20.0
_CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {storage}}}}}
http: {{addr: "{host}"}}
log: {{level: error}}
"""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Registry:
    """docker-registry with a storage of its own."""

    def __init__(self, directory: Path) -> None:
        self.host = f"127.0.0.1:{free_port()}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._http = urllib3.PoolManager(retries=urllib3.Retry(total=5, backoff_factor=0.2))

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "config.yml"
        config.write_text(_CONFIG.format(storage=self._directory / "storage", host=self.host))
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(self._address(), 1).close()
                return
            time.sleep(0.02)
        raise AssertionError("docker-registry did not start: " + (self._directory / "log").read_text())

    def _address(self) -> tuple[str, int]:
        name, _, port = self.host.partition(":")
        return name, int(port)

    def stop(self) -> None:
        """End it."""
        self._http.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def push(self, repository: str, image: Image, tag: str = "latest") -> str:
        """Upload ``image``; the result is the reference to pull."""
        for digest, data in image.blobs.items():
            self._push_blob(repository, digest, data)
        self.push_document(repository, image.manifest, tag)
        return f"{self.host}/{repository}:{tag}"

    def push_document(self, repository: str, document: Document, reference: str) -> str:
        """Upload a manifest or an index, whose parts must be there."""
        self._request("PUT", f"/v2/{repository}/manifests/{reference}", 201, document.data, document.media_type)
        return f"{self.host}/{repository}:{reference}"

    def _push_blob(self, repository: str, digest: str, data: bytes) -> None:
        response = self._http.request("HEAD", f"http://{self.host}/v2/{repository}/blobs/{digest}")
        if response.status == 200:
            return
        started = self._request("POST", f"/v2/{repository}/blobs/uploads/", 202)
        place = urlsplit(started.headers["Location"])
        target = f"{place.path}?{place.query}&digest={digest}"
        self._request("PUT", target, 201, data, "application/octet-stream")

    def _request(
        self, method: str, path: str, expected: int, body: bytes = b"", kind: str = ""
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Content-Type": kind} if kind else {}
        response = self._http.request(method, f"http://{self.host}{path}", body=body, headers=headers)
        assert response.status == expected, f"{method} {path}: {response.status} {response.data[:300]!r}"
        return response


@dataclass(frozen=True)
class Login:
    """Who may have tokens, and which token; without a name everybody may."""

    token: str
    username: str = ""
    password: str = ""

    @property
    def basic(self) -> str:
        """The header that a client with the credentials sends."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class Seen:
    """One request that came."""

    path: str
    authorization: str


Behaviour = Callable[["Handler", bytes], None]
"""What to do instead of sending a body."""


@dataclass
class FakeRegistry:
    """A registry in this process: serves what it is given, and does to parts of it what it is told."""

    manifests: dict[str, Document] = field(default_factory=dict)
    """By ``REPOSITORY:TAG`` and by ``REPOSITORY@DIGEST``."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    """By digest or tag."""
    login: Login | None = None
    seen: list[Seen] = field(default_factory=list)
    host: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end: lets stalled answers go."""

    def put(self, repository: str, image: Image, tag: str = "latest") -> str:
        """Serve ``image``; the result is the reference to pull."""
        self.manifests[f"{repository}:{tag}"] = image.manifest
        self.manifests[f"{repository}@{image.manifest.digest}"] = image.manifest
        self.blobs |= image.blobs
        return f"{self.host}/{repository}:{tag}"

    def asked(self, part: str) -> int:
        """How many requests had ``part`` in their path."""
        return sum(part in item.path for item in self.seen)


class Handler(BaseHTTPRequestHandler):
    """One connection to a :class:`FakeRegistry`."""

    protocol_version = "HTTP/1.1"
    registry: FakeRegistry

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: TLS handshakes that come first are expected."""

    def do_GET(self) -> None:
        """Answer."""
        registry = self.registry
        registry.seen.append(Seen(self.path, self.headers.get("Authorization", "")))
        path = urlsplit(self.path).path
        if path == "/token":
            self._token()
            return
        if registry.login is not None and self.headers.get("Authorization") != f"Bearer {registry.login.token}":
            challenge = f'Bearer realm="http://{registry.host}/token",service="fake",scope="repository:x:pull"'
            self.answer(401, b"{}", {"WWW-Authenticate": challenge})
            return
        _, _, rest = path.partition("/v2/")
        repository, kind, name = rest.rpartition("/manifests/") if "/manifests/" in rest else rest.rpartition("/blobs/")
        if kind == "/manifests/":
            separator = "@" if name.startswith("sha256:") else ":"
            document = registry.manifests.get(f"{repository}{separator}{name}")
            self._serve(name, document.data if document else None, document.media_type if document else "")
        else:
            self._serve(name, registry.blobs.get(name), "application/octet-stream")

    def _serve(self, name: str, data: bytes | None, kind: str) -> None:
        if data is None:
            self.answer(404, b"{}")
        elif name in self.registry.behaviours:
            self.registry.behaviours[name](self, data)
        else:
            self.answer(200, data, {"Content-Type": kind})

    def _token(self) -> None:
        login = self.registry.login
        assert login is not None
        asked = parse_qs(urlsplit(self.path).query)
        if login.username and self.headers.get("Authorization") != login.basic:
            self.answer(401, b"{}")
        elif asked.get("service") != ["fake"] or not asked.get("scope"):
            self.answer(500, b"{}")
        else:
            self.answer(200, json.dumps({"token": login.token, "expires_in": 60}).encode())

    def answer(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """One whole answer."""
        self.begin(status, len(data), headers)
        self.wfile.write(data)

    def begin(self, status: int, length: int, headers: Mapping[str, str] | None = None) -> None:
        """The head of an answer of ``length`` bytes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


def wrong(handler: Handler, data: bytes) -> None:
    """As many bytes, but other ones."""
    handler.answer(200, bytes(byte ^ 0xFF for byte in data[:64]) + data[64:])


def longer(handler: Handler, data: bytes) -> None:
    """More bytes than there are."""
    handler.answer(200, data + b"\0" * 512)


def shorter(handler: Handler, data: bytes) -> None:
    """Fewer bytes, with a length that says so."""
    handler.answer(200, data[: len(data) // 2])


def broken_off(handler: Handler, data: bytes) -> None:
    """Half of the bytes, then the end of the connection."""
    handler.begin(200, len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def stalled(handler: Handler, data: bytes) -> None:
    """Half of the bytes, then silence."""
    handler.begin(200, len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.registry.released.wait(60)
    handler.close_connection = True


def redirected(place: str) -> Behaviour:
    """Sends the client to ``place``."""

    def behaviour(handler: Handler, _data: bytes) -> None:
        handler.answer(307, b"", {"Location": place})

    return behaviour


def failing(status: int) -> Behaviour:
    """An error."""

    def behaviour(handler: Handler, _data: bytes) -> None:
        handler.answer(status, b"{}")

    return behaviour


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are expected."""


@contextlib.contextmanager
def serving() -> Iterator[FakeRegistry]:
    """A registry that serves from a thread while the body runs."""
    registry = FakeRegistry()
    handler = type("BoundHandler", (Handler,), {"registry": registry})
    with _Server(("127.0.0.1", 0), handler) as server:
        registry.host = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            registry.released.set()
            server.shutdown()
            thread.join()
