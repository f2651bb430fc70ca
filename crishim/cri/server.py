"""The gRPC server on its Unix socket: every method of the CRI, from tables of verbs."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from crishim.config.settings import ApiSettings
from crishim.cri import container_verbs, image_verbs, node_verbs, sandbox_verbs, stats_verbs, streaming_verbs
from crishim.cri.api import api_pb2
from crishim.cri.interceptor import Interceptor
from crishim.cri.node import Node, Verb
from crishim.cri.stream_verbs import STREAM_VERBS
from crishim.errors import ConfigError, Unimplemented

RUNTIME_VERBS: Mapping[str, Verb] = {
    **node_verbs.VERBS,
    **sandbox_verbs.VERBS,
    **container_verbs.VERBS,
    **stats_verbs.VERBS,
    **streaming_verbs.VERBS,
}
IMAGE_VERBS: Mapping[str, Verb] = image_verbs.VERBS


def server(node: Node) -> aio.Server:
    """A server that is not listening yet."""
    limit = node.config.api.max_message_bytes
    made = aio.server(
        interceptors=[Interceptor()],
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.so_reuseport", 0),
        ],
    )
    made.add_generic_rpc_handlers((_service(node, "RuntimeService", RUNTIME_VERBS),))
    made.add_generic_rpc_handlers((_service(node, "ImageService", IMAGE_VERBS),))
    return made


def listen(made: aio.Server, settings: ApiSettings) -> str:
    """Bind the socket, for root and its group only; the result is its address."""
    path = Path(settings.listen.removeprefix("unix://"))
    if not path.is_absolute():
        raise ConfigError(f"api.listen {settings.listen!r} is not the absolute path of a Unix socket")
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"api.listen {path} is longer than a Unix socket's path may be (107 bytes)")
    if _is_served(path):
        raise ConfigError(f"api.listen {path} is served by another process")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
    mask = os.umask(0o117)
    try:
        made.add_insecure_port(f"unix://{path}")
    except RuntimeError as err:
        raise ConfigError(f"cannot listen on {path}: {err}") from err
    finally:
        os.umask(mask)
    return f"unix://{path}"


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _service(node: Node, name: str, verbs: Mapping[str, Verb]) -> grpc.GenericRpcHandler:
    service = api_pb2.DESCRIPTOR.services_by_name[name]
    handlers = {method.name: _handler(node, method, verbs.get(method.name)) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(node: Node, method: MethodDescriptor, verb: Verb | None) -> Any:
    parse = GetMessageClass(method.input_type).FromString
    serialize = GetMessageClass(method.output_type).SerializeToString
    name = method.name

    async def unary(request: Any, _context: Any) -> Any:
        if verb is None:
            raise Unimplemented(f"{name} is not supported by this version")
        return await verb(node, request)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        if name not in STREAM_VERBS:
            raise Unimplemented(f"{name} is not supported by this version")
        await context.send_initial_metadata(())  # tells the client that it is heard, before anything happens
        async for response in STREAM_VERBS[name](node, request):
            yield response

    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, parse, serialize)
    return grpc.unary_unary_rpc_method_handler(unary, parse, serialize)
