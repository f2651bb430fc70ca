"""Running CNI plugins: small scripts that write down what they were given stand for real ones."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crishim.cni.config import NetworkConfig, parse
from crishim.cni.network import Attachment, Networks
from crishim.config.settings import NetworkSettings
from crishim.errors import ConfigError, CrishimError, DeadlineExceeded, HostFailure
from crishim.observe.timeline import Timeline


class Node:
    """A folder of plugins, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.conf = folder / "net.d"
        self.records = folder / "records"
        for path in (self.bin, self.conf, self.records):
            path.mkdir()

    def plugin(self, name: str, body: str = "") -> None:
        """A script that records its call, then does ``body``."""
        record = f"{self.records}/$CNI_COMMAND-{name}"
        script = self.bin / name
        script.write_text(
            f'#!/bin/sh\necho "$CNI_COMMAND {name}" >> {self.records}/order\n'
            f"env > {record}.env\ncat > {record}.stdin\n{body}\n"
        )
        script.chmod(0o755)

    def answering(self, name: str, result: Any) -> None:
        """A script that answers ADD with ``result``."""
        self.plugin(name, f"[ $CNI_COMMAND = ADD ] && cat <<'END'\n{json.dumps(result)}\nEND\nexit 0")

    def networks(self, timeout: float = 20.0) -> Networks:
        """The network with these plugins."""
        return Networks(NetworkSettings(str(self.conf), [str(self.bin)], timeout))

    def order(self) -> list[str]:
        """All calls so far."""
        return (self.records / "order").read_text().splitlines()

    def stdin(self, command: str, name: str) -> Any:
        """What a plugin read."""
        return json.loads((self.records / f"{command}-{name}.stdin").read_text())

    def env(self, command: str, name: str) -> dict[str, str]:
        """The environment that a plugin saw."""
        lines = (self.records / f"{command}-{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """An empty node."""
    return Node(tmp_path)


def config(*plugins: str, version: str = "1.0.0") -> NetworkConfig:
    """A list of plugins; those called portmap have a capability."""
    parts = [
        {"type": name, **({"capabilities": {"portMappings": True}} if name == "portmap" else {})} for name in plugins
    ]
    return parse(json.dumps({"cniVersion": version, "name": "pods", "plugins": parts}))


def attachment(*plugins: str, **fields: Any) -> Attachment:
    """A pod in a network."""
    return Attachment(config(*plugins), "sandbox-1", "/run/netns/pod", "eth0", **fields)


def result(ip: str, **fields: Any) -> dict[str, Any]:
    """A result of version 1.0.0."""
    return {"cniVersion": "1.0.0", "ips": [{"address": ip}], **fields}


async def failure(work: Callable[[], Any]) -> CrishimError:
    """The error that ``work`` raises."""
    with pytest.raises(CrishimError) as caught:
        await work()
    return caught.value


async def test_add_runs_the_list_in_order(node: Node) -> None:
    """Each plugin gets the result of the one before it; the last one's is the answer."""
    node.answering("bridge", result("10.0.0.1/24", step="bridge"))
    node.answering("portmap", result("10.0.0.2/24", step="portmap"))
    node.answering("tuning", result("10.0.0.3/24", step="tuning"))
    ports = {"portMappings": [{"hostPort": 80}]}
    found = await node.networks().add(attachment("bridge", "portmap", "tuning", capability_args=ports))
    assert found == result("10.0.0.3/24", step="tuning")
    assert node.order() == ["ADD bridge", "ADD portmap", "ADD tuning"]
    assert "prevResult" not in node.stdin("ADD", "bridge")
    assert node.stdin("ADD", "portmap")["prevResult"]["step"] == "bridge"
    assert node.stdin("ADD", "tuning")["prevResult"]["step"] == "portmap"
    assert [node.stdin("ADD", name).get("runtimeConfig") for name in ("bridge", "portmap")] == [None, ports]


async def test_environment_of_a_plugin(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The six variables of the protocol and PATH; nothing else of the daemon's."""
    monkeypatch.setenv("SECRET", "x")
    node.answering("bridge", result("10.0.0.1/24"))
    arguments = {"IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0"}
    await node.networks().add(attachment("bridge", arguments=arguments))
    seen = node.env("ADD", "bridge")
    assert {key: value for key, value in seen.items() if key.startswith("CNI_")} == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "sandbox-1",
        "CNI_NETNS": "/run/netns/pod",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0",
        "CNI_PATH": str(node.bin),
    }
    assert seen["PATH"] == os.environ["PATH"]
    assert "SECRET" not in seen


async def test_delete_runs_the_list_in_reverse(node: Node) -> None:
    """Each plugin gets the stored result; an answer is not needed; the namespace may be gone."""
    for name in ("bridge", "portmap"):
        node.plugin(name)
    gone = Attachment(config("bridge", "portmap"), "sandbox-1", "", "eth0")
    await node.networks().delete(gone, result("10.0.0.1/24"))
    assert node.order() == ["DEL portmap", "DEL bridge"]
    for name in ("bridge", "portmap"):
        assert node.stdin("DEL", name)["prevResult"] == result("10.0.0.1/24")
        assert node.env("DEL", name)["CNI_NETNS"] == ""
    await node.networks().delete(gone, None)
    assert "prevResult" not in node.stdin("DEL", "bridge")


async def test_failing_plugin(node: Node) -> None:
    """Its message and details are in the error; the plugins after it are not run."""
    node.plugin("bridge", """echo '{"code": 11, "msg": "no more addresses", "details": "range is full"}'; exit 1""")
    node.answering("portmap", result("10.0.0.1/24"))
    error = await failure(lambda: node.networks().add(attachment("bridge", "portmap")))
    assert isinstance(error, HostFailure)
    assert str(error) == "cni plugin bridge failed to add: no more addresses: range is full"
    assert node.order() == ["ADD bridge"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("echo first >&2; echo last word >&2; exit 3", "last word"),
        ("exit 3", "exit status 3"),
        ("echo garbage; exit 4", "exit status 4"),
        ("echo '[]'; exit 5", "exit status 5"),
        ("echo '{}'; echo oops >&2; exit 1", "oops"),
        ("kill -9 $$", "killed by signal 9"),
    ],
)
async def test_plugin_that_fails_without_a_message(node: Node, body: str, complaint: str) -> None:
    """The best there is: its last line on standard error, or how it ended."""
    node.plugin("bridge", body)
    error = await failure(lambda: node.networks().add(attachment("bridge")))
    assert str(error) == f"cni plugin bridge failed to add: {complaint}"


