"""A CRI client for tests: the generated stubs on one channel, and the few steps that most tests need."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from crishim.cri.api import api_pb2 as pb
from crishim.cri.api.api_pb2_grpc import ImageServiceStub, RuntimeServiceStub

from .daemon import Daemon

CALL_SECONDS = 60.0
_POLL_SECONDS = 0.02
_LIMIT = 32 << 20
_LOG_LINE = re.compile(rb"^(\S+) (stdout|stderr) ([PF]) (.*)$", re.DOTALL)
_numbers = itertools.count(1)


def unique(what: str) -> str:
    """A name that no other object of this session has."""
    return f"{what}-{next(_numbers)}"


def metadata(name: str = "", attempt: int = 0) -> pb.PodSandboxMetadata:
    """What identifies a pod."""
    name = name or unique("pod")
    return pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="tests", attempt=attempt)


def sleeping(seconds: int = 600) -> list[str]:
    """A command that ends at once when asked to."""
    return ["sh", "-c", f"trap 'exit 0' TERM; sleep {seconds} & wait $!"]


class Cri:
    """Both services of one daemon."""

    def __init__(self, daemon: Daemon, channel: aio.Channel) -> None:
        self.daemon = daemon
        self.runtime = RuntimeServiceStub(channel)
        self.images = ImageServiceStub(channel)

    def pod_config(self, name: str = "", **fields: Any) -> pb.PodSandboxConfig:
        """A pod with a log directory; ``fields`` are the message's own."""
        meta = metadata(name)
        config = pb.PodSandboxConfig(metadata=meta, log_directory=str(self.daemon.logs / meta.name))
        config.MergeFrom(pb.PodSandboxConfig(**fields))
        return config

    async def run_pod(self, config: pb.PodSandboxConfig | None = None, handler: str = "") -> str:
        """RunPodSandbox; the ID."""
        request = pb.RunPodSandboxRequest(config=config or self.pod_config(), runtime_handler=handler)
        return (await self.runtime.RunPodSandbox(request, timeout=CALL_SECONDS)).pod_sandbox_id

    async def create(self, pod: str, config: pb.ContainerConfig) -> str:
        """CreateContainer; the ID. ``sandbox_config`` is left out, as the CRI does not need it."""
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        return (await self.runtime.CreateContainer(request, timeout=CALL_SECONDS)).container_id

    async def start(self, container: str) -> None:
        """StartContainer."""
        await self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=CALL_SECONDS)

    async def run(self, pod: str, config: pb.ContainerConfig) -> str:
        """Create and start."""
        container = await self.create(pod, config)
        await self.start(container)
        return container

    async def stop(self, container: str, grace: int = 10) -> None:
        """StopContainer."""
        request = pb.StopContainerRequest(container_id=container, timeout=grace)
        await self.runtime.StopContainer(request, timeout=CALL_SECONDS + grace)

    async def remove(self, container: str) -> None:
        """RemoveContainer."""
        await self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=CALL_SECONDS)

    async def stop_pod(self, pod: str) -> None:
        """StopPodSandbox."""
        await self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=CALL_SECONDS)

    async def remove_pod(self, pod: str) -> None:
        """RemovePodSandbox."""
        await self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=CALL_SECONDS)

    async def status(self, container: str) -> pb.ContainerStatus:
        """The container's status."""
        request = pb.ContainerStatusRequest(container_id=container)
        return (await self.runtime.ContainerStatus(request, timeout=CALL_SECONDS)).status

    async def pod_status(self, pod: str) -> pb.PodSandboxStatus:
        """The pod's status."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod)
        return (await self.runtime.PodSandboxStatus(request, timeout=CALL_SECONDS)).status

    async def pods(self, **wanted: Any) -> list[pb.PodSandbox]:
        """The pods that match."""
        request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(**wanted))
        return list((await self.runtime.ListPodSandbox(request, timeout=CALL_SECONDS)).items)

    async def containers(self, **wanted: Any) -> list[pb.Container]:
        """The containers that match."""
        request = pb.ListContainersRequest(filter=pb.ContainerFilter(**wanted))
        return list((await self.runtime.ListContainers(request, timeout=CALL_SECONDS)).containers)

    async def wait_exit(self, container: str, seconds: float = 20.0) -> pb.ContainerStatus:
        """The status of the container once it has ended."""

        async def ended() -> bool:
            return (await self.status(container)).state == pb.CONTAINER_EXITED

        await until(ended, f"the end of container {container}", seconds)
        return await self.status(container)

    async def wait_output(self, container: str) -> None:
        """Wait until the container has printed something."""
        path = Path((await self.status(container)).log_path)

        async def printed() -> bool:
            return bool(path.read_bytes())

        await until(printed, f"output of container {container}")

    async def exec(self, container: str, command: Sequence[str], seconds: int = 20) -> pb.ExecSyncResponse:
        """ExecSync."""
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=seconds)
        return await self.runtime.ExecSync(request, timeout=CALL_SECONDS)

    async def sh(self, container: str, script: str) -> str:
        """What a shell script in the container prints; it must succeed."""
        done = await self.exec(container, ["sh", "-c", script])
        assert done.exit_code == 0, f"{script!r} ended with {done.exit_code}: {done.stdout!r} {done.stderr!r}"
        return done.stdout.decode()

    async def output(self, pod: str, config: pb.ContainerConfig) -> tuple[pb.ContainerStatus, str]:
        """Run a container to its end; its status, and what it printed on both outputs."""
        status = await self.wait_exit(await self.run(pod, config))
        lines = log_lines(Path(status.log_path))
        return status, b"".join(line.text + (b"" if line.partial else b"\n") for line in lines).decode()

    async def pull(self, reference: str, auth: pb.AuthConfig | None = None) -> str:
        """PullImage; the image reference in the answer."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), auth=auth)
        return (await self.images.PullImage(request, timeout=CALL_SECONDS)).image_ref

    async def image(self, reference: str) -> pb.Image | None:
        """The image, or None."""
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=reference))
        answer = await self.images.ImageStatus(request, timeout=CALL_SECONDS)
        return answer.image if answer.HasField("image") else None

    async def image_list(self) -> list[pb.Image]:
        """All images."""
        return list((await self.images.ListImages(pb.ListImagesRequest(), timeout=CALL_SECONDS)).images)

    async def remove_image(self, reference: str) -> None:
        """RemoveImage."""
        request = pb.RemoveImageRequest(image=pb.ImageSpec(image=reference))
        await self.images.RemoveImage(request, timeout=CALL_SECONDS)


