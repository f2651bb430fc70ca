"""Calls that hand out URLs of the streaming server, and the one that has a log reopened."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

from crishim.containers.attach import attach, control
from crishim.containers.client import Client
from crishim.containers.create import log_path
from crishim.containers.exec_stream import check_running, exec_stream
from crishim.containers.table import Container
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.errors import DeadlineExceeded, HostFailure, InvalidArgument
from crishim.pods.portforward import check_ready, forward
from crishim.streaming.portforward import ForwardJob
from crishim.streaming.remotecommand import CommandJob

REOPEN_SECONDS = 10.0
_LOOK_SECONDS = 0.005


async def exec_url(node: Node, request: pb.ExecRequest) -> pb.ExecResponse:
    """Where to run a command with streams; it starts when a client connects there."""
    container = _running(node, request)
    if not request.cmd:
        raise InvalidArgument("cmd is empty")
    command, tty = list(request.cmd), request.tty

    async def run(client: Client) -> int:
        return await exec_stream(node.containers, container, command, client, tty=tty)

    job = CommandJob(run, request.stdin, request.stdout, request.stderr, tty)
    return pb.ExecResponse(url=node.streams.offer("exec", job, f"Exec {container.record.id[:13]}"))


async def attach_url(node: Node, request: pb.AttachRequest) -> pb.AttachResponse:
    """Where to join a container's own streams."""
    container = _running(node, request)

    async def run(client: Client) -> int:
        await attach(node.containers, container, client, node.parking)
        return 0

    job = CommandJob(run, request.stdin, request.stdout, request.stderr, request.tty)
    return pb.AttachResponse(url=node.streams.offer("attach", job, f"Attach {container.record.id[:13]}"))


async def port_forward_url(node: Node, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
    """Where to connect to ports of a sandbox."""
    if not request.pod_sandbox_id:
        raise InvalidArgument("pod_sandbox_id is empty")
    for port in request.port:
        if not 0 < port <= 65535:
            raise InvalidArgument(f"port {port} is not a port")
    sandbox = node.pods.table.get(request.pod_sandbox_id)
    check_ready(sandbox)
    job = ForwardJob(partial(forward, node.pods, sandbox), tuple(request.port))
    url = node.streams.offer("portforward", job, f"PortForward {sandbox.record.id[:13]}")
    return pb.PortForwardResponse(url=url)


def _running(node: Node, request: pb.ExecRequest | pb.AttachRequest) -> Container:
    """The container of a request whose streams make sense."""
    if not request.container_id:
        raise InvalidArgument("container_id is empty")
    if request.tty and request.stderr:
        raise InvalidArgument("tty and stderr exclude each other: a terminal has one output")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("none of stdin, stdout and stderr is asked for")
    container = node.containers.table.get(request.container_id)
    check_running(container)
    return container


async def reopen_container_log(node: Node, request: pb.ReopenContainerLogRequest) -> pb.ReopenContainerLogResponse:
    """Have conmon go on in a new file after the kubelet has renamed the old one."""
    if not request.container_id:
        raise InvalidArgument("container_id is empty")
    container = node.containers.table.get(request.container_id)
    check_running(container)
    sandbox = node.pods.table.find(container.record.sandbox_id)
    path = log_path(sandbox.record, container.record.config) if sandbox is not None else None
    if path is not None:
        await asyncio.to_thread(_make_directory, path.parent)
        before = _identity(path)
        control(node.containers.paths.bundle(container.record.id), "2 0 0")
        await _renewed(path, before)
    return pb.ReopenContainerLogResponse()


def _make_directory(path: Path) -> None:
    """conmon ends if it cannot make the new file; blocks."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise HostFailure(f"cannot make the log directory {path}: {err.strerror}") from err


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _renewed(path: Path, before: tuple[int, int] | None) -> None:
    """Wait until another file is there: conmon gives no answer, it makes the file under a temporary name."""
    try:
        async with asyncio.timeout(REOPEN_SECONDS):
            while _identity(path) in (None, before):  # noqa: ASYNC110 - a file, not an event of ours
                await asyncio.sleep(_LOOK_SECONDS)
    except TimeoutError:
        raise DeadlineExceeded(f"the log {path} was not reopened within {REOPEN_SECONDS:g} s") from None


VERBS: dict[str, Verb] = {
    "Exec": exec_url,
    "Attach": attach_url,
    "PortForward": port_forward_url,
    "ReopenContainerLog": reopen_container_log,
}
