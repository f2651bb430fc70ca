"""Pods and containers from their beginning to their end, as a client of the CRI sees them and as the kernel does."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness.client import Cri, connect, container_config, log_lines, metadata, refused, sleeping, unique, until
from root.harness.daemon import Daemon
from root.harness.images import busybox
from root.harness.leaks import unchanged
from root.harness.registry import Registry

MakeDaemon = Callable[..., Daemon]

DEFAULT_CAPABILITIES = 0x00000000A80425FB
"""The 14 that Docker and containerd give."""


def security(**fields: object) -> pb.LinuxContainerConfig:
    """The Linux part of a container with only a security context."""
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))  # type: ignore[arg-type]


def namespaces(**modes: pb.NamespaceMode.ValueType) -> pb.LinuxPodSandboxConfig:
    """The Linux part of a pod with only namespace options."""
    options = pb.NamespaceOption(**modes)  # type: ignore[arg-type]
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))


@pytest.fixture(scope="module")
def pod(daemon: Daemon, image: str) -> Iterator[str]:
    """A pod for tests that only need a place for containers."""
    config = pb.PodSandboxConfig(metadata=metadata("shared"), log_directory=str(daemon.logs / "shared"))
    with daemon.stubs() as (runtime, _):
        made = runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), timeout=30).pod_sandbox_id
        request = pb.CreateContainerRequest(pod_sandbox_id=made, config=container_config(image, ["true"]))
        first = runtime.CreateContainer(request, timeout=30).container_id  # makes the pod's cgroup, which stays
        runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=first), timeout=30)
        yield made
        runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=made), timeout=30)


# pods


async def test_pod_from_run_to_removal(cri: Cri) -> None:
    before = time.time_ns()
    config = cri.pod_config(labels={"app": "x"}, annotations={"note": "y"})
    pod = await cri.run_pod(config)
    assert re.fullmatch("[0-9a-f]{64}", pod)
    status = await cri.pod_status(pod)
    assert (status.id, status.metadata, status.state) == (pod, config.metadata, pb.SANDBOX_READY)
    assert before <= status.created_at <= time.time_ns()
    assert dict(status.labels) == {"app": "x"} and dict(status.annotations) == {"note": "y"}
    assert status.network.ip.startswith(cri.daemon.subnet.removesuffix("0/24"))
    assert status.linux.namespaces.options == pb.NamespaceOption()
    (listed,) = await cri.pods(id=pod)
    assert (listed.id, listed.metadata, listed.state) == (pod, config.metadata, pb.SANDBOX_READY)
    assert listed.created_at == status.created_at

    await cri.stop_pod(pod)
    assert (await cri.pod_status(pod)).state == pb.SANDBOX_NOTREADY
    await cri.stop_pod(pod)

    await cri.remove_pod(pod)
    with refused(grpc.StatusCode.NOT_FOUND, pod):
        await cri.pod_status(pod)
    assert await cri.pods(id=pod) == []
    await cri.remove_pod(pod)
    await cri.stop_pod(pod)


async def test_removal_of_a_running_pod_takes_its_containers_along(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    containers = [await cri.run(pod, container_config(image, sleeping())) for _ in range(2)]
    created = await cri.create(pod, container_config(image, ["true"]))
    await cri.remove_pod(pod)
    left = {item.id for item in await cri.containers()}
    assert not left & {*containers, created}


async def test_stop_of_a_pod_ends_its_containers(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, ["sleep", "600"]))
    await cri.stop_pod(pod)
    status = await cri.status(container)
    assert status.state == pb.CONTAINER_EXITED
    with refused(grpc.StatusCode.FAILED_PRECONDITION, pod):
        await cri.create(pod, container_config(image, ["true"]))


async def test_labels_and_annotations_come_back_byte_for_byte(cri: Cri, image: str) -> None:
    odd = {
        "": "empty key",
        "empty": "",
        "new\nline": 'quo"te\\',
        "ünï/code": "\N{SNOWMAN}\t\x7f",
        "long": "x" * 200_000,
    }
    pod = await cri.run_pod(cri.pod_config(labels=odd, annotations=odd))
    container = await cri.create(pod, container_config(image, ["true"], labels=odd, annotations=odd))
    status, (listed,) = await cri.status(container), await cri.containers(id=container)
    in_pod, (pod_listed,) = await cri.pod_status(pod), await cri.pods(id=pod)
    for shown in (in_pod.labels, pod_listed.labels, status.labels, listed.labels):
        assert dict(shown) == odd
    for shown in (in_pod.annotations, pod_listed.annotations, status.annotations, listed.annotations):
        assert dict(shown) == odd


async def test_pods_are_filtered(cri: Cri) -> None:
    names = [unique("filtered") for _ in range(3)]
    first, second, third = [
        await cri.run_pod(cri.pod_config(name, labels={"app": "f", "n": str(number)}))
        for number, name in enumerate(names)
    ]
    await cri.stop_pod(third)

    async def ids(**wanted: object) -> list[str]:
        return [item.id for item in await cri.pods(**wanted)]

    ready, not_ready = (pb.PodSandboxStateValue(state=s) for s in (pb.SANDBOX_READY, pb.SANDBOX_NOTREADY))
    assert await ids(label_selector={"app": "f"}) == [first, second, third], "oldest first"
    assert await ids(label_selector={"app": "f", "n": "1"}) == [second]
    assert await ids(label_selector={"app": "g"}) == []
    assert await ids(id=first) == [first]
    assert await ids(id=second[:13]) == [second]
    assert await ids(label_selector={"app": "f"}, state=ready) == [first, second]
    assert await ids(label_selector={"app": "f"}, state=not_ready) == [third]
    assert await ids(id=first, state=not_ready) == []


# the life of a container


async def test_container_from_creation_to_removal(cri: Cri, pod: str, image: str) -> None:
    ready = ["sh", "-c", "trap 'exit 0' TERM; echo ready; sleep 600 & wait $!"]
    config = container_config(image, ready, labels={"a": "b"}, annotations={"c": "d"})
    container = await cri.create(pod, config)
    assert re.fullmatch("[0-9a-f]{64}", container)
    status = await cri.status(container)
    assert (status.id, status.metadata, status.state) == (container, config.metadata, pb.CONTAINER_CREATED)
    assert (status.started_at, status.finished_at, status.exit_code, status.reason) == (0, 0, 0, "")
    assert status.image == config.image and dict(status.labels) == {"a": "b"}

    await cri.start(container)
    status = await cri.status(container)
    assert status.state == pb.CONTAINER_RUNNING
    assert 0 < status.created_at <= status.started_at <= time.time_ns() and status.finished_at == 0
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container):
        await cri.start(container)

    await cri.wait_output(container)  # the trap is set
    await cri.stop(container)
    status = await cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 0, "Completed")
    assert status.created_at <= status.started_at <= status.finished_at <= time.time_ns()
    await cri.stop(container)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container):
        await cri.start(container)

    await cri.remove(container)
    with refused(grpc.StatusCode.NOT_FOUND, container):
        await cri.status(container)
    await cri.remove(container)
    await cri.stop(container)


@pytest.mark.parametrize(("code", "reason"), [(0, "Completed"), (3, "Error"), (137, "Error"), (255, "Error")])
async def test_exit_codes(cri: Cri, pod: str, image: str, code: int, reason: str) -> None:
    status = await cri.wait_exit(await cri.run(pod, container_config(image, ["sh", "-c", f"exit {code}"])))
    assert (status.exit_code, status.reason) == (code, reason)
    assert status.created_at <= status.started_at <= status.finished_at


async def test_container_that_signals_end(cri: Cri, pod: str, image: str) -> None:
    """The exit code is 128 and the signal's number."""
    stopped = await cri.run(pod, container_config(image, ["sleep", "600"]))
    killed = await cri.run(pod, container_config(image, ["sh", "-c", "kill -9 $$"]))
    await cri.stop(stopped)
    assert (await cri.status(stopped)).exit_code == 143
    assert (await cri.wait_exit(killed)).exit_code == 137
    assert (await cri.status(stopped)).reason == (await cri.status(killed)).reason == "Error"


