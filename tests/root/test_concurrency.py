"""Many callers at once, and callers who leave before they have their answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterator

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness.client import Cri, container_config, refused, sleeping, until
from root.harness.daemon import Daemon

from .conftest import MakeDaemon

PODS = 8
LIST_SECONDS = 0.2


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """One with a runtime and a plugin that wait as long as there is a file."""
    daemon = make_module_daemon()
    base = daemon.base
    wait = f"touch {base}/began; echo x >> {base}/calls; while [ -e {base}/hold ]; do sleep 0.02; done"
    daemon.plugin(
        "slow-plugin",
        f"""
        [ $CNI_COMMAND = ADD ] || exit 0
        {wait}
        echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "198.51.100.7/24"}}]}}'
        """,
    )
    runtime = daemon.plugin(
        "slow-runtime",
        f"""
        for argument in "$@"; do
            if [ "$argument" = create ]; then {wait}; fi
        done
        exec runc "$@"
        """,
    )
    daemon.configure({"runtime": {"handlers": {"slow": {"path": str(runtime)}}}})
    daemon.start()
    daemon.pull(image)
    return daemon


@contextlib.contextmanager
def held(daemon: Daemon) -> Iterator[None]:
    """The slow ones do not come to an end while the body runs."""
    hold = daemon.base / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


async def begun(daemon: Daemon) -> None:
    """Wait until a slow one is at work."""
    path = daemon.base / "began"

    async def exists() -> bool:
        return path.exists()

    await until(exists, "the beginning of the work")
    path.unlink()


def calls(daemon: Daemon) -> int:
    """How often the slow ones have been called since the last time."""
    path = daemon.base / "calls"
    count = len(path.read_text().split()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


async def leave(task: asyncio.Task[str]) -> None:
    """Cancel a call as a client does that has lost patience."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def under_way(cri: Cri) -> int:
    """Operations that the daemon is busy with."""
    return int((await cri.runtime.Status(pb.StatusRequest(verbose=True))).info["operations"])


async def idle(cri: Cri) -> bool:
    """Whether the daemon has nothing to do."""
    return await under_way(cri) == 0


# callers who leave


async def test_pod_of_a_caller_who_left_is_for_whoever_asks_again(cri: Cri) -> None:
    """With the same metadata: the work is done once, and the pod is given out once."""
    calls(cri.daemon)
    config = cri.pod_config()
    with cri.daemon.other_network({"type": "slow-plugin"}):
        with held(cri.daemon):
            call = asyncio.create_task(cri.run_pod(config))
            await begun(cri.daemon)
            await leave(call)
            second = asyncio.create_task(cri.run_pod(config))
            await asyncio.sleep(0.1)
            await leave(second)
        await until(lambda: idle(cri), "the end of the work")
        (made,) = await cri.pods()
        assert await cri.run_pod(config) == made.id
        assert calls(cri.daemon) == 1
    with refused(grpc.StatusCode.ALREADY_EXISTS, config.metadata.name):
        await cri.run_pod(config)


async def test_pod_of_a_caller_who_never_comes_back_can_be_removed(cri: Cri) -> None:
    config = cri.pod_config()
    with cri.daemon.other_network({"type": "slow-plugin"}), held(cri.daemon):
        call = asyncio.create_task(cri.run_pod(config))
        await begun(cri.daemon)
        await leave(call)
        assert await cri.pods() == [], "it is not there before it is whole"
    await until(lambda: idle(cri), "the end of the work")
    (made,) = await cri.pods()
    await cri.remove_pod(made.id)
    assert await cri.run_pod(config) != made.id


