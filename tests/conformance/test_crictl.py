"""The whole life of a pod by crictl, the tool that everybody debugs nodes with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from root.harness.daemon import Daemon
from root.harness.images import busybox
from root.harness.leaks import assert_no_leaks, take
from root.harness.registry import Registry

CHECKOUT = Path(__file__).resolve().parents[2]
Crictl = Callable[..., str]


def program() -> str:
    """crictl: what the checkout has brought, else the node's; a missing one is a failure."""
    own = CHECKOUT / ".cache" / "bin" / "crictl"
    found = str(own) if own.exists() else shutil.which("crictl")
    assert found, "crictl is neither in .cache/bin nor on PATH"
    return found


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A real registry with busybox in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    registry = Registry(tmp_path / "registry")
    try:
        registry.start()
        registry.push("busybox", busybox())
        yield registry
    finally:
        registry.stop()


@pytest.fixture
def daemon(registry: Registry) -> Iterator[Daemon]:
    """A running daemon."""
    daemon = Daemon([registry.host])
    try:
        daemon.start()
        yield daemon
        print(daemon.log())
    finally:
        daemon.close()


@pytest.fixture
def crictl(daemon: Daemon) -> Crictl:
    """Runs crictl against the daemon: what it prints."""
    endpoint = f"unix://{daemon.socket}"
    base = [program(), "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "30s"]

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run([*base, *arguments], check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, f"crictl {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


def write(path: Path, content: Any) -> str:
    """A file for crictl."""
    path.write_text(json.dumps(content))
    return str(path)


def node_is_ready(crictl: Crictl) -> None:
    """What it says of itself."""
    assert "crishim" in crictl("version")
    info = json.loads(crictl("info"))
    assert {item["type"]: item["status"] for item in info["status"]["conditions"]} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }


def image_is_pulled(crictl: Crictl, daemon: Daemon, image: str) -> None:
    """Pull, and look at what is there."""
    assert busybox().id in crictl("pull", image)
    (listed,) = json.loads(crictl("images", "-o", "json"))["images"]
    assert listed["id"] == busybox().id and listed["repoTags"] == [image]
    assert json.loads(crictl("inspecti", image))["status"]["id"] == busybox().id
    assert busybox().id.removeprefix("sha256:")[:13] in crictl("images")
    usage = json.loads(crictl("imagefsinfo", "-o", "json"))["status"]["imageFilesystems"][0]
    assert usage["fsId"]["mountpoint"] == str(daemon.root) and int(usage["usedBytes"]["value"]) > 100_000


def test_life_of_a_pod(crictl: Crictl, daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    image = f"{registry.host}/busybox:latest"
    pod_file = write(
        tmp_path / "pod.json",
        {
            "metadata": {"name": "web", "namespace": "default", "uid": "u1", "attempt": 1},
            "log_directory": str(daemon.logs),
            "labels": {"app": "web"},
            "linux": {},
        },
    )
    script = "echo to-stdout; echo to-stderr >&2; trap 'exit 0' TERM; sleep 600 & wait $!"
    container_file = write(
        tmp_path / "container.json",
        {
            "metadata": {"name": "main"},
            "image": {"image": image},
            "command": ["sh", "-c", script],
            "log_path": "main.log",
            "linux": {},
        },
    )
    before = take(daemon)

    node_is_ready(crictl)
    image_is_pulled(crictl, daemon, image)
    pod = crictl("runp", pod_file).strip()
    container = crictl("create", pod, container_file, pod_file).strip()
    assert "Created" in crictl("ps", "-a")
    assert crictl("start", container).strip() == container

    assert crictl("exec", "-s", container, "cat", "/proc/sys/kernel/hostname").split() == ["web"]
    assert "to-exec" in crictl("exec", "-s", container[:13], "sh", "-c", "echo to-exec")
    crictl("exec", "-s", container, "sh", "-c", "exit 3", code=1)
    _until(lambda: "to-stderr" in (daemon.logs / "main.log").read_text())
    assert crictl("logs", container) == "to-stdout\n"

    shown = crictl("ps")
    assert container[:13] in shown and "Running" in shown and "main" in shown
    assert [item["id"] for item in json.loads(crictl("ps", "-q", "-o", "json"))["containers"]] == [container]
    shown = crictl("pods")
    assert pod[:13] in shown and "Ready" in shown and "web" in shown
    assert crictl("pods", "-q", "--label", "app=web").strip() == pod
    assert crictl("pods", "-q", "--label", "app=other").strip() == ""

    inspected = json.loads(crictl("inspect", container))
    assert inspected["status"]["state"] == "CONTAINER_RUNNING"
    assert inspected["info"]["runtimeSpec"]["process"]["args"] == ["sh", "-c", script]
    assert Path(f"/proc/{inspected['info']['pid']}").exists()
    inspected = json.loads(crictl("inspectp", pod))
    assert inspected["status"]["state"] == "SANDBOX_READY"
    assert inspected["status"]["network"]["ip"].startswith(daemon.subnet.removesuffix("0/24"))

    assert crictl("stop", "--timeout", "10", container).strip() == container
    assert "Exited" in crictl("ps", "-a") and container[:13] not in crictl("ps")
    assert json.loads(crictl("inspect", container))["status"]["exitCode"] == 0
    crictl("rmi", image, code=1)  # it is in use
    assert crictl("rm", container).strip() == container
    assert "Stopped sandbox" in crictl("stopp", pod)
    assert "NotReady" in crictl("pods")
    assert "Removed sandbox" in crictl("rmp", pod)
    assert crictl("pods", "-q") == "" == crictl("ps", "-a", "-q")
    crictl("inspectp", pod, code=1)

    assert "Deleted" in crictl("rmi", image)
    assert json.loads(crictl("images", "-o", "json"))["images"] == []
    assert_no_leaks(daemon, before)


def test_run_in_one_step(crictl: Crictl, daemon: Daemon, registry: Registry, tmp_path: Path) -> None:
    """``crictl run`` pulls, runs and starts; ``rmp -fa`` clears everything away."""
    image = f"{registry.host}/busybox:latest"
    pod_file = write(
        tmp_path / "pod.json",
        {"metadata": {"name": "one", "namespace": "default", "uid": "u2"}, "log_directory": str(daemon.logs)},
    )
    container_file = write(
        tmp_path / "container.json",
        {"metadata": {"name": "c"}, "image": {"image": image}, "command": ["sleep", "600"], "log_path": "c.log"},
    )
    crictl("pull", image)
    before = take(daemon)
    container = crictl("run", container_file, pod_file).strip()
    assert json.loads(crictl("inspect", container))["status"]["state"] == "CONTAINER_RUNNING"
    crictl("rmp", "--force", "--all")
    assert crictl("ps", "-a", "-q") == ""
    assert_no_leaks(daemon, before)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