async def test_container_out_of_memory(cri: Cri, pod: str, image: str) -> None:
    hungry = ["awk", 'BEGIN { text = "x"; while (1) text = text text }']
    limit = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    status = await cri.wait_exit(await cri.run(pod, container_config(image, hungry, linux=limit)))
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


async def test_stop_of_a_container_that_was_never_started(cri: Cri, pod: str, image: str) -> None:
    container = await cri.create(pod, container_config(image, sleeping()))
    await cri.stop(container, 30)
    assert (await cri.status(container)).state == pb.CONTAINER_EXITED


STUBBORN = ["sh", "-c", "trap '' TERM; echo ready; while true; do sleep 1; done"]


async def stubborn(cri: Cri, pod: str, image: str) -> str:
    """A container that does not heed SIGTERM, once it does not."""
    container = await cri.run(pod, container_config(image, STUBBORN))
    await cri.wait_output(container)
    return container


async def test_container_that_ignores_its_stop_signal_is_killed_in_time(cri: Cri, pod: str, image: str) -> None:
    container = await stubborn(cri, pod, image)
    began = time.monotonic()
    await cri.stop(container, 1)
    assert 0.9 < time.monotonic() - began < 4
    assert (await cri.status(container)).exit_code == 137


async def test_stop_without_grace_kills_at_once(cri: Cri, pod: str, image: str) -> None:
    container = await stubborn(cri, pod, image)
    began = time.monotonic()
    await cri.stop(container, 0)
    assert time.monotonic() - began < 1
    assert (await cri.status(container)).exit_code == 137


async def test_earlier_deadline_of_two_stops_wins(cri: Cri, pod: str, image: str) -> None:
    container = await stubborn(cri, pod, image)
    began = time.monotonic()
    patient = asyncio.create_task(cri.stop(container, 60))
    await asyncio.sleep(0.2)
    await cri.stop(container, 1)
    await patient
    assert time.monotonic() - began < 6
    assert (await cri.status(container)).exit_code == 137


async def test_stop_goes_on_when_its_caller_leaves(cri: Cri, pod: str, image: str) -> None:
    container = await stubborn(cri, pod, image)
    call = cri.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=1))
    await asyncio.sleep(0.3)
    call.cancel()
    assert (await cri.status(container)).state == pb.CONTAINER_RUNNING
    assert (await cri.wait_exit(container, 6)).exit_code == 137


