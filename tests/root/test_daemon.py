"""The daemon as a process: how it starts and ends, what it says of itself, and that every method answers."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import re
import socket
import stat
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

import crishim
from crishim.cri.api import api_pb2 as pb
from crishim.cri.server import IMAGE_VERBS, RUNTIME_VERBS
from crishim.cri.stream_verbs import STREAM_VERBS
from root.harness.client import Cri, connect, container_config, refused
from root.harness.daemon import CGROUPS, Daemon
from root.harness.leaks import unchanged
from root.harness.registry import free_port

from .conftest import MakeDaemon


def test_life_of_a_process(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.launch()
    assert daemon.wait_ready() == f"serving CRI v1 on unix://{daemon.socket}\n"
    found = daemon.socket.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o660
    assert (pwd.getpwuid(found.st_uid).pw_name, grp.getgrgid(found.st_gid).gr_name) == ("root", "root")
    for path, mode in ((daemon.root, 0o700), (daemon.state, 0o711), (daemon.root / "crishim.db", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert daemon.terminate() == 0
    daemon.start()
    assert daemon.terminate() == 0


def test_systemd_is_told(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(daemon.base / "notify"))
        notify.settimeout(10)
        daemon.env["NOTIFY_SOCKET"] = str(daemon.base / "notify")
        daemon.start()
        assert notify.recv(4096) == b"READY=1"
        assert daemon.socket.exists(), "it is ready when it says so"
        assert daemon.terminate() == 0
        assert notify.recv(4096) == b"STOPPING=1"


def test_systemd_socket_that_is_gone(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.env["NOTIFY_SOCKET"] = str(daemon.base / "nobody")
    daemon.start()
    assert daemon.terminate() == 0


def test_flags_count_more_than_the_file(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    other = daemon.base / "other"
    daemon.launch("--api-listen", str(other), "--log-format", "json", "--log-level", "info")
    assert daemon.wait_ready() == f"serving CRI v1 on unix://{other}\n"
    assert other.exists() and not daemon.socket.exists()
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    assert lines and all(line["level"] in ("info", "warning") for line in lines)


def test_drop_in_counts_more_than_the_file(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    folder = Path(f"{daemon.config_file}.d")
    folder.mkdir()
    (folder / "10-socket.toml").write_text(f'[api]\nlisten = "{daemon.base}/first"\n')
    (folder / "20-socket.toml").write_text(f'[api]\nlisten = "{daemon.base}/second"\n')
    daemon.launch()
    assert daemon.wait_ready() == f"serving CRI v1 on unix://{daemon.base}/second\n"


def test_metrics(make_daemon: MakeDaemon, image: str) -> None:
    daemon = make_daemon()
    address = f"127.0.0.1:{free_port()}"
    daemon.start("--metrics-listen", address)
    daemon.pull(image)
    with daemon.stubs() as (runtime, _):
        runtime.Version(pb.VersionRequest())
        with pytest.raises(grpc.RpcError):
            runtime.StartContainer(pb.StartContainerRequest(container_id="unknown"))
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['crishim_calls_total{code="OK",method="Version"}'] == "1.0"
    assert values['crishim_calls_total{code="NOT_FOUND",method="StartContainer"}'] == "1.0"
    assert values['crishim_call_seconds_count{method="PullImage"}'] == "1.0"
    assert float(values["crishim_pulled_bytes_total"]) > 100_000
    assert float(values["crishim_operations"]) == 0


async def test_version(cri: Cri) -> None:
    answer = await cri.runtime.Version(pb.VersionRequest(version="v1"))
    assert (answer.version, answer.runtime_name, answer.runtime_api_version) == ("0.1.0", "crishim", "v1")
    assert answer.runtime_version == crishim.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", answer.runtime_version)


async def test_status(cri: Cri) -> None:
    answer = await cri.runtime.Status(pb.StatusRequest(verbose=True))
    conditions = {item.type: item for item in answer.status.conditions}
    assert set(conditions) == {"RuntimeReady", "NetworkReady"}
    assert all(item.status and not item.reason and not item.message for item in conditions.values())
    assert {"", "runc"} <= {item.name for item in answer.runtime_handlers}
    assert answer.features.supplemental_groups_policy
    assert json.loads(answer.info["config"])["root"] == str(cri.daemon.root)
    assert not (await cri.runtime.Status(pb.StatusRequest())).info


async def test_status_without_a_runtime(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"runtime": {"handlers": {"runc": {"path": "/no/such/runc"}}}})
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as cri:
        answer = await cri.runtime.Status(pb.StatusRequest())
        (ready,) = [item for item in answer.status.conditions if item.type == "RuntimeReady"]
        assert not ready.status and ready.reason and "/no/such/runc" in ready.message


async def test_cgroup_driver(cri: Cri) -> None:
    driver = (await cri.runtime.RuntimeConfig(pb.RuntimeConfigRequest())).linux.cgroup_driver
    assert driver == (pb.SYSTEMD if Path("/run/systemd/system").is_dir() else pb.CGROUPFS)
    assert CGROUPS.is_dir()


async def test_runtime_config_without_a_pod_cidr(cri: Cri) -> None:
    """The kubelet sends one as soon as the node exists."""
    await cri.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest())


async def test_verbose_info_of_pods_and_containers(cri: Cri, image: str) -> None:
    """What ``crictl inspect`` and ``inspectp`` print: whole, and without credentials."""
    pod = await cri.run_pod()
    container = await cri.run(pod, container_config(image, ["sleep", "60"]))
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    shown = json.loads((await cri.runtime.PodSandboxStatus(request)).info["info"])
    assert shown["runtimeHandler"] == "runc" and shown["cniResult"]["ips"]
    assert any(item["step"] == "pod network" for item in shown["timeline"])
    status = await cri.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container, verbose=True))
    shown = json.loads(status.info["info"])
    assert shown["sandboxID"] == pod and shown["runtimeSpec"]["process"]["args"] == ["sleep", "60"]
    assert Path(f"/proc/{shown['pid']}/cmdline").read_bytes() == b"sleep\x0060\0"


# every method


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    """All methods of both services with their paths."""
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            yield f"/{service.full_name}/{method.name}", method


def is_built(method: MethodDescriptor) -> bool:
    """Whether this version carries the method out."""
    tables: tuple[Any, ...] = (RUNTIME_VERBS, IMAGE_VERBS, STREAM_VERBS)
    return any(method.name in table for table in tables)


async def ask(channel: grpc.aio.Channel, path: str, method: MethodDescriptor) -> None:
    """Send an empty request and wait for the end of the answer."""
    request = GetMessageClass(method.input_type)().SerializeToString()
    if method.server_streaming:
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
        async for _ in stream(request, timeout=0.5):
            pass
        return
    single: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    await single(request, timeout=10)


@pytest.mark.parametrize(("path", "method"), [pytest.param(*item, id=item[1].name) for item in methods()])
async def test_every_method_answers_an_empty_request(cri: Cri, path: str, method: MethodDescriptor) -> None:
    """With an answer, with what is missing in the request, or with the word that it is not supported."""
    async with grpc.aio.insecure_channel(cri.daemon.target) as channel, unchanged(cri.daemon):
        if not is_built(method):
            with refused(grpc.StatusCode.UNIMPLEMENTED, method.name):
                await ask(channel, path, method)
            return
        try:
            await ask(channel, path, method)
        except grpc.aio.AioRpcError as err:
            endless = method.name == "GetContainerEvents" and err.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert endless or err.code() is grpc.StatusCode.INVALID_ARGUMENT, err
            assert not str(err.details()).startswith("unexpected")


async def test_every_method_of_the_protocol_is_served(cri: Cri) -> None:
    names = {method.name for _, method in methods()}
    built = {method.name for _, method in methods() if is_built(method)}
    assert set(RUNTIME_VERBS) | set(IMAGE_VERBS) | set(STREAM_VERBS) == built <= names
    assert os.path.exists(cri.daemon.socket)


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """One that has started with the defaults wherever possible."""
    daemon = make_module_daemon()
    daemon.start()
    daemon.pull(image)
    return daemon
