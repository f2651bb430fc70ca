"""A client of the CRI: what the daemon's own commands ask a daemon with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from crishim.cri.api import api_pb2
from crishim.errors import HostFailure, Unavailable

CALL_SECONDS = 120.0


class Client:
    """Calls by the CRI's own names: ``await client.call("Version")``. Requests are written as keyword arguments."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = aio.insecure_channel(f"unix://{socket}")

    async def ready(self, timeout: float) -> None:
        """Wait until the socket is served; :class:`Unavailable` if it is not in time."""
        try:
            async with asyncio.timeout(timeout):
                await self._channel.channel_ready()
        except TimeoutError as err:
            raise Unavailable(f"nobody serves {self._socket} after {timeout:g} s") from err

    async def call(self, method: str, **fields: Any) -> Any:
        """The response's message; nested messages of the request are dictionaries. A refusal is an error of ours."""
        described = _methods()[method]
        request = GetMessageClass(described.input_type)(**fields)
        try:
            return await self._invoke(described)(request, timeout=CALL_SECONDS)
        except aio.AioRpcError as err:
            raise HostFailure(f"{method}: {err.details()} ({err.code().name})") from err

    def _invoke(self, method: MethodDescriptor) -> Any:
        service = method.containing_service
        assert service is not None
        return self._channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )

    async def close(self) -> None:
        """Give the connection back; calls under way are cancelled."""
        await self._channel.close()


def _methods() -> dict[str, MethodDescriptor]:
    services = api_pb2.DESCRIPTOR.services_by_name.values()
    return {method.name: method for service in services for method in service.methods}