async def test_stop_signals(cri: Cri, pod: str, image: str, registry: Registry) -> None:
    """The container's own counts more than the image's, which counts more than SIGTERM."""
    of_image = registry.push("stopsignal", busybox().with_config(StopSignal="SIGUSR1"))
    await cri.pull(of_image)
    script = "trap 'exit 10' USR1; trap 'exit 12' USR2; trap 'exit 15' TERM; echo ready; while true; do sleep 0.1; done"
    for config, number, code in (
        (container_config(image, ["sh", "-c", script]), pb.SIGTERM, 15),
        (container_config(of_image, ["sh", "-c", script]), pb.SIGUSR1, 10),
        (container_config(of_image, ["sh", "-c", script], stop_signal=pb.SIGUSR2), pb.SIGUSR2, 12),
    ):
        container = await cri.run(pod, config)
        status = await cri.status(container)
        assert status.stop_signal == number
        await cri.wait_output(container)
        await cri.stop(container)
        assert (await cri.status(container)).exit_code == code


async def test_removal_of_a_running_container(cri: Cri, pod: str, image: str) -> None:
    container = await stubborn(cri, pod, image)
    await cri.remove(container)
    assert await cri.containers(id=container) == []
    await cri.remove(container)


async def test_unique_prefixes_of_ids_will_do(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    assert (await cri.pod_status(pod[:13])).id == pod
    container = await cri.run(pod[:13], container_config(image, sleeping()))
    short = container[:13]
    assert (await cri.status(short)).id == container
    assert (await cri.sh(short, "echo here")) == "here\n"
    await cri.stop(short)
    await cri.remove(short)
    await cri.stop_pod(pod[:13])
    await cri.remove_pod(pod[:13])
    assert await cri.pods(id=pod) == []


async def test_containers_are_filtered(cri: Cri, pod: str, image: str) -> None:
    other = await cri.run_pod()
    created = await cri.create(pod, container_config(image, ["true"], labels={"app": "f", "n": "0"}))
    running = await cri.run(pod, container_config(image, sleeping(), labels={"app": "f", "n": "1"}))
    exited = await cri.run(other, container_config(image, ["true"], labels={"app": "f", "n": "2"}))
    await cri.wait_exit(exited)

    async def ids(**wanted: object) -> list[str]:
        return [item.id for item in await cri.containers(**wanted)]

    def state(value: pb.ContainerState.ValueType) -> pb.ContainerStateValue:
        return pb.ContainerStateValue(state=value)

    labels = {"app": "f"}
    assert await ids(label_selector=labels) == [created, running, exited], "oldest first"
    assert await ids(label_selector=labels, state=state(pb.CONTAINER_CREATED)) == [created]
    assert await ids(label_selector=labels, state=state(pb.CONTAINER_RUNNING)) == [running]
    assert await ids(label_selector=labels, state=state(pb.CONTAINER_EXITED)) == [exited]
    assert await ids(label_selector=labels, state=state(pb.CONTAINER_UNKNOWN)) == []
    assert await ids(label_selector={"app": "f", "n": "1"}) == [running]
    assert await ids(pod_sandbox_id=other) == [exited]
    assert await ids(pod_sandbox_id=pod, label_selector=labels) == [created, running]
    assert await ids(id=running[:13]) == [running]
    assert await ids(id=running, pod_sandbox_id=other) == []


# what the process is given


@pytest.mark.parametrize(
    ("command", "args", "printed"),
    [
        ([], [], "entry cmd"),
        ([], ["arg"], "entry arg"),
        (["echo", "own"], [], "own"),
        (["echo", "own"], ["arg"], "own arg"),
    ],
)
async def test_command_and_args_against_entrypoint_and_cmd(
    cri: Cri, pod: str, registry: Registry, command: list[str], args: list[str], printed: str
) -> None:
    reference = registry.push("entrypoint", busybox().with_config(Entrypoint=["echo", "entry"], Cmd=["cmd"]))
    await cri.pull(reference)
    _, output = await cri.output(pod, container_config(reference, command, args=args))
    assert output == f"{printed}\n"


async def test_environment(cri: Cri, pod: str, registry: Registry) -> None:
    image = busybox().with_config(Env=["PATH=/bin:/image", "FROM_IMAGE=1", "BOTH=image", "NOTHING="])
    reference = registry.push("environment", image)
    await cri.pull(reference)
    envs = [("BOTH", "first"), ("BOTH", "own"), ("LINES", "a\nb"), ("SIGNS", "a=b $HOME 'q'"), ("NONE", "")]
    given = [pb.KeyValue(key=key, value=value.encode()) for key, value in envs]
    container = await cri.run(pod, container_config(reference, sleeping(), envs=given))
    found = (await cri.exec(container, ["cat", "/proc/self/environ"])).stdout.decode().split("\0")
    assert dict(item.split("=", 1) for item in found if item) == {
        "PATH": "/bin:/image",
        "FROM_IMAGE": "1",
        "BOTH": "own",
        "LINES": "a\nb",
        "SIGNS": "a=b $HOME 'q'",
        "NONE": "",
        "NOTHING": "",
        "HOME": "/root",
        "HOSTNAME": "shared",
    }


async def test_working_directory(cri: Cri, pod: str, image: str, registry: Registry) -> None:
    reference = registry.push("workdir", busybox().with_config(WorkingDir="/var/www"))
    await cri.pull(reference)
    for config, place in (
        (container_config(image, ["pwd"]), "/"),
        (container_config(reference, ["pwd"]), "/var/www"),
        (container_config(reference, ["pwd"], working_dir="/etc"), "/etc"),
        (container_config(reference, ["pwd"], working_dir="/made/for/it"), "/made/for/it"),
    ):
        _, output = await cri.output(pod, config)
        assert output == f"{place}\n"


@pytest.mark.parametrize(
    ("image_user", "context", "uid", "gid", "groups", "home"),
    [
        ("", {}, 0, 0, [0], "/root"),
        ("", {"run_as_user": 1000}, 1000, 0, [0], "/"),
        ("", {"run_as_user": 33}, 33, 33, [33, 4, 26], "/var/www"),
        ("", {"run_as_user": 33, "run_as_group": 7}, 33, 7, [7, 4, 26], "/var/www"),
        ("", {"run_as_username": "www-data"}, 33, 33, [33, 4, 26], "/var/www"),
        ("", {"run_as_username": "www-data", "run_as_group": 9}, 33, 9, [9, 4, 26], "/var/www"),
        ("www-data", {}, 33, 33, [33, 4, 26], "/var/www"),
        ("33:tape", {}, 33, 26, [26, 4], "/var/www"),
        ("4711:4712", {}, 4711, 4712, [4712], "/"),
        ("www-data", {"run_as_user": 0}, 0, 0, [0], "/root"),
        ("www-data", {"supplemental_groups": [77, 4]}, 33, 33, [33, 4, 26, 77], "/var/www"),
        (
            "www-data",
            {"supplemental_groups": [77], "supplemental_groups_policy": pb.Strict},
            33,
            33,
            [33, 77],
            "/var/www",
        ),
    ],
)
async def test_user(
    cri: Cri,
    pod: str,
    registry: Registry,
    image_user: str,
    context: dict[str, object],
    uid: int,
    gid: int,
    groups: list[int],
    home: str,
) -> None:
    reference = registry.push("user", busybox().with_config(User=image_user))
    await cri.pull(reference)
    wrapped = {
        key: pb.Int64Value(value=value) if isinstance(value, int) and key.startswith("run_as_") else value
        for key, value in context.items()
    }
    container = await cri.run(pod, container_config(reference, sleeping(), linux=security(**wrapped)))
    lines = (await cri.sh(container, "id -u; id -g; id -G; echo $HOME")).splitlines()
    assert lines[:2] == [str(uid), str(gid)] and lines[3] == home
    assert sorted(map(int, lines[2].split())) == sorted(groups)
    found = (await cri.status(container)).user.linux
    assert (found.uid, found.gid, sorted(found.supplemental_groups)) == (uid, gid, sorted(groups))


async def test_read_only_root(cri: Cri, pod: str, image: str) -> None:
    container = await cri.run(pod, container_config(image, sleeping(), linux=security(readonly_rootfs=True)))
    for path in ("/new", "/tmp/new", "/etc/new", "/etc/resolv.conf"):
        assert (await cri.exec(container, ["sh", "-c", f"echo x >> {path}"])).exit_code != 0, path
    await cri.sh(container, "echo x > /dev/shm/new && echo x > /dev/null")
    writable = await cri.run(pod, container_config(image, sleeping()))
    assert await cri.sh(writable, "echo x > /new; cat /new") == "x\n"


def mask(*numbers: int) -> int:
    """Capabilities by number as /proc shows them."""
    return sum(1 << number for number in numbers)


CHOWN, KILL, NET_BIND_SERVICE, NET_ADMIN, SYS_ADMIN, SYS_TIME = 0, 5, 10, 12, 21, 25


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ([], [], DEFAULT_CAPABILITIES),
        (["NET_ADMIN", "CAP_SYS_ADMIN"], [], DEFAULT_CAPABILITIES | mask(NET_ADMIN, SYS_ADMIN)),
        ([], ["CHOWN", "cap_kill"], DEFAULT_CAPABILITIES & ~mask(CHOWN, KILL)),
        ([], ["ALL"], 0),
        (["NET_BIND_SERVICE"], ["ALL"], mask(NET_BIND_SERVICE)),
        (["SYS_TIME"], ["SYS_TIME", "CHOWN"], DEFAULT_CAPABILITIES & ~mask(CHOWN)),
    ],
)
async def test_capabilities(cri: Cri, pod: str, image: str, add: list[str], drop: list[str], expected: int) -> None:
    change = pb.Capability(add_capabilities=add, drop_capabilities=drop)
    container = await cri.run(pod, container_config(image, sleeping(), linux=security(capabilities=change)))
    for pid in ("self", "$(pidof sh | tr ' ' '\\n' | tail -1)"):
        sets = dict(line.split() for line in (await cri.sh(container, f"grep ^Cap /proc/{pid}/status")).splitlines())
        for name in ("CapEff:", "CapPrm:", "CapBnd:"):
            assert int(sets[name], 16) == expected, (pid, name)
        assert int(sets["CapInh:"], 16) == int(sets["CapAmb:"], 16) == 0