async def test_container_of_a_caller_who_left_is_for_whoever_asks_again(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(handler="slow")
    calls(cri.daemon)
    config = container_config(image, sleeping())
    with held(cri.daemon):
        call = asyncio.create_task(cri.create(pod, config))
        await begun(cri.daemon)
        await leave(call)
        assert await cri.containers() == []
    await until(lambda: idle(cri), "the end of the work")
    (made,) = await cri.containers()
    assert await cri.create(pod, config) == made.id
    assert calls(cri.daemon) == 1
    with refused(grpc.StatusCode.ALREADY_EXISTS, config.metadata.name):
        await cri.create(pod, config)
    await cri.start(made.id)
    assert await cri.sh(made.id, "echo alive") == "alive\n"


async def test_same_request_at_the_same_time_is_one(cri: Cri, image: str) -> None:
    config = cri.pod_config()
    assert len(set(await asyncio.gather(*(cri.run_pod(config) for _ in range(4))))) == 1
    (pod,) = await cri.pods()
    container = container_config(image, sleeping())
    assert len(set(await asyncio.gather(*(cri.create(pod.id, container) for _ in range(4))))) == 1
    (made,) = await cri.containers()
    await asyncio.gather(*(cri.start(made.id) for _ in range(3)))
    assert (await cri.status(made.id)).state == pb.CONTAINER_RUNNING


async def test_stop_of_a_pod_puts_an_end_to_containers_being_made(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(handler="slow")
    with held(cri.daemon):
        call = asyncio.create_task(cri.create(pod, container_config(image, sleeping())))
        await begun(cri.daemon)
        began = time.monotonic()
        await cri.stop_pod(pod)
        assert time.monotonic() - began < 3
        with refused(grpc.StatusCode.UNAVAILABLE):
            await call
    assert await cri.containers() == []
    await cri.remove_pod(pod)


# many callers


@contextlib.asynccontextmanager
async def responsive(cri: Cri) -> AsyncIterator[None]:
    """Lists are answered at once, whatever the body has the daemon do."""
    slowest, ended = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal slowest
        while not ended.is_set():
            began = time.monotonic()
            await cri.containers()
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.005)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        ended.set()
        await task
    assert slowest < LIST_SECONDS, f"a list took {slowest * 1e3:.0f} ms"


async def test_many_pods_at_once(cri: Cri, image: str) -> None:
    async def life() -> tuple[str, str]:
        pod = await cri.run_pod()
        return pod, await cri.run(pod, container_config(image, sleeping()))

    async with responsive(cri):
        made = await asyncio.gather(*(life() for _ in range(PODS)))
        pods, containers = [pod for pod, _ in made], [container for _, container in made]
        addresses = {(await cri.pod_status(pod)).network.ip for pod in pods}
        assert len(addresses) == len(set(pods)) == len(set(containers)) == PODS
        outputs = await asyncio.gather(*(cri.sh(container, "hostname") for container in containers))
        assert len(set(outputs)) == PODS
        await asyncio.gather(*(cri.stop(container) for container in containers))
        for container in containers:
            assert (await cri.status(container)).exit_code == 0
        await asyncio.gather(*(cri.remove(container) for container in containers))
        await asyncio.gather(*(cri.stop_pod(pod) for pod in pods))
        await asyncio.gather(*(cri.remove_pod(pod) for pod in pods))
    assert await cri.pods() == [] and await cri.containers() == []
    await until(lambda: idle(cri), "the end of all work")


async def test_many_containers_of_one_pod_at_once(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    made = await asyncio.gather(*(cri.run(pod, container_config(image, sleeping())) for _ in range(PODS)))
    async with responsive(cri):
        await cri.remove_pod(pod)
    assert len(set(made)) == PODS and await cri.containers() == []


async def together(*works: Coroutine[None, None, None]) -> None:
    """All at the same time; none may fail."""
    await asyncio.gather(*works)


async def test_same_thing_asked_by_many(cri: Cri, image: str) -> None:
    """Stop and removal, of containers and pods: everybody gets the good news."""
    pod = await cri.run_pod()
    script = ["sh", "-c", "trap '' TERM; echo x; while true; do sleep 1; done"]
    container = await cri.run(pod, container_config(image, script))
    await cri.wait_output(container)
    began = time.monotonic()
    await together(*(cri.stop(container, 1) for _ in range(5)))
    assert time.monotonic() - began < 4
    status = await cri.status(container)
    assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 137)
    await together(*(cri.remove(container) for _ in range(5)))
    await together(*(cri.stop_pod(pod) for _ in range(5)))
    await together(*(cri.remove_pod(pod) for _ in range(5)))
    assert await cri.pods() == []


async def test_everything_at_the_same_time_for_one_pod(cri: Cri, image: str) -> None:
    """Calls that get in each other's way may be refused, but nothing hangs and nothing stays."""
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    works = [
        cri.stop(container, 5),
        cri.remove(container),
        cri.exec(container, ["sleep", "0.2"]),
        cri.create(pod, container_config(image, sleeping())),
        cri.stop_pod(pod),
        cri.start(container),
        cri.remove_pod(pod),
        cri.status(container),
        cri.pod_status(pod),
    ]
    possible = {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
    }
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            assert isinstance(result, grpc.aio.AioRpcError), result
            assert result.code() in possible and not str(result.details()).startswith("unexpected"), result
    await cri.remove_pod(pod)
    assert await cri.pods() == [] and await cri.containers() == []


async def test_images_pulled_and_removed_at_the_same_time(cri: Cri, image: str) -> None:
    """A container is made from an image that is whole, or not at all."""
    pod = await cri.run_pod()

    async def change() -> None:
        for _ in range(5):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await cri.remove_image(image)
            await cri.pull(image)

    async def use() -> None:
        for _ in range(8):
            try:
                container = await cri.run(pod, container_config(image, sleeping()))
            except grpc.aio.AioRpcError as err:
                assert err.code() is grpc.StatusCode.NOT_FOUND, err
                continue
            assert await cri.sh(container, "echo alive") == "alive\n"
            await cri.remove(container)

    await asyncio.gather(change(), use(), use())
    assert await cri.image(image) is not None
