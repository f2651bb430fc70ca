"""The one place where calls are logged, measured, and errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from crishim.errors import CrishimError
from crishim.observe import log
from crishim.observe.metrics import CALL_SECONDS, CALLS

_log = logging.getLogger(__name__)
_QUIET = ("List", "Version", "Status", "ImageStatus", "ImageFsInfo", "ContainerStatus", "PodSandboxStatus", "ExecSync")

Handler = Any  # grpc.RpcMethodHandler has no fields in its stubs


class Interceptor(aio.ServerInterceptor):
    """Wraps every method of both services."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of a call, wrapped; None for a method that the CRI does not have."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = _wrap(handler, method.rpartition("/")[2])
        return self._wrapped[method]


def _wrap(handler: Handler, name: str) -> Handler:
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            _streaming(handler.unary_stream, name), handler.request_deserializer, handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(
        _unary(handler.unary_unary, name), handler.request_deserializer, handler.response_serializer
    )


def _unary(behaviour: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        with _Call(name, request) as this:
            try:
                return await behaviour(request, context)
            except BaseException as err:
                await this.fail(err, context)

    return call


def _streaming(behaviour: Callable[..., AsyncIterator[Any]], name: str) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        with _Call(name, request) as this:
            try:
                async for response in behaviour(request, context):
                    yield response
            except BaseException as err:
                await this.fail(err, context)

    return call


class _Call:
    """One call, from its beginning to its entry in log and metrics."""

    def __init__(self, name: str, request: Any) -> None:
        self._name = name
        self._subject = _subject(request)
        self._code = "OK"
        self._failure = ""
        self._began = time.perf_counter()

    def __enter__(self) -> _Call:
        self._token = log.operation.set(f"{self._name} {self._subject}".strip())
        return self

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self._began
        CALLS.labels(self._name, self._code).inc()
        CALL_SECONDS.labels(self._name).observe(took)
        level = logging.WARNING if self._failure else logging.INFO
        if self._code == "OK" and self._name.startswith(_QUIET):
            level = logging.DEBUG
        _log.log(level, "%s in %.1f ms%s", self._code, took * 1e3, self._failure)
        log.operation.reset(self._token)

    async def fail(self, err: BaseException, context: aio.ServicerContext[Any, Any]) -> None:
        """End the call with the status that ``err`` stands for; never returns."""
        if isinstance(err, CrishimError):
            self._code = err.code.value
            self._failure = f": {err.message}"
            await context.abort(grpc.StatusCode[err.code.value], err.message)
        if isinstance(err, asyncio.CancelledError):
            self._code = "CANCELLED"
            raise err
        if not isinstance(err, Exception):
            raise err
        self._code = "INTERNAL"
        _log.error("failed unexpectedly", exc_info=err)
        await context.abort(grpc.StatusCode.INTERNAL, f"unexpected {type(err).__name__}: {str(err)[:1000]}")


def _subject(request: Any) -> str:
    """What the request is about, for the log: never credentials."""
    for name in ("container_id", "pod_sandbox_id"):
        if hasattr(request, name):
            return str(getattr(request, name))[:13]
    if hasattr(request, "image"):
        return str(request.image.image)
    if hasattr(request, "config"):
        return f"{request.config.metadata.namespace}/{request.config.metadata.name}"
    return ""