async def test_all_capabilities_are_those_of_the_daemon(cri: Cri, pod: str, image: str) -> None:
    change = pb.Capability(add_capabilities=["ALL"])
    container = await cri.run(pod, container_config(image, sleeping(), linux=security(capabilities=change)))
    own = re.search(r"^CapBnd:\t(\S+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert own is not None
    assert (await cri.sh(container, "grep ^CapBnd /proc/self/status")).split()[1] == own[1]


async def test_users_other_than_root_have_no_capabilities_but_ambient_ones(cri: Cri, pod: str, image: str) -> None:
    change = pb.Capability(add_ambient_capabilities=["NET_BIND_SERVICE"])
    user = pb.Int64Value(value=1000)
    for capabilities, expected in ((None, 0), (change, mask(NET_BIND_SERVICE))):
        linux = security(run_as_user=user, capabilities=capabilities)
        container = await cri.run(pod, container_config(image, sleeping(), linux=linux))
        sets = dict(line.split() for line in (await cri.sh(container, "grep ^Cap /proc/self/status")).splitlines())
        assert [int(sets[name], 16) for name in ("CapEff:", "CapPrm:", "CapAmb:")] == [expected] * 3


async def test_no_new_privileges(cri: Cri, pod: str, image: str) -> None:
    for wanted in (False, True):
        linux = security(no_new_privs=wanted)
        _, output = await cri.output(
            pod, container_config(image, ["grep", "NoNewPrivs", "/proc/self/status"], linux=linux)
        )
        assert output.split() == ["NoNewPrivs:", str(int(wanted))]


async def test_masked_and_read_only_paths(cri: Cri, pod: str, image: str) -> None:
    linux = security(
        masked_paths=["/proc/meminfo", "/proc/bus", "/not/there"], readonly_paths=["/proc/sys", "/nowhere"]
    )
    container = await cri.run(pod, container_config(image, sleeping(), linux=linux))
    assert await cri.sh(container, "cat /proc/meminfo; ls /proc/bus") == ""
    denied = await cri.exec(container, ["sh", "-c", "echo x > /proc/sys/kernel/hostname"])
    assert denied.exit_code != 0 and b"Read-only" in denied.stderr


async def test_unprivileged_container_cannot_reach_the_host(cri: Cri, pod: str, image: str) -> None:
    container = await cri.run(pod, container_config(image, sleeping()))
    devices = set((await cri.sh(container, "ls /dev")).split())
    assert devices <= {
        "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
        "tty", "urandom", "zero",
    }  # fmt: skip
    for script in (
        "mount -t tmpfs x /tmp",
        "mknod /disk b 254 0 && cat /disk",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "mkdir /sys/fs/cgroup/memory/own",
        "hostname other",
    ):
        assert (await cri.exec(container, ["sh", "-c", script])).exit_code != 0, script


async def test_privileged_container(cri: Cri, image: str) -> None:
    linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(privileged=True))
    pod = await cri.run_pod(cri.pod_config(linux=linux))
    wanted = security(privileged=True, masked_paths=["/proc/meminfo"], readonly_paths=["/proc/sys"])
    container = await cri.run(pod, container_config(image, sleeping(), linux=wanted))
    own = re.search(r"^CapEff:\t(\S+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert own is not None
    assert (await cri.sh(container, "grep ^CapEff /proc/self/status")).split()[1] == own[1]
    await cri.sh(container, "mkdir /m && mount -t tmpfs x /m && umount /m")
    await cri.sh(container, "grep -q MemTotal /proc/meminfo && hostname other")
    host = {path.name for path in Path("/dev").iterdir() if path.is_block_device() or path.name == "kmsg"}
    assert host and host <= set((await cri.sh(container, "ls /dev")).split())
    assert " rw," in await cri.sh(container, "grep ' /sys ' /proc/mounts")


async def test_devices(cri: Cri, pod: str, image: str) -> None:
    devices = [
        pb.Device(container_path="/dev/mine", host_path="/dev/kmsg", permissions="r"),
        pb.Device(container_path="/dev/twin", host_path="/dev/zero", permissions="rw"),
    ]
    container = await cri.run(pod, container_config(image, sleeping(), devices=devices))
    assert await cri.sh(container, "head -c 3 /dev/twin | xxd -p") == "000000\n"
    numbers = os.stat("/dev/kmsg").st_rdev
    shown = (await cri.sh(container, "stat -c '%t %T' /dev/mine")).split()
    assert [int(number, 16) for number in shown] == [os.major(numbers), os.minor(numbers)]
    assert (await cri.exec(container, ["sh", "-c", "echo x > /dev/mine"])).exit_code != 0


# namespaces


async def inodes(cri: Cri, container: str) -> dict[str, str]:
    """The container's namespaces."""
    kinds = ("net", "pid", "ipc", "uts", "mnt")
    lines = (await cri.sh(container, "".join(f"readlink /proc/self/ns/{kind};" for kind in kinds))).splitlines()
    return dict(zip(kinds, lines, strict=True))


def host_inode(kind: str) -> str:
    """The namespace of this process, which is the node's."""
    return os.readlink(f"/proc/self/ns/{kind}")


async def test_containers_share_the_namespaces_of_their_pod(cri: Cri, pod: str, image: str) -> None:
    first, second = [await cri.run(pod, container_config(image, sleeping())) for _ in range(2)]
    one, two = await inodes(cri, first), await inodes(cri, second)
    for kind in ("net", "pid", "ipc", "uts"):
        assert one[kind] == two[kind] != host_inode(kind), kind
    assert len({one["mnt"], two["mnt"], host_inode("mnt")}) == 3
    assert "sleep 600" in await cri.sh(first, "ps"), "both are in one PID namespace"
    other = await cri.run(await cri.run_pod(), container_config(image, sleeping()))
    three = await inodes(cri, other)
    assert all(one[kind] != three[kind] for kind in one)


async def test_pid_namespace_of_a_container_s_own(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(cri.pod_config(linux=namespaces(pid=pb.CONTAINER)))
    assert (await cri.pod_status(pod)).linux.namespaces.options.pid == pb.CONTAINER
    first, second = [await cri.run(pod, container_config(image, sleeping())) for _ in range(2)]
    one, two = await inodes(cri, first), await inodes(cri, second)
    assert len({one["pid"], two["pid"], host_inode("pid")}) == 3
    assert one["net"] == two["net"] and one["ipc"] == two["ipc"]
    assert (await cri.sh(first, "cat /proc/1/cmdline")).startswith("sh\0-c\0trap")


async def test_pid_namespace_of_another_container(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(cri.pod_config(linux=namespaces(pid=pb.CONTAINER)))
    target = await cri.run(pod, container_config(image, sleeping(4321)))
    options = pb.NamespaceOption(pid=pb.TARGET, target_id=target)
    debug = await cri.run(pod, container_config(image, sleeping(), linux=security(namespace_options=options)))
    assert (await inodes(cri, debug))["pid"] == (await inodes(cri, target))["pid"]
    assert "sleep 4321" in await cri.sh(debug, "ps")


async def test_namespaces_of_the_node(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(cri.pod_config(linux=namespaces(network=pb.NODE, pid=pb.NODE, ipc=pb.NODE)))
    status = await cri.pod_status(pod)
    assert status.network.ip == ""
    assert status.linux.namespaces.options == pb.NamespaceOption(network=pb.NODE, pid=pb.NODE, ipc=pb.NODE)
    container = await cri.run(pod, container_config(image, sleeping()))
    found = await inodes(cri, container)
    for kind in ("net", "pid", "ipc", "uts"):
        assert found[kind] == host_inode(kind), kind
    assert (await cri.sh(container, "hostname")).strip() == os.uname().nodename
    assert str(os.getpid()) in (await cri.sh(container, "ls /proc")).split()


async def test_shared_memory_of_a_pod(cri: Cri, pod: str, image: str) -> None:
    first, second = [await cri.run(pod, container_config(image, sleeping())) for _ in range(2)]
    await cri.sh(first, "echo hello > /dev/shm/message")
    assert await cri.sh(second, "cat /dev/shm/message") == "hello\n"
    size, kind = (await cri.sh(second, "df -m /dev/shm | tail -1; grep ' /dev/shm ' /proc/mounts")).splitlines()
    assert size.split()[1] == "64" and kind.split()[2] == "tmpfs"
    assert await cri.sh(second, "stat -c %a /dev/shm") == "1777\n"
    assert not Path("/dev/shm/message").exists()


async def test_host_name_and_resolver(cri: Cri, image: str) -> None:
    dns = pb.DNSConfig(
        servers=["192.0.2.53", "2001:db8::53"], searches=["a.test", "b.test"], options=["ndots:5", "edns0"]
    )
    pod = await cri.run_pod(cri.pod_config(hostname="web-0", dns_config=dns))
    container = await cri.run(pod, container_config(image, sleeping()))
    assert await cri.sh(container, "hostname; cat /etc/hostname; echo $HOSTNAME") == "web-0\nweb-0\nweb-0\n"
    assert await cri.sh(container, "cat /etc/resolv.conf") == (
        "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch a.test b.test\noptions ndots:5 edns0\n"
    )


async def test_pod_without_dns_configuration_has_the_resolver_of_the_node(cri: Cri, image: str) -> None:
    config = cri.pod_config()
    container = await cri.run(await cri.run_pod(config), container_config(image, sleeping()))
    assert await cri.sh(container, "cat /etc/resolv.conf") == Path("/etc/resolv.conf").read_text()
    assert await cri.sh(container, "hostname") == f"{config.metadata.name}\n"


async def test_sysctls(cri: Cri, image: str) -> None:
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1", "net/core/somaxconn": "999"}
    pod = await cri.run_pod(cri.pod_config(linux=pb.LinuxPodSandboxConfig(sysctls=sysctls)))
    container = await cri.run(pod, container_config(image, sleeping()))
    read = "cd /proc/sys && cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced net/core/somaxconn"
    assert await cri.sh(container, read) == "80\n1\n999\n"


# mounts


async def test_mounts(cri: Cri, pod: str, image: str, tmp_path: Path) -> None:
    """Writable and read-only, a directory and a file, behind a symlink, and inside each other in any order."""
    for name in ("rw", "ro", "outer", "inner", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.1 named.test\n")
    wanted = [
        pb.Mount(container_path="/outer/below/inner", host_path=str(tmp_path / "inner")),
        pb.Mount(container_path="/outer", host_path=str(tmp_path / "outer")),
        pb.Mount(container_path="/rw", host_path=str(tmp_path / "rw")),
        pb.Mount(container_path="/ro/", host_path=str(tmp_path / "ro"), readonly=True),
        pb.Mount(container_path="/link", host_path=str(tmp_path / "link")),
        pb.Mount(container_path="/etc/hosts", host_path=str(hosts)),
    ]
    (tmp_path / "outer" / "below" / "inner").mkdir(parents=True)
    container = await cri.run(pod, container_config(image, sleeping(), mounts=wanted))
    assert await cri.sh(container, "cat /outer/below/inner/here /outer/here /rw/here /ro/here /link/here") == (
        "innerouterrwroreal"
    )
    await cri.sh(container, "echo new > /rw/new && echo new > /link/new")
    assert (tmp_path / "rw" / "new").read_text() == (tmp_path / "real" / "new").read_text() == "new\n"
    denied = await cri.exec(container, ["touch", "/ro/new"])
    assert denied.exit_code != 0 and b"Read-only" in denied.stderr
    assert await cri.sh(container, "cat /etc/hosts") == "192.0.2.1 named.test\n"
    await cri.sh(container, "echo more >> /etc/hosts")
    assert hosts.read_text() == "192.0.2.1 named.test\nmore\n"
    assert list((await cri.status(container)).mounts) == wanted
    await cri.remove(container)
    assert hosts.read_text() == "192.0.2.1 named.test\nmore\n"
    assert (tmp_path / "inner" / "here").exists() and (tmp_path / "link").is_symlink()


async def test_mount_in_place_of_the_pod_s_own_file(cri: Cri, pod: str, image: str, tmp_path: Path) -> None:
    own = tmp_path / "resolv.conf"
    own.write_text("nameserver 203.0.113.9\n")
    mount = pb.Mount(container_path="/etc/resolv.conf", host_path=str(own), readonly=True)
    _, output = await cri.output(pod, container_config(image, ["cat", "/etc/resolv.conf"], mounts=[mount]))
    assert output == "nameserver 203.0.113.9\n"


# output


async def test_log_lines(cri: Cri, pod: str, image: str) -> None:
    config = container_config(image, ["sh", "-c", "echo out; echo err >&2; echo; printf 'no end'"])
    status = await cri.wait_exit(await cri.run(pod, config))
    path = Path(status.log_path)
    assert path == cri.daemon.logs / "shared" / config.log_path
    text = path.read_text()
    assert all(re.match(r"^\S+ (stdout|stderr) [PF] ", line) for line in text.splitlines())
    lines = log_lines(path)
    stamps = [line.stamp for line in lines]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)", stamp) for stamp in stamps)
    assert [line.text for line in lines if line.stream == "stderr"] == [b"err"]
    assert b"".join(line.text + b"|" for line in lines if line.stream == "stdout") in (
        b"out||no end|",
        b"out||no end||",
    )


async def test_long_lines_and_bytes_come_through(cri: Cri, pod: str, image: str) -> None:
    script = "head -c 50000 /dev/zero | tr '\\0' x; echo; printf '\\377\\376\\n'"
    status = await cri.wait_exit(await cri.run(pod, container_config(image, ["sh", "-c", script])))
    lines = log_lines(Path(status.log_path))
    assert any(line.partial for line in lines)
    data = b"".join(line.text + (b"" if line.partial else b"\n") for line in lines)
    assert data == b"x" * 50000 + b"\n\xff\xfe\n"


async def test_container_without_a_log(cri: Cri, pod: str, image: str) -> None:
    config = container_config(image, ["echo", "x"])
    config.log_path = ""
    status = await cri.wait_exit(await cri.run(pod, config))
    assert (status.exit_code, status.log_path) == (0, "")


async def test_terminal(cri: Cri, pod: str, image: str) -> None:
    config = container_config(image, ["sh", "-c", "test -t 0 && test -t 1 && test -t 2 && echo $TERM; echo err >&2"])
    config.tty = True
    status = await cri.wait_exit(await cri.run(pod, config))
    lines = log_lines(Path(status.log_path))
    assert [line.stream for line in lines] == ["stdout", "stdout"]
    assert [line.text.rstrip(b"\r") for line in lines] == [b"xterm", b"err"]


async def test_without_stdin_there_is_nothing_to_read(cri: Cri, pod: str, image: str) -> None:
    status, output = await cri.output(pod, container_config(image, ["sh", "-c", "cat; echo end"]))
    assert (status.exit_code, output) == (0, "end\n")


# ExecSync


@pytest.fixture(scope="module")
def sleeper(daemon: Daemon, pod: str, image: str) -> str:
    """A running container for commands."""
    with daemon.stubs() as (runtime, _):
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=container_config(image, sleeping(7777)))
        made = runtime.CreateContainer(request, timeout=30).container_id
        runtime.StartContainer(pb.StartContainerRequest(container_id=made), timeout=30)
    return made


async def is_running(cri: Cri, container: str, command: str, *, expected: bool = True) -> bool:
    """Whether ``command`` runs in the container, or, as expected, does not."""
    return (command in await cri.sh(container, "ps")) is expected


async def test_exec_tells_outputs_and_exit_code(cri: Cri, sleeper: str) -> None:
    done = await cri.exec(sleeper, ["sh", "-c", "printf out; printf err >&2; exit 7"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"out", b"err", 7)
    done = await cri.exec(sleeper, ["printf", "\\377\\000a"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"\xff\x00a", b"", 0)
    assert (await cri.exec(sleeper, ["sh", "-c", "kill -9 $$"])).exit_code == 137


async def test_exec_without_timeout(cri: Cri, sleeper: str) -> None:
    assert (await cri.exec(sleeper, ["sh", "-c", "sleep 0.5; echo x"], 0)).stdout == b"x\n"


async def test_exec_has_the_context_of_the_container(cri: Cri, pod: str, image: str) -> None:
    linux = security(run_as_username="www-data", capabilities=pb.Capability(drop_capabilities=["ALL"]))
    envs = [pb.KeyValue(key="GREETING", value=b"hi")]
    container = await cri.run(pod, container_config(image, sleeping(), linux=linux, envs=envs, working_dir="/var"))
    assert await cri.sh(container, "id -un; pwd; echo $GREETING") == "www-data\n/var\nhi\n"
    status = await cri.sh(container, "cat /proc/self/status; cat /proc/self/oom_score_adj")
    assert "CapBnd:\t0000000000000000" in status


async def test_exec_that_takes_too_long_is_ended(cri: Cri, sleeper: str) -> None:
    began = time.monotonic()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "timed out"):
        await cri.exec(sleeper, ["sh", "-c", "sleep 4242 & sleep 4242"], 1)
    assert 0.9 < time.monotonic() - began < 3
    await until(lambda: is_running(cri, sleeper, "sleep 4242", expected=False), "the end of the command")


async def test_exec_is_ended_when_its_caller_leaves(cri: Cri, sleeper: str) -> None:
    """The kubelet's own deadline for a probe may come first."""
    call = cri.runtime.ExecSync(pb.ExecSyncRequest(container_id=sleeper, cmd=["sleep", "4343"]))
    await until(lambda: is_running(cri, sleeper, "sleep 4343"), "the beginning of the command")
    call.cancel()
    await until(lambda: is_running(cri, sleeper, "sleep 4343", expected=False), "the end of the command")


async def test_exec_output_is_capped(cri: Cri, sleeper: str) -> None:
    """What fits one message is returned, the rest is dropped; the command does not block."""
    for stream in ("", " >&2"):
        done = await cri.exec(sleeper, ["sh", "-c", f"head -c 20000000 /dev/zero{stream}; exit 5"])
        assert done.exit_code == 5
        assert (16 << 20) - 65536 <= len(done.stdout) + len(done.stderr) <= 16 << 20


async def test_exec_does_not_wait_for_children_that_keep_the_output(cri: Cri, pod: str, image: str) -> None:
    container = await cri.run(pod, container_config(image, sleeping()))
    began = time.monotonic()
    done = await cri.exec(container, ["sh", "-c", "sleep 4444 & echo started"])
    assert (done.stdout, done.exit_code) == (b"started\n", 0)
    assert time.monotonic() - began < 2
    assert "sleep 4444" in await cri.sh(container, "ps"), "it is the container's now"


async def test_exec_of_what_is_not_there(cri: Cri, sleeper: str) -> None:
    with refused(grpc.StatusCode.INTERNAL, "no-such-program"):
        await cri.exec(sleeper, ["no-such-program"])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cmd"):
        await cri.exec(sleeper, [])
    with refused(grpc.StatusCode.NOT_FOUND, "0123456789abcdef"):
        await cri.exec("0123456789abcdef", ["true"])


async def test_exec_needs_a_running_container(cri: Cri, pod: str, image: str) -> None:
    container = await cri.create(pod, container_config(image, sleeping()))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "not running"):
        await cri.exec(container, ["true"])
    await cri.start(container)
    assert (await cri.exec(container, ["true"])).exit_code == 0
    await cri.stop(container)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, container, "not running"):
        await cri.exec(container, ["true"])


async def test_many_commands_at_once(cri: Cri, sleeper: str) -> None:
    done = await asyncio.gather(*(cri.exec(sleeper, ["sh", "-c", f"echo {n}; exit {n}"]) for n in range(12)))
    assert [(item.stdout, item.exit_code) for item in done] == [(f"{n}\n".encode(), n) for n in range(12)]


# the other runtime


HYBRID = Path("/sys/fs/cgroup/unified")


def without_unified_hierarchy() -> list[str]:
    """How to start a daemon for crun.

    crun 1.8 takes a host with version 1 hierarchies and a version 2 one that has controllers for a broken one and
    refuses it. Hosts like that are made for tests only; the daemon gets a mount namespace in which the version 2
    hierarchy is not there.
    """
    controllers = HYBRID / "cgroup.controllers"
    if not (controllers.exists() and controllers.read_text().split()):
        return []
    return ["unshare", "-m", "sh", "-c", f'umount {HYBRID}; exec "$@"', "sh"]


async def test_crun(make_daemon: MakeDaemon, image: str) -> None:
    daemon = make_daemon({"runtime": {"default": "crun"}}, prefix=without_unified_hierarchy())
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as cri:
        await cri.pull(image)
        async with unchanged(daemon):
            named = await cri.run_pod(handler="crun")
            assert (await cri.pod_status(named)).runtime_handler == "crun"
            failed = await cri.wait_exit(await cri.run(named, container_config(image, ["sh", "-c", "exit 3"])))
            assert (failed.exit_code, failed.reason) == (3, "Error")
            await cri.remove_pod(named)

            pod = await cri.run_pod()
            container = await cri.run(pod, container_config(image, sleeping()))
            done = await cri.exec(container, ["sh", "-c", "echo out; echo err >&2; exit 7"])
            assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 7)
            assert (await cri.exec(container, ["sh", "-c", "kill -9 $$"])).exit_code == 137
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
                await cri.exec(container, ["sleep", "60"], 1)
            with refused(grpc.StatusCode.INTERNAL, "no-such-program"):
                await cri.exec(container, ["no-such-program"])
            assert f"CapEff:\t{DEFAULT_CAPABILITIES:016x}" in await cri.sh(container, "cat /proc/self/status")
            await cri.stop(container)
            assert (await cri.status(container)).exit_code == 0
            killed = await stubborn(cri, pod, image)
            await cri.stop(killed, 1)
            assert (await cri.status(killed)).exit_code == 137
            await cri.remove_pod(pod)
