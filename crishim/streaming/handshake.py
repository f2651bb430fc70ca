"""The HTTP request at the beginning of a connection, and what it asks to switch to; without I/O.

h11 parses; SPDY is chosen by ``Upgrade: SPDY/3.1`` with ``X-Stream-Protocol-Version`` for the version of the
protocol on top (k8s.io/apimachinery, util/httpstream), WebSocket by RFC 6455's own headers (wsproto).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import h11
from wsproto.connection import Connection, ConnectionType
from wsproto.events import AcceptConnection, Request
from wsproto.handshake import H11Handshake
from wsproto.utilities import RemoteProtocolError

from crishim.streaming.channels import TUNNELS

SPDY_UPGRADE = "spdy/3.1"
COMMAND_VERSIONS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
)
"""Of exec and attach over SPDY. On SPDY version 5 is version 4, only WebSocket has the difference."""
FORWARD_VERSIONS = ("portforward.k8s.io",)
_VERSION_HEADER = "X-Stream-Protocol-Version"
_ACCEPTED_HEADER = "X-Accepted-Stream-Protocol-Versions"


class Refused(Exception):
    """The request is answered with an HTTP error and the connection closed."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


@dataclass(frozen=True)
class Target:
    """What is wanted: ``kind`` and ``token`` of the URL's path, and the request's headers."""

    kind: str
    token: str
    headers: tuple[tuple[bytes, bytes], ...]
    path: bytes

    def values(self, name: str) -> list[str]:
        """All values of a header, also several in one line."""
        found = [value.decode("latin-1") for key, value in self.headers if key.decode("latin-1") == name.lower()]
        return [part.strip() for value in found for part in value.split(",") if part.strip()]

    def wants(self, protocol: str) -> bool:
        """Whether the client asks to switch to a protocol."""
        tokens = [value.lower() for value in self.values("connection")]
        return "upgrade" in tokens and protocol in [value.lower() for value in self.values("upgrade")]


class Door:
    """Reads one request and writes one answer."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER)
        self._target: Target | None = None

    def receive(self, data: bytes) -> Target | None:
        """The request once it is whole; :class:`Refused` if it is none of ours."""
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._target = _target(event)
                elif isinstance(event, h11.Data):
                    raise Refused(400, "a request to switch protocols has no body")
                elif isinstance(event, h11.EndOfMessage):
                    return self._target
                elif isinstance(event, h11.ConnectionClosed):
                    raise Refused(400, "the request is cut short")
                else:  # NEED_DATA, PAUSED
                    return None
        except h11.RemoteProtocolError as err:
            raise Refused(err.error_status_hint, f"this is not HTTP/1.1: {err}") from err

    @property
    def trailing(self) -> bytes:
        """What the client has sent after its request."""
        return self._http.trailing_data[0]

    def refuse(self, refusal: Refused) -> bytes:
        """The answer of a request that is not served."""
        body = f"{refusal}\n".encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *refusal.headers.items(),
        ]
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        answer = self._http.send(h11.Response(status_code=refusal.status, headers=headers))
        return (answer or b"") + (self._http.send(h11.Data(data=body)) or b"")

    def accept_spdy(self, version: str) -> bytes:
        """The switch to SPDY."""
        headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
        if version:
            headers.append((_VERSION_HEADER, version))
        return self._http.send(h11.InformationalResponse(status_code=101, headers=headers)) or b""


def _target(request: h11.Request) -> Target:
    if request.method not in (b"GET", b"POST"):
        raise Refused(405, "the method is neither GET nor POST", {"Allow": "GET, POST"})
    path = request.target.decode("latin-1").partition("?")[0]
    parts = path.split("/")
    if len(parts) != 3 or parts[0]:
        raise Refused(404, "there is nothing here")
    return Target(parts[1], parts[2], tuple(request.headers), request.target)


def spdy_version(target: Target, supported: Iterable[str], default: str = "") -> str:
    """The first version in the client's order that we know; ``default`` if it names none."""
    wanted = target.values(_VERSION_HEADER)
    known = tuple(supported)
    if not wanted and default:
        return default
    for version in wanted:
        if version in known:
            return version
    status = 403 if wanted else 400
    raise Refused(
        status,
        f"the client's stream protocols {', '.join(wanted) or '(none)'} are not among {', '.join(known)}",
        {_ACCEPTED_HEADER: ", ".join(known)},
    )


@dataclass(frozen=True)
class Upgraded:
    """A WebSocket handshake: ``protocol`` that was chosen, the ``answer`` to send, and the connection."""

    protocol: str
    answer: bytes
    connection: Connection


def accept_websocket(target: Target, supported: Iterable[str]) -> Upgraded:
    """Choose a subprotocol, in the client's order, and switch; ``""`` among ``supported`` is for clients without."""
    known = tuple(supported)
    handshake = H11Handshake(ConnectionType.SERVER)
    try:
        handshake.initiate_upgrade_connection(list(target.headers), target.path)
        request = next(event for event in handshake.events() if isinstance(event, Request))
    except (RemoteProtocolError, StopIteration, UnicodeError) as err:
        raise Refused(400, f"this is no WebSocket handshake: {err}", {"Sec-WebSocket-Version": "13"}) from err
    protocol = _subprotocol(request.subprotocols, known)
    answer = bytes(handshake.send(AcceptConnection(subprotocol=protocol or None)))
    assert handshake.connection is not None
    return Upgraded(protocol, answer, handshake.connection)


def _subprotocol(wanted: list[str], known: tuple[str, ...]) -> str:
    for protocol in wanted or [""]:
        if protocol in known:
            return protocol
    names = ", ".join(name for name in known if name)
    raise Refused(403, f"the client's subprotocols {', '.join(wanted) or '(none)'} are not among {names}")


def is_tunnel(protocol: str) -> bool:
    """Whether a subprotocol carries SPDY."""
    return protocol in TUNNELS
