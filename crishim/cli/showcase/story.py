"""The steps of the demo: what a kubelet does to run a pod, one after the other, and to take it away again."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from crishim.cli.requirements.files import in_words
from crishim.cli.showcase import cleaning, daemon, image, place
from crishim.cli.showcase.image import Image
from crishim.cli.showcase.narrator import Narrator
from crishim.cli.showcase.place import Place
from crishim.cli.showcase.registry import Registry
from crishim.config.settings import Config
from crishim.cri.client import Client
from crishim.errors import HostFailure
from crishim.host import process

PAGE = "Hello from a pod that crishim runs."
_PORT = 8080
_COMMAND = f"trap 'exit 0' TERM; echo the shop is open; httpd -f -v -p {_PORT} -h /www & wait"
"""The first process of a PID namespace gets only the signals that it asks for."""
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 2


class Story:
    """One telling, in one place."""

    def __init__(self, where: Place, settings: Config, narrator: Narrator) -> None:
        self._place = where
        self._settings = settings
        self._tell = narrator
        self._client = Client(where.socket)
        self._daemon: process.Started | None = None

    async def tell(self) -> None:
        """From the image to the last thing removed; whatever goes wrong is raised, with the daemon ended."""
        place.make(self._place, self._settings)
        with Registry() as registry:
            try:
                made = await self._make_image()
                name = await self._prepare(registry, made)
                await self._start()
                await self._ask()
                await self._pull(name, made)
                await self._run(name)
            finally:
                await self._end()
        await self._inspect()

    async def _make_image(self) -> Image:
        with self._tell.step("Making an image of this host's busybox") as result:
            made = await image.busybox(f"{PAGE}\n")
            result(in_words(made.size))
        return made

    async def _prepare(self, registry: Registry, made: Image) -> str:
        with self._tell.step("Offering it in a registry") as result:
            name = registry.add("crishim/demo", "latest", made)
            place.trust(self._place, registry.host)
            result(registry.host)
        with self._tell.step("Making a bridge for the pod") as result:
            await place.make_bridge(self._place)
            result(f"{self._place.bridge}, {self._place.subnet}")
        return name

    async def _start(self) -> None:
        with self._tell.step("Starting the daemon") as result:
            self._daemon = daemon.start(self._place)
            await daemon.ready(self._daemon, self._client)
            result(f"process {self._daemon.pid}")

    async def _end(self) -> None:
        await self._client.close()
        if self._daemon is None:
            return
        with self._tell.step("Stopping the daemon") as result:
            await daemon.stop(self._daemon)
            result(f"exit status {self._daemon.returncode}")

    async def _run(self, name: str) -> None:
        with self._tell.step("Starting a pod") as result:
            config = self._pod_config()
            pod = (await self._client.call("RunPodSandbox", config=config)).pod_sandbox_id
            status = (await self._client.call("PodSandboxStatus", pod_sandbox_id=pod)).status
            result(f"{pod[:12]}, address {status.network.ip}")
        container = await self._start_container(pod, config, name)
        await self._look(container, status.network.ip)
        await self._take_away(pod, container, name)

    async def _ask(self) -> None:
        with self._tell.step("Asking for its name") as result:
            version = await self._client.call("Version")
            result(f"{version.runtime_name} {version.runtime_version}, CRI {version.runtime_api_version}")
        with self._tell.step("Asking whether it is ready") as result:
            conditions = (await self._client.call("Status")).status.conditions
            for condition in conditions:
                if not condition.status:
                    raise HostFailure(f"{condition.reason}: {condition.message}")
                result(condition.type)

    async def _pull(self, name: str, made: Image) -> None:
        with self._tell.step("Pulling the image") as result:
            await self._client.call("PullImage", image={"image": name})
            found = (await self._client.call("ImageStatus", image={"image": name}, verbose=True)).image
            result(f"1 layer, {in_words(made.size)}, {in_words(found.size)} unpacked")

    def _pod_config(self) -> dict[str, Any]:
        return {
            "metadata": {"name": "demo", "namespace": "default", "uid": self._place.token},
            "hostname": "demo",
            "log_directory": str(self._place.pod_logs),
            "linux": {
                "cgroup_parent": self._place.cgroup,
                "security_context": {"namespace_options": {"pid": "CONTAINER"}},
            },
        }

    async def _start_container(self, pod: str, sandbox_config: dict[str, Any], name: str) -> str:
        config = {
            "metadata": {"name": "web"},
            "image": {"image": name},
            "command": ["/bin/sh", "-c", _COMMAND],
            "log_path": "web/0.log",
            "linux": {"security_context": {"namespace_options": {"pid": "CONTAINER"}}},
        }
        with self._tell.step("Creating a container in it") as result:
            made = await self._client.call(
                "CreateContainer", pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config
            )
            container = str(made.container_id)
            result(f"{container[:12]}, {self._settings.runtime.default}")
        with self._tell.step("Starting the container") as result:
            await self._client.call("StartContainer", container_id=container)
            result(f"busybox httpd, port {_PORT}")
        return container

    async def _look(self, container: str, address: str) -> None:
        with self._tell.step("Running a command in it") as result:
            command = ["/bin/sh", "-c", "id; hostname"]
            done = await self._client.call("ExecSync", container_id=container, cmd=command, timeout=10)
            result(f"exit status {done.exit_code}")
        self._tell.quote(done.stdout.decode(errors="replace").splitlines())
        with self._tell.step("Fetching a page from the pod") as result:
            page = await fetch(address, _PORT)
            result(f"http://{address}:{_PORT}/")
        self._tell.quote(page.splitlines())
        with self._tell.step("Reading the container's log") as result:
            status = (await self._client.call("ContainerStatus", container_id=container)).status
            result(Path(status.log_path).name)
            lines = await _log_lines(Path(status.log_path))
        self._tell.quote(lines)
        with self._tell.step("Asking for the container's status") as result:
            status = (await self._client.call("ContainerStatus", container_id=container)).status
            result(_state(status))

    async def _take_away(self, pod: str, container: str, name: str) -> None:
        call = self._client.call
        with self._tell.step("Stopping the container") as result:
            await call("StopContainer", container_id=container, timeout=_STOP_SECONDS)
            result(_state((await call("ContainerStatus", container_id=container)).status))
        for title, work in (
            ("Removing the container", lambda: call("RemoveContainer", container_id=container)),
            ("Stopping the pod", lambda: call("StopPodSandbox", pod_sandbox_id=pod)),
            ("Removing the pod", lambda: call("RemovePodSandbox", pod_sandbox_id=pod)),
            ("Removing the image", lambda: call("RemoveImage", image={"image": name})),
        ):
            await self._do(title, work)

    async def _do(self, title: str, work: Callable[[], Awaitable[Any]]) -> None:
        with self._tell.step(title):
            await work()

    async def _inspect(self) -> None:
        """The pod is removed and the daemon has ended: nothing of them may be there."""
        with self._tell.step("Looking for anything left behind") as result:
            status = self._daemon.returncode if self._daemon else -1
            if status != 0:
                raise HostFailure(f"the daemon ended with status {status}")
            if found := await cleaning.settled(self._place):
                raise HostFailure(f"the daemon left behind {', '.join(found)}")
            result("no process, mount, interface, cgroup")


def _state(status: Any) -> str:
    name = status.DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[status.state].name
    words = str(name).removeprefix("CONTAINER_").lower()
    return f"{words}, exit status {status.exit_code} ({status.reason})" if status.finished_at else words


async def fetch(address: str, port: int) -> str:
    """The page at ``/``, as soon as somebody serves it."""
    deadline = asyncio.get_running_loop().time() + _ANSWER_SECONDS
    while True:
        try:
            return await asyncio.to_thread(_get, address, port)
        except OSError as err:
            if asyncio.get_running_loop().time() > deadline:
                raise HostFailure(f"http://{address}:{port}/ does not answer: {err.strerror or err}") from err
            await asyncio.sleep(0.01)


def _get(address: str, port: int) -> str:
    connection = http.client.HTTPConnection(address, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise HostFailure(f"http://{address}:{port}/ answers with status {response.status}")
        return response.read().decode(errors="replace")
    finally:
        connection.close()


async def _log_lines(path: Path) -> list[str]:
    """What conmon has written so far: it may be a moment behind."""
    for _ in range(100):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > 1:
            return lines
        await asyncio.sleep(0.01)
    raise HostFailure(f"the container has logged nothing to {path}")
