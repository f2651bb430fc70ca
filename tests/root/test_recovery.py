"""The daemon dies at the worst moments, or is asked to end; the next one takes up what there is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness import registry as behaviours
from root.harness.client import Cri, connect, container_config, log_lines, refused, sleeping, unique, until
from root.harness.daemon import Daemon, processes
from root.harness.images import Entry, Image, layer
from root.harness.leaks import assert_no_leaks, take
from root.harness.registry import FakeRegistry

from .conftest import MakeDaemon

CRASHES = 6


def slow_runtime(base: Path) -> str:
    """An OCI runtime that takes its time to create, as long as there is a file."""
    return f"""
for argument in "$@"; do
    if [ "$argument" = create ]; then
        touch {base}/creating
        while [ -e {base}/hold ]; do sleep 0.02; done
    fi
done
exec runc "$@"
"""


def slow_plugin(base: Path) -> str:
    """A CNI plugin that takes its time for the command that a file names."""
    return f"""
if [ "$(cat {base}/hold 2>/dev/null)" = $CNI_COMMAND ]; then
    touch {base}/plugging
    while [ -e {base}/hold ]; do sleep 0.02; done
fi
[ $CNI_COMMAND = DEL ] || echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "198.51.100.7/24"}}]}}'
"""


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """One with a runtime and a plugin that can be held up."""
    daemon = make_module_daemon()
    daemon.plugin("slow-plugin", slow_plugin(daemon.base))
    runtime = daemon.plugin("slow-runtime", slow_runtime(daemon.base))
    daemon.configure({"runtime": {"handlers": {"slow": {"path": str(runtime)}}}})
    daemon.start()
    daemon.pull(image)
    return daemon


@contextlib.asynccontextmanager
async def after_crash(daemon: Daemon) -> AsyncIterator[Cri]:
    """Kill the daemon, start it again, and connect to it."""
    await asyncio.to_thread(daemon.restart)
    async with connect(daemon) as cri:
        yield cri


async def exists(path: Path) -> bool:
    """Whether there is such a file: for :func:`until`."""
    return path.exists()


def waiting_for(directory: Path, then: str) -> pb.ContainerConfig:
    """A container without an image that waits for a file ``go`` in ``directory``."""
    script = f"until [ -e /shared/go ]; do sleep 0.02; done; {then}"
    mount = pb.Mount(container_path="/shared", host_path=str(directory), readonly=True)
    return container_config("", ["sh", "-c", script], mounts=[mount])


async def everything(cri: Cri) -> list[object]:
    """All that the daemon knows, as clients see it."""
    pods, containers = await cri.pods(), await cri.containers()
    statuses = [await cri.pod_status(pod.id) for pod in pods] + [await cri.status(item.id) for item in containers]
    return [pods, containers, statuses, sorted(image.SerializeToString() for image in await cri.image_list())]


# what is there


async def test_pods_containers_and_images_are_there_again(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(cri.pod_config(labels={"a": "b"}, annotations={"c": "d"}))
    stopped = await cri.run_pod()
    await cri.stop_pod(stopped)
    running = await cri.run(pod, container_config(image, sleeping(), labels={"e": "f"}))
    created = await cri.create(pod, container_config(image, ["sh", "-c", "exit 5"]))
    ended = await cri.run(pod, container_config(image, ["sh", "-c", "exit 3"]))
    await cri.wait_exit(ended)
    before = await everything(cri)
    async with after_crash(cri.daemon) as again:
        assert await everything(again) == before
        assert await again.sh(running, "echo alive") == "alive\n"
        await again.start(created)
        assert (await again.wait_exit(created)).exit_code == 5
        more = await again.run(pod, container_config(image, sleeping()))
        assert await again.sh(more, "echo more") == "more\n"
        await again.stop(running)
        assert (await again.status(running)).exit_code == 0
        await again.remove(running)
        await again.remove(ended)
        assert {item.id for item in await again.containers()} == {created, more}


async def test_container_that_ends_while_nobody_looks(cri: Cri, image: str, tmp_path: Path) -> None:
    """Its exit code, its time and the reason are what they were."""
    pod = await cri.run_pod()
    plain, hungry = (
        waiting_for(tmp_path, "echo last words; exit 7"),
        waiting_for(tmp_path, """exec awk 'BEGIN { text = "x"; while (1) text = text text }'"""),
    )
    hungry.linux.resources.memory_limit_in_bytes = 32 << 20
    for config in (plain, hungry):
        config.image.image = image
    first, second = await cri.run(pod, plain), await cri.run(pod, hungry)
    daemon = cri.daemon
    daemon.kill()
    (tmp_path / "go").touch()
    exits = [daemon.state / "exits" / container for container in (first, second)]
    for path in exits:
        await until(lambda path=path: exists(path), f"the exit file {path}", 10)  # type: ignore[misc]
    ended = time.time_ns()
    await asyncio.sleep(0.5)
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as again:
        status, killed = await again.wait_exit(first), await again.wait_exit(second)
        assert (status.exit_code, status.reason) == (7, "Error")
        assert status.started_at <= status.finished_at <= ended
        assert (killed.exit_code, killed.reason) == (137, "OOMKilled")
        assert [line.text for line in log_lines(Path(status.log_path))] == [b"last words"]


async def test_stop_that_a_crash_cut_short(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while true; do sleep 1; done"]
    container = await cri.run(pod, container_config(image, stubborn))
    await cri.wait_output(container)
    call = asyncio.create_task(cri.stop(container, 60))
    await asyncio.sleep(0.2)
    async with after_crash(cri.daemon) as again:
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert (await again.status(container)).state == pb.CONTAINER_RUNNING
        await again.stop(container, 0)
        assert (await again.status(container)).exit_code == 137


# what was half done


@contextlib.contextmanager
def held(daemon: Daemon, command: str) -> Iterator[Path]:
    """The slow plugin, or the slow runtime, does not come to an end with ``command``; a file shows that it began."""
    began = {"create": daemon.base / "creating"}.get(command, daemon.base / "plugging")
    hold = daemon.base / "hold"
    hold.write_text(command)
    try:
        yield began
    finally:
        hold.unlink()
        began.unlink(missing_ok=True)


async def crash_during(daemon: Daemon, call: Coroutine[None, None, object], began: Path) -> None:
    """Kill the daemon and start it again when it is at work on ``call``."""
    task = asyncio.create_task(call)
    await until(lambda: exists(began), "the beginning of the work")
    await asyncio.to_thread(daemon.restart)
    with pytest.raises(grpc.aio.AioRpcError):
        await task


async def test_crash_while_a_pod_is_made(cri: Cri) -> None:
    """Nothing of it stays: not its address, not what was still at work for it; its name is free."""
    daemon, config = cri.daemon, cri.pod_config()
    await cri.remove_pod(await cri.run_pod())  # the bridge is made once and stays
    before = await asyncio.to_thread(take, daemon)
    with held(daemon, "ADD") as began:
        with daemon.other_network(daemon.bridge_plugin(), {"type": "slow-plugin"}):
            await crash_during(daemon, cri.run_pod(config), began)
        await asyncio.to_thread(assert_no_leaks, daemon, before)
    async with connect(daemon) as again:
        assert await again.pods() == []
        pod = await again.run_pod(config)
        assert [item.id for item in await again.pods()] == [pod]


async def test_crash_while_a_pod_is_removed(cri: Cri) -> None:
    """The removal goes on; the name is free after it."""
    daemon, config = cri.daemon, cri.pod_config()
    before = await asyncio.to_thread(take, daemon)
    with daemon.other_network({"type": "slow-plugin"}):
        pod = await cri.run_pod(config)
    with held(daemon, "DEL") as began:
        await crash_during(daemon, cri.remove_pod(pod), began)
    async with connect(daemon) as again:
        await again.remove_pod(pod)
        assert await again.pods() == []
        await asyncio.to_thread(assert_no_leaks, daemon, before)
        assert await again.run_pod(config) != pod


async def test_crash_while_a_container_is_made(cri: Cri, image: str) -> None:
    daemon, config = cri.daemon, container_config(image, sleeping())
    pod = await cri.run_pod(handler="slow")
    await cri.remove(await cri.create(pod, config))
    before = await asyncio.to_thread(take, daemon)
    with held(daemon, "create") as began:
        await crash_during(daemon, cri.create(pod, config), began)
        await asyncio.to_thread(assert_no_leaks, daemon, before)
    async with connect(daemon) as again:
        assert await again.containers() == []
        container = await again.run(pod, config)
        assert await again.sh(container, "echo alive") == "alive\n"


async def test_crash_during_a_pull(cri: Cri, fake_registry: FakeRegistry) -> None:
    daemon = cri.daemon
    with daemon.registries_conf.open("a") as conf:
        conf.write(f'[[registry]]\nlocation = "{fake_registry.host}"\ninsecure = true\n')
    image = Image(tuple(layer([Entry("file", unique("pulled").encode())]) for _ in range(2)))
    reference = fake_registry.put("pulled", image)
    stalled = image.layers[1].digest
    fake_registry.behaviours[stalled] = behaviours.stalled
    before = await asyncio.to_thread(take, daemon)
    call = asyncio.create_task(cri.pull(reference))

    async def asked() -> bool:
        return fake_registry.asked(stalled) > 0

    await until(asked, "the request for the layer")
    await asyncio.sleep(0.2)
    async with after_crash(daemon) as again:
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert await again.image(reference) is None
        await asyncio.to_thread(assert_no_leaks, daemon, before)
        del fake_registry.behaviours[stalled]
        assert await again.pull(reference) == image.id


async def test_crashes_at_any_moment(cri: Cri, image: str) -> None:
    """Whatever was under way: it is there and works, or it is not there at all, and all can be removed."""
    daemon = cri.daemon
    await cri.remove_pod(await cri.run_pod())
    before = await asyncio.to_thread(take, daemon)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def life(cri: Cri) -> None:
        while True:
            pod = await cri.run_pod()
            container = await cri.run(pod, container_config(image, sleeping()))
            await cri.sh(container, "true")
            await cri.stop(container)
            await cri.remove_pod(pod)

    for _ in range(CRASHES):
        async with connect(daemon) as doomed:
            lives = [asyncio.create_task(life(doomed)) for _ in range(3)]
            await asyncio.sleep(chance.uniform(0.02, 0.6))
            await asyncio.to_thread(daemon.kill)
            for ended in await asyncio.gather(*lives, return_exceptions=True):
                assert isinstance(ended, grpc.aio.AioRpcError), ended
                assert ended.code() is grpc.StatusCode.UNAVAILABLE, ended
        await asyncio.to_thread(daemon.start)
        async with connect(daemon) as again:
            await asyncio.gather(*(whole(again, item) for item in await again.containers()))
            await asyncio.gather(*(again.remove_pod(pod.id) for pod in await again.pods()))
        await asyncio.to_thread(assert_no_leaks, daemon, before)


async def whole(cri: Cri, item: pb.Container) -> None:
    """The container works as far as it is, unless the daemon was told to remove it before the crash."""
    try:
        if item.state == pb.CONTAINER_CREATED:
            await cri.start(item.id)
        if (await cri.status(item.id)).state == pb.CONTAINER_RUNNING:
            assert await cri.sh(item.id, "echo alive") == "alive\n"
    except grpc.aio.AioRpcError as err:
        assert err.code() is grpc.StatusCode.NOT_FOUND, err


async def test_leftovers_that_nobody_knows_are_swept(cri: Cri) -> None:
    """Only in our own directories."""
    daemon = cri.daemon
    await asyncio.to_thread(daemon.kill)
    stray = "f" * 64
    for place in ("state/containers", "state/sandboxes", "root/containers", "root/layers"):
        (daemon.base / place / stray / "below").mkdir(parents=True)
        (daemon.base / place / stray / "below" / "file").write_text("x")
    (daemon.state / "exits" / stray).write_text("0")
    mounted = daemon.state / "containers" / stray / "rootfs"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "stray", str(mounted)], check=True)
    (mounted / "precious").write_text("x")
    precious = daemon.base / "precious"
    precious.mkdir()
    subprocess.run(["mount", "--bind", str(precious), str(mounted)], check=True)
    (mounted / "kept").write_text("x")
    await asyncio.to_thread(daemon.start)
    assert (precious / "kept").read_text() == "x", "what was mounted is not ours to delete"
    assert not [path for path in daemon.base.glob("*/*/*") if path.name == stray]


# what is killed besides


def monitor_of(container: str) -> int:
    """The conmon of a container."""
    return next(pid for pid, words in processes() if b"--cid" in words and container.encode() in words)


async def test_container_without_its_monitor(cri: Cri, image: str) -> None:
    """It lives on; as its next of kin the daemon learns how it ends."""
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, ["sh", "-c", "trap 'exit 9' TERM; sleep 600 & wait $!"]))
    os.kill(monitor_of(container), signal.SIGKILL)
    await asyncio.sleep(0.3)
    assert (await cri.status(container)).state == pb.CONTAINER_RUNNING
    assert await cri.sh(container, "echo alive") == "alive\n"
    await cri.stop(container)
    status = await cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 9, "Error")
    await cri.remove(container)


async def test_container_without_its_monitor_after_a_restart(cri: Cri, image: str) -> None:
    """Nobody is left who could know the exit code, and that is what is said."""
    container = await cri.run(await cri.run_pod(), container_config(image, sleeping()))
    async with after_crash(cri.daemon) as again:
        os.kill(monitor_of(container), signal.SIGKILL)
        assert await again.sh(container, "echo alive") == "alive\n"
        await again.stop(container)
        status = await again.status(container)
        assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 255, "Error")
        assert "unknown" in status.message


async def test_monitor_and_container_killed_while_nobody_looks(cri: Cri, image: str) -> None:
    container = await cri.run(await cri.run_pod(), container_config(image, sleeping()))
    await asyncio.to_thread(cri.daemon.kill)
    pid = int((cri.daemon.state / "containers" / container / "pidfile").read_text())
    os.kill(monitor_of(container), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(cri.daemon.start)
    async with connect(cri.daemon) as again:
        status = await again.wait_exit(container)
        assert (status.exit_code, "unknown" in status.message) == (255, True)


@pytest.mark.parametrize("crash", [False, True], ids=["watched", "unwatched"])
async def test_pod_that_loses_its_pid_namespace(cri: Cri, image: str, crash: bool) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    (holder,) = [pid for pid, words in processes() if cri.daemon.owns_holder(pid, words)]
    if crash:
        await asyncio.to_thread(cri.daemon.kill)
    os.kill(holder, signal.SIGKILL)
    if crash:
        await asyncio.to_thread(cri.daemon.start)
    async with connect(cri.daemon) as again:

        async def not_ready() -> bool:
            return (await again.pod_status(pod)).state == pb.SANDBOX_NOTREADY

        await until(not_ready, "the pod not being ready")
        assert (await again.wait_exit(container)).exit_code == 137
        with refused(grpc.StatusCode.FAILED_PRECONDITION, pod):
            await again.create(pod, container_config(image, sleeping()))


# asked to end


async def test_termination_finishes_calls_and_leaves_containers(cri: Cri, image: str) -> None:
    daemon = cri.daemon
    pod = await cri.run_pod()
    stays = await cri.run(pod, container_config(image, sleeping()))
    ends = await cri.run(
        pod, container_config(image, ["sh", "-c", "trap '' TERM; echo x; while true; do sleep 1; done"])
    )
    await cri.wait_output(ends)
    call = asyncio.create_task(cri.stop(ends, 2))
    await asyncio.sleep(0.3)
    code = asyncio.create_task(asyncio.to_thread(daemon.terminate))
    await call
    assert await code == 0
    pid = int((daemon.state / "containers" / stays / "pidfile").read_text())
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0")
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as again:
        assert (await again.status(ends)).exit_code == 137
        assert await again.sh(stays, "echo alive") == "alive\n"