@pytest.mark.parametrize("answer", ["", "garbage", "[1]", '"ok"', '{"ips": [', "null"])
async def test_add_without_a_result(node: Node, answer: str) -> None:
    """Success with anything but an object is a failure."""
    node.plugin("bridge", f"printf %s '{answer}'")
    error = await failure(lambda: node.networks().add(attachment("bridge")))
    assert isinstance(error, HostFailure)
    assert "bridge" in str(error)
    assert "no result" in str(error)


async def test_delete_with_garbage(node: Node) -> None:
    """DEL needs no answer: success is success."""
    node.plugin("bridge", "echo garbage")
    await node.networks().delete(attachment("bridge"), None)


async def test_delete_tries_all_plugins(node: Node) -> None:
    """The first failure is raised when all have had their turn."""
    node.plugin("first")
    node.plugin("second", """echo '{"msg": "second failed"}'; exit 1""")
    node.plugin("third", """echo '{"msg": "third failed"}'; exit 1""")
    error = await failure(lambda: node.networks().delete(attachment("first", "second", "missing", "third"), None))
    assert node.order() == ["DEL third", "DEL second", "DEL first"]
    assert str(error) == "cni plugin third failed to del: third failed"


def gone(pid: int) -> bool:
    """Whether a process has ended, be it a zombie of someone else."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


async def until(true: Callable[[], bool]) -> None:
    """Wait a moment for something that is about to happen."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 (another process does it)
            await asyncio.sleep(0.01)


