"""What attackers and other people's trouble must not do: each of these was possible once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness.client import CALL_SECONDS, Cri, container_config, refused, sleeping, unique
from root.harness.images import busybox
from root.harness.registry import FakeRegistry, Login, Registry


async def test_tags_pulled_at_the_same_time_are_all_known(cri: Cri, registry: Registry) -> None:
    image = busybox().with_config(Labels={"for": "parallel tags"})
    tags = [f"t{number}" for number in range(8)]
    for tag in tags:
        await asyncio.to_thread(registry.push, "many", image, tag)
    await asyncio.gather(*(cri.pull(f"{registry.host}/many:{tag}") for tag in tags))
    known = await cri.image(f"{registry.host}/many:t0")
    assert known is not None
    assert sorted(known.repo_tags) == sorted(f"{registry.host}/many:{tag}" for tag in tags)


async def test_an_impossible_user_does_not_break_the_list(cri: Cri, registry: Registry) -> None:
    await asyncio.to_thread(registry.push, "giant", busybox().with_config(User="9" * 30))
    await cri.pull(f"{registry.host}/giant:latest")
    found = await cri.image(f"{registry.host}/giant:latest")
    assert found is not None and found.username == "9" * 30
    assert found.id in [image.id for image in await cri.image_list()]


async def test_a_retry_with_another_request_is_no_retry(cri: Cri, image: str) -> None:
    """It must not get the container of the first."""
    pod = await cri.run_pod()
    first = container_config(image, sleeping(), name=unique("once"))
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=first)
    call = cri.runtime.CreateContainer(request, timeout=CALL_SECONDS)
    await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    second = pb.ContainerConfig()
    second.CopyFrom(first)
    second.command[:] = ["true"]
    with refused(grpc.StatusCode.ALREADY_EXISTS, first.metadata.name):
        await cri.create(pod, second)
    container = await cri.create(pod, first)
    assert [item.id for item in await cri.containers(pod_sandbox_id=pod)] == [container]


async def test_a_long_complaint_keeps_its_status(cri: Cri, image: str) -> None:
    """gRPC gives up a status whose message does not fit its headers."""
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, sleeping()))
    with refused(grpc.StatusCode.INTERNAL, "cannot run the command"):
        await cri.exec(container, ["x" * 30_000])


@pytest.mark.parametrize("field", ["log_directory", "hostname"])
async def test_a_nul_is_refused_by_name(cri: Cri, field: str) -> None:
    config = cri.pod_config()
    setattr(config, field, "/tmp/a\0b")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, field):
        await cri.run_pod(config)


async def test_a_loop_of_symlinks_is_no_mount_source(cri: Cri, image: str, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    pod = await cri.run_pod()
    mount = pb.Mount(container_path="/mnt", host_path=str(tmp_path / "a"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, str(tmp_path / "a")):
        await cri.create(pod, container_config(image, sleeping(), mounts=[mount]))


async def test_a_network_that_never_lets_go_cannot_keep_a_pod(cri: Cri) -> None:
    """The caller hears of the first refusals; then the pod goes, its name is free, DEL is tried behind the scenes."""
    daemon, config = cri.daemon, cri.pod_config()
    refuse = daemon.base / "refuse"
    daemon.plugin(
        "clinging",
        f"""[ "$CNI_COMMAND" = DEL ] && [ -e {refuse} ] && exit 1
[ "$CNI_COMMAND" = DEL ] || echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "198.51.100.9/24"}}], "dns": {{}}}}'
exit 0""",
    )
    with daemon.other_network({"type": "clinging"}):
        refuse.touch()
        pod = await cri.run_pod(config)
        for _ in range(2):
            with refused(grpc.StatusCode.INTERNAL, "clinging"):
                await cri.stop_pod(pod)
        await cri.stop_pod(pod)
        await cri.remove_pod(pod)
        assert pod not in [item.id for item in await cri.pods()]
        again = await cri.run_pod(config)
        refuse.unlink()
        await cri.remove_pod(again)
    await asyncio.to_thread(daemon.restart)  # the next daemon asks at once, and forgets the pod when it is answered


async def test_credentials_are_not_for_mirrors(cri: Cri, fake_registry: FakeRegistry) -> None:
    """What the caller gives is for the registry that it names; a mirror, here even without TLS, never sees it."""
    fake_registry.login = Login("a-token", "user", "secret")
    fake_registry.put("mirror/app", busybox(), "v1")
    conf = cri.daemon.registries_conf
    before = conf.read_text()
    conf.write_text(
        f"""{before}
[[registry]]
prefix = "secure.test/team"
location = "127.0.0.1:1/nobody/listens/here"
[[registry.mirror]]
location = "{fake_registry.host}/mirror"
insecure = true
"""
    )
    try:
        with refused(grpc.StatusCode.UNKNOWN, "RegistryUnavailable: "):
            await cri.pull("secure.test/team/app:v1", pb.AuthConfig(username="user", password="secret"))
    finally:
        conf.write_text(before)
    assert fake_registry.seen
    assert fake_registry.login.basic not in [request.authorization for request in fake_registry.seen]
