"""Container events, lists as streams, statistics, resource updates: against a real daemon and its cgroups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest_asyncio

from crishim.cri.api import api_pb2 as pb
from root.harness.client import CALL_SECONDS, Cri, container_config, refused, sleeping, until

Events = asyncio.Queue[pb.ContainerEventResponse]


@pytest_asyncio.fixture
async def events(cri: Cri) -> AsyncIterator[Events]:
    """Everything that happens from now on."""
    heard: Events = asyncio.Queue()
    call = cri.runtime.GetContainerEvents(pb.GetEventsRequest())

    async def listen() -> None:
        async for event in call:
            heard.put_nowait(event)

    task = asyncio.create_task(listen())
    await call.wait_for_connection()
    await asyncio.sleep(0.1)  # the server begins to listen with the first bytes that it reads
    yield heard
    call.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_tell_a_life_in_order(cri: Cri, image: str, events: Events) -> None:
    """Each with the state of its pod at that moment, as the evented PLEG needs it."""
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, ["sh", "-c", "exit 5"]))
    await cri.wait_exit(container)
    await cri.remove_pod(pod)
    seen = [await asyncio.wait_for(events.get(), 5) for _ in range(8)]
    told = [(event.container_event_type, event.container_id == container) for event in seen]
    created, started = pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT
    stopped, deleted = pb.CONTAINER_STOPPED_EVENT, pb.CONTAINER_DELETED_EVENT
    assert [kind for kind, own in told if own] == [created, started, stopped, deleted]
    assert [kind for kind, own in told if not own] == [created, started, stopped, deleted]
    exit_event = next(e for e in seen if e.container_id == container and e.container_event_type == stopped)
    assert exit_event.pod_sandbox_status.id == pod
    assert [(s.id, s.exit_code) for s in exit_event.containers_statuses] == [(container, 5)]
    assert [e.created_at for e in seen] == sorted(e.created_at for e in seen)


async def test_streams_say_what_lists_say(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    pods = [
        item
        async for part in cri.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest())
        for item in part.pod_sandboxes
    ]
    containers = [
        item async for part in cri.runtime.StreamContainers(pb.StreamContainersRequest()) for item in part.containers
    ]
    images = [item async for part in cri.images.StreamImages(pb.StreamImagesRequest()) for item in part.images]
    stats = [
        item
        async for part in cri.runtime.StreamContainerStats(pb.StreamContainerStatsRequest())
        for item in part.container_stats
    ]
    assert pods == await cri.pods()
    assert containers == await cri.containers()
    assert images == await cri.image_list()
    assert container in [item.attributes.id for item in stats]
    call = cri.runtime.StreamPodSandboxStats(pb.StreamPodSandboxStatsRequest())
    pod_stats = [item async for part in call for item in part.pod_sandbox_stats]
    assert [item.attributes.id for item in pod_stats] == [item.id for item in pods]


async def test_statistics_follow_the_container(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    linux = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20))
    script = "dd if=/dev/zero of=/ballast bs=1M count=3; exec sleep 600"
    container = await cri.run(pod, container_config(image, ["sh", "-c", script], linux=linux))
    request = pb.ContainerStatsRequest(container_id=container)

    async def counted() -> bool:
        stats = (await cri.runtime.ContainerStats(request, timeout=CALL_SECONDS)).stats
        return stats.writable_layer.used_bytes.value >= 3 << 20

    # the first count may come before the file is written; the next is made half a minute later
    await asyncio.sleep(0.3)
    await until(counted, "the writable layer's size in the statistics", 5)
    stats = (await cri.runtime.ContainerStats(request, timeout=CALL_SECONDS)).stats
    assert stats.attributes.id == container
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.cpu.HasField("usage_nano_cores")
    memory = stats.memory
    assert 0 < memory.working_set_bytes.value <= memory.usage_bytes.value < 64 << 20
    assert memory.available_bytes.value == (64 << 20) - memory.working_set_bytes.value
    assert stats.writable_layer.inodes_used.value >= 1
    assert stats.writable_layer.fs_id.mountpoint == str(cri.daemon.root)


async def test_statistics_of_a_pod(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    answer = await cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod), timeout=CALL_SECONDS)
    linux = answer.stats.linux
    assert [item.attributes.id for item in linux.containers] == [container]
    assert linux.network.default_interface.name == "eth0"
    assert linux.process.process_count.value >= 1
    assert linux.memory.usage_bytes.value > 0


async def test_only_running_containers_are_listed(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    running = await cri.run(pod, container_config(image, sleeping()))
    ended = await cri.run(pod, container_config(image, ["true"]))
    await cri.wait_exit(ended)
    wanted = pb.ContainerStatsFilter(pod_sandbox_id=pod)
    answer = await cri.runtime.ListContainerStats(pb.ListContainerStatsRequest(filter=wanted), timeout=CALL_SECONDS)
    assert [item.attributes.id for item in answer.stats] == [running]


async def test_statistics_of_what_is_not_there(cri: Cri) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "nowhere"):
        await cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id="nowhere"), timeout=CALL_SECONDS)
    with refused(grpc.StatusCode.NOT_FOUND, "nowhere"):
        await cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id="nowhere"), timeout=CALL_SECONDS)


async def _update(cri: Cri, container: str, **fields: int) -> None:
    request = pb.UpdateContainerResourcesRequest(container_id=container, linux=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]
    await cri.runtime.UpdateContainerResources(request, timeout=CALL_SECONDS)


async def test_updated_limits_hold_and_show(cri: Cri, image: str) -> None:
    """In the created state and in the running one; what an update leaves out stays."""
    pod = await cri.run_pod()
    linux = pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=512)
    )
    container = await cri.create(pod, container_config(image, sleeping(), linux=linux))
    await _update(cri, container, memory_limit_in_bytes=48 << 20)
    await cri.start(container)
    await _update(cri, container, cpu_quota=50_000, cpu_period=100_000)
    shown = (await cri.status(container)).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_shares) == (48 << 20, 512)
    assert (shown.cpu_quota, shown.cpu_period) == (50_000, 100_000)
    request = pb.ContainerStatsRequest(container_id=container)
    memory = (await cri.runtime.ContainerStats(request, timeout=CALL_SECONDS)).stats.memory
    assert memory.available_bytes.value + memory.working_set_bytes.value == 48 << 20


async def test_updates_are_refused_after_the_end(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, ["true"]))
    await cri.wait_exit(container)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container):
        await _update(cri, container, memory_limit_in_bytes=48 << 20)