async def test_hanging_plugin(node: Node) -> None:
    """Given up at the timeout, with its children."""
    pids = node.records / "pids"
    node.plugin("bridge", f"sleep 60 & echo $$ $! > {pids}; sleep 60")
    began = time.monotonic()
    error = await failure(lambda: node.networks(timeout=0.3).add(attachment("bridge")))
    assert time.monotonic() - began < 2
    assert isinstance(error, DeadlineExceeded)
    assert str(error) == "cni plugin bridge did not finish ADD within 0.3 s"
    for pid in pids.read_text().split():
        await until(functools.partial(gone, int(pid)))


async def test_delete_goes_on_after_a_hanging_plugin(node: Node) -> None:
    """The bridge's addresses are freed even if the port mapper hangs."""
    node.plugin("bridge")
    node.plugin("portmap", "sleep 60")
    error = await failure(lambda: node.networks(timeout=0.3).delete(attachment("bridge", "portmap"), None))
    assert isinstance(error, DeadlineExceeded)
    assert node.order() == ["DEL portmap", "DEL bridge"]


async def test_cancelled_add(node: Node) -> None:
    """The plugin that runs is killed, none is run after it."""
    pids = node.records / "pids"
    node.plugin("bridge", f"echo $$ > {pids}.new; mv {pids}.new {pids}; sleep 60")
    node.answering("portmap", result("10.0.0.1/24"))
    task = asyncio.create_task(node.networks().add(attachment("bridge", "portmap")))
    await until(pids.exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(int(pids.read_text()))
    assert node.order() == ["ADD bridge"]


async def test_missing_plugin(node: Node) -> None:
    """Named, with where it was looked for."""
    node.answering("bridge", result("10.0.0.1/24"))
    error = await failure(lambda: node.networks().add(attachment("bridge", "portmap")))
    assert isinstance(error, HostFailure)
    assert str(error) == f"cni plugin portmap is not in {node.bin}"


async def test_plugin_that_cannot_be_started(node: Node) -> None:
    """Not executable: the operating system's reason."""
    (node.bin / "bridge").write_text("")
    error = await failure(lambda: node.networks().add(attachment("bridge")))
    assert isinstance(error, HostFailure)
    assert "bridge" in str(error)
    assert "denied" in str(error).lower()


async def test_large_configuration(node: Node) -> None:
    """A plugin that does not read its input to the end is no problem for us."""
    node.plugin("bridge", """echo '{"cniVersion": "1.0.0"}'""")
    (node.bin / "careless").write_text('#!/bin/sh\necho \'{"cniVersion": "1.0.0", "careless": 1}\'\n')
    (node.bin / "careless").chmod(0o755)
    big = {"portMappings": [{"hostPort": port, "containerPort": port} for port in range(20_000)]}
    text = json.dumps({
        "cniVersion": "1.0.0", "name": "n",
        "plugins": [{"type": kind, "capabilities": {"portMappings": True}} for kind in ("bridge", "careless")],
    })  # fmt: skip
    found = await node.networks().add(Attachment(parse(text), "s", "/n", "eth0", capability_args=big))
    assert found["careless"] == 1
    assert len(node.stdin("ADD", "bridge")["runtimeConfig"]["portMappings"]) == 20_000


async def test_steps_are_recorded(node: Node) -> None:
    """Each plugin's time and failure is in the pod's timeline."""
    node.answering("bridge", result("10.0.0.1/24"))
    node.plugin("portmap", "exit 1")
    timeline = Timeline()
    with timeline.recording():
        await failure(lambda: node.networks().add(attachment("bridge", "portmap")))
    assert [(step.name, step.error) for step in timeline.steps] == [
        ("cni add bridge", ""),
        ("cni add portmap", "cni plugin portmap failed to add: exit status 1"),
    ]


def test_current_network(node: Node) -> None:
    """The first configuration, if all its plugins are there."""
    with pytest.raises(ConfigError, match="no cni configuration"):
        node.networks().current()
    (node.conf / "10.conflist").write_text(config("bridge", "portmap").as_json())
    node.plugin("bridge")
    with pytest.raises(ConfigError, match=f"cni plugin portmap of network pods is not in {node.bin}"):
        node.networks().current()
    node.plugin("portmap")
    assert node.networks().current().name == "pods"
