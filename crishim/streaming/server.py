"""The streaming server: one port, single-use URLs, one task for each connection."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crishim.config.settings import ApiSettings
from crishim.errors import ConfigError
from crishim.observe import log
from crishim.streaming import portforward, remotecommand
from crishim.streaming.channels import COMMAND_DIALECTS, FORWARD_DIALECTS, TUNNELS
from crishim.streaming.handshake import (
    COMMAND_VERSIONS,
    FORWARD_VERSIONS,
    SPDY_UPGRADE,
    Door,
    Refused,
    Target,
    accept_websocket,
    spdy_version,
)
from crishim.streaming.portforward import ForwardJob
from crishim.streaming.remotecommand import CommandJob
from crishim.streaming.tls import Certificates
from crishim.streaming.tokens import Tokens
from crishim.streaming.wire import Wire

_log = logging.getLogger(__name__)

MAX_STRANGERS = 256
"""Connections that have not shown a token yet; the oldest goes when there is one more."""
_STOP_SECONDS = 5.0
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}

Job = CommandJob | ForwardJob


@dataclass(frozen=True)
class _Offer:
    kind: str
    job: Job
    name: str


class _Asking:
    """Receives the request, until it is whole or refused."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.door = Door()
        self.asked: asyncio.Future[Target | Refused] = asyncio.get_running_loop().create_future()
        self._late = bytearray()

    def received(self, data: memoryview) -> None:
        """Bytes of the request. What follows it is kept, and no more is received."""
        if self.asked.done():
            self._late += data
            return
        try:
            target = self.door.receive(bytes(data))
        except Refused as refusal:
            self.asked.set_result(refusal)
            return
        if target is not None:
            self._wire.hold()
            self.asked.set_result(target)

    @property
    def trailing(self) -> bytes:
        """What came after the request."""
        return self.door.trailing + self._late

    def free(self) -> None:
        """Nothing was waiting."""

    def gone(self) -> None:
        """The client has left."""
        if not self.asked.done():
            self.asked.cancel()


class StreamServer:
    """Listens from :meth:`start` to :meth:`stop`."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._tokens: Tokens[_Offer] = Tokens()
        self._server: asyncio.Server | None = None
        self._strangers: dict[Wire, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._base = ""

    async def start(self) -> None:
        """Bind the port; from now on URLs can be made."""
        settings, tls = self._settings, None
        if settings.stream_tls_cert:
            certificate, key = Path(settings.stream_tls_cert), Path(settings.stream_tls_key)
            tls = await asyncio.to_thread(Certificates, certificate, key, settings.stream_tls_min_version)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Wire(self._connected),
                settings.stream_address or None,
                settings.stream_port,
                ssl=tls.context if tls else None,
                ssl_handshake_timeout=settings.stream_creation_timeout if tls else None,
            )
        except OSError as err:
            where = f"{settings.stream_address}:{settings.stream_port}"
            raise ConfigError(f"cannot listen on api.stream_address {where}: {err.strerror or err}") from err
        self._base = _base_url(self._server.sockets[0], "https" if tls else "http")
        _log.info("streaming on %s", self._base)

    def offer(self, kind: str, job: Job, name: str) -> str:
        """A URL that is good for one connection soon; ``name`` is for the log."""
        return f"{self._base}/{kind}/{self._tokens.offer(_Offer(kind, job, name))}"

    async def stop(self) -> None:
        """End all connections and listen no more."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for wire in list(self._strangers):
            wire.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_SECONDS)

    def _connected(self, wire: Wire) -> None:
        self._strangers[wire] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        asking = _Asking(wire)
        wire.receive_by(asking)  # at once: with TLS the request may come with the end of the handshake
        task = asyncio.get_running_loop().create_task(self._serve(wire, asking))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, wire: Wire, asking: _Asking) -> None:
        try:
            try:
                async with asyncio.timeout(self._settings.stream_creation_timeout):
                    asked = await asking.asked
            except TimeoutError:
                return
            finally:
                self._strangers.pop(wire, None)
            try:
                if isinstance(asked, Refused):
                    raise asked
                await self._answer(wire, asking, asked)
            except Refused as refusal:
                _log.info("refused a connection: %s", refusal)
                wire.send_bytes(asking.door.refuse(refusal))
        except Exception:
            _log.exception("a connection is closed")
        finally:
            wire.close()

    async def _answer(self, wire: Wire, asking: _Asking, target: Target) -> None:
        offer = self._tokens.take(target.token)
        if offer is None or offer.kind != target.kind:
            raise Refused(404, "the URL is unknown, used already, or too old")
        log.operation.set(offer.name)
        wire.limit_idle(self._settings.stream_idle_timeout)
        if target.wants("websocket"):
            await self._serve_websocket(wire, asking, target, offer.job)
        elif target.wants(SPDY_UPGRADE):
            await self._serve_spdy(wire, asking, target, offer.job)
        else:
            raise Refused(400, "the request asks for neither SPDY/3.1 nor WebSocket")

    async def _serve_spdy(self, wire: Wire, asking: _Asking, target: Target, job: Job) -> None:
        timeout = self._settings.stream_creation_timeout
        if isinstance(job, ForwardJob):
            version = spdy_version(target, FORWARD_VERSIONS)
            _switch(wire, asking.door.accept_spdy(version))
            await portforward.serve_spdy(wire, asking.trailing, job, timeout)
        else:
            version = spdy_version(target, COMMAND_VERSIONS, default=COMMAND_VERSIONS[-1])
            _switch(wire, asking.door.accept_spdy(version))
            await remotecommand.serve_spdy(wire, asking.trailing, job, version, timeout)

    async def _serve_websocket(self, wire: Wire, asking: _Asking, target: Target, job: Job) -> None:
        known: Mapping[str, object] = (
            COMMAND_DIALECTS if isinstance(job, CommandJob) else {**FORWARD_DIALECTS, **TUNNELS}
        )
        upgraded = accept_websocket(target, known)
        _switch(wire, upgraded.answer)
        if isinstance(job, ForwardJob):
            timeout = self._settings.stream_creation_timeout
            await portforward.serve_websocket(wire, asking.trailing, job, upgraded, timeout)
        else:
            await remotecommand.serve_websocket(wire, asking.trailing, job, upgraded)


def _switch(wire: Wire, answer: bytes) -> None:
    wire.send_bytes(answer)
    wire.release()  # held since the request was whole; the new receiver is there before the loop runs again


def _base_url(bound: socket.socket, scheme: str) -> str:
    host, port = bound.getsockname()[:2]
    host = _WILDCARDS.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