def container_config(image: str, command: Sequence[str] = (), name: str = "", **fields: Any) -> pb.ContainerConfig:
    """A container that logs; ``fields`` are the message's own."""
    name = name or unique("container")
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name),
        image=pb.ImageSpec(image=image),
        command=command,
        log_path=f"{name}.log",
        **fields,
    )


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 5.0) -> None:
    """Wait until ``condition`` holds; the test fails if it does not in time."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(_POLL_SECONDS)


class LogLine:
    """One line of a container's log in the CRI's format."""

    def __init__(self, raw: bytes) -> None:
        found = _LOG_LINE.fullmatch(raw)
        assert found is not None, f"not a CRI log line: {raw!r}"
        self.stamp, self.stream = found[1].decode(), found[2].decode()
        self.partial, self.text = found[3] == b"P", found[4]


def log_lines(path: Path) -> list[LogLine]:
    """The lines of a container's log."""
    return [LogLine(raw) for raw in path.read_bytes().split(b"\n")[:-1]]


@contextlib.asynccontextmanager
async def connect(daemon: Daemon) -> AsyncIterator[Cri]:
    """A client of ``daemon``."""
    options = [
        ("grpc.max_receive_message_length", _LIMIT),
        ("grpc.max_send_message_length", _LIMIT),
        ("grpc.use_local_subchannel_pool", 1),  # else it shares the back-off of one whose daemon was killed
    ]
    async with aio.insecure_channel(daemon.target, options=options) as channel:
        yield Cri(daemon, channel)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *mentions: str) -> Iterator[None]:
    """The body's call fails with ``code`` and one sentence that has all of ``mentions`` in it."""
    with pytest.raises(aio.AioRpcError) as caught:
        yield
    message = caught.value.details() or ""
    assert caught.value.code() is code, f"{caught.value.code()}: {message}"
    for mention in mentions:
        assert mention in message, f"{mention!r} is not in {message!r}"
    assert not message.startswith(("unexpected", "Traceback")), message
    assert "\n" not in message and not message.endswith("."), f"not a sentence as errors.py has them: {message!r}"
