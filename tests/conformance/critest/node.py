"""The runtime under test: a daemon of our own in namespaces of its own, or what serves a given socket."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from root.harness.daemon import Daemon

from crishim.cri.api import api_pb2 as pb
from crishim.cri.api.api_pb2_grpc import RuntimeServiceStub
from crishim.host import libc

from . import images
from .programs import Missing

_UNIFIED = Path("/sys/fs/cgroup/unified")
_NAMESPACE = "cri-test-namespace"  # critest's own prefix: framework.DefaultNamespacePrefix
_CALL_SECONDS = 60.0
_SEGMENT_BYTES = "1048576"


def isolate(handler: str) -> None:
    """Give this process, and all that it starts, a network, mounts and System V IPC of its own.

    critest uses fixed host ports, makes mounts and shared memory segments and forgets some; CNI plugins turn
    forwarding on and leave chains in the packet filter. All that is gone with the last process in here, and
    nothing collides with a kubelet or another test on this host. Nothing in here reaches another host either.
    """
    libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWNET | libc.CLONE_NEWIPC)
    libc.mount("", "/", "", libc.MS_REC | libc.MS_PRIVATE)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if handler == "crun" and _has_controllers(_UNIFIED):
        # crun refuses a hybrid host whose version 2 hierarchy has controllers ("cgroups in hybrid mode not supported,
        # drop all controllers from cgroupv2"). Without the mount, here only, it sees a version 1 host.
        libc.umount(str(_UNIFIED), libc.MNT_DETACH)


def _has_controllers(mount: Path) -> bool:
    try:
        return bool((mount / "cgroup.controllers").read_text().strip())
    except OSError:
        return False


@contextlib.contextmanager
def own_daemon(handler: str, port: int, keep: Callable[[str], None]) -> Iterator[str]:
    """A crishim daemon that pulls from the registry on ``port``; the value is its socket.

    In the end all that it made is removed, and ``keep`` gets its log.
    """
    # setsid: an interrupt from the terminal is for us, who need the daemon to remove its pods.
    daemon = Daemon(settings={"runtime": {"default": handler}}, prefix=("setsid",))
    daemon.registries_conf.write_text(images.registries_conf(port))
    try:
        _start(daemon)
        yield str(daemon.socket)
        if not daemon.alive:
            print("hack/conformance: the daemon died", file=sys.stderr)
            _start(daemon)  # what it left is best removed by its successor
    finally:
        keep(daemon.log())
        daemon.close()


def _start(daemon: Daemon) -> None:
    try:
        daemon.start()
    except AssertionError as err:
        raise Missing(str(err)) from None


@contextlib.contextmanager
def given_runtime(endpoint: str) -> Iterator[str]:
    """The runtime on a socket; critest's pods on it are removed in the end, its images stay."""
    path, before = endpoint.removeprefix("unix://"), _segments()
    try:
        yield path
    finally:
        with contextlib.suppress(grpc.RpcError):
            remove_pods(path)
        for identifier in _segments() - before:
            subprocess.run(["ipcrm", "-m", identifier], check=False)


def _segments() -> set[str]:
    """The unused shared memory segments of the size that the suite's HostIpc specs make and leave."""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return {fields[1] for fields in lines if fields[3] == _SEGMENT_BYTES and fields[6] == "0"}


def remove_pods(path: str) -> None:
    """Remove the pods that critest made."""
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = RuntimeServiceStub(channel)
        for pod in stub.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=_CALL_SECONDS).items:
            if pod.metadata.namespace.startswith(_NAMESPACE):
                stub.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=_CALL_SECONDS)
                stub.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=_CALL_SECONDS)
