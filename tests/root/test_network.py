"""Pod networks by the standard CNI plugins, and what plugins are told."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness.client import Cri, container_config, refused, sleeping, until
from root.harness.leaks import unchanged
from root.harness.registry import free_port


def server(text: str, port: int = 8080) -> list[str]:
    """A command that serves ``text`` over HTTP."""
    return ["sh", "-c", f"mkdir /www; echo {text} > /www/index.html; exec httpd -f -p {port} -h /www"]


async def fetch(address: str) -> str:
    """What a server says, as the node sees it; empty as long as it cannot be reached."""

    def get() -> str:
        try:
            with urllib.request.urlopen(f"http://{address}/", timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    return await asyncio.to_thread(get)


async def serves(address: str, text: str) -> None:
    """Wait until there is an answer at ``address``; it must be ``text``."""

    async def answers() -> bool:
        return await fetch(address) == f"{text}\n"

    await until(answers, f"{text!r} from {address}")


def mappings(*ports: tuple[int, int], host_ip: str = "") -> list[pb.PortMapping]:
    """Port mappings from pairs of a host's and a container's port."""
    return [pb.PortMapping(host_port=host, container_port=inside, host_ip=host_ip) for host, inside in ports]


async def test_pod_is_reachable_at_its_address(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    await cri.run(pod, container_config(image, server("hello")))
    await serves(f"{(await cri.pod_status(pod)).network.ip}:8080", "hello")


async def test_pods_reach_each_other_and_themselves(cri: Cri, image: str) -> None:
    first, second = await asyncio.gather(cri.run_pod(), cri.run_pod())
    address = (await cri.pod_status(first)).network.ip
    one = await cri.run(first, container_config(image, server("first")))
    two = await cri.run(second, container_config(image, sleeping()))
    await serves(f"{address}:8080", "first")
    assert await cri.sh(two, f"wget -qO- http://{address}:8080/") == "first\n"
    assert await cri.sh(one, f"wget -qO- http://{address}:8080/; wget -qO- http://127.0.0.1:8080/") == "first\nfirst\n"


@pytest.mark.parametrize("where", ["gateway", "loopback"])
async def test_ports_of_the_host(cri: Cri, image: str, where: str) -> None:
    host = {"gateway": cri.daemon.gateway, "loopback": "127.0.0.1"}[where]
    port = free_port()
    pod = await cri.run_pod(cri.pod_config(port_mappings=[*mappings((port, 8080)), pb.PortMapping(container_port=9)]))
    await cri.run(pod, container_config(image, server("mapped")))
    await serves(f"{host}:{port}", "mapped")
    await cri.stop_pod(pod)
    assert await fetch(f"{host}:{port}") == ""


async def test_port_of_one_address_of_the_host(cri: Cri, image: str) -> None:
    port = free_port()
    config = cri.pod_config(port_mappings=mappings((port, 8080), host_ip=cri.daemon.gateway))
    await cri.run(await cri.run_pod(config), container_config(image, server("one")))
    await serves(f"{cri.daemon.gateway}:{port}", "one")
    assert await fetch(f"127.0.0.1:{port}") == ""


async def test_pod_in_the_network_of_the_node(cri: Cri, image: str) -> None:
    """No plugin runs for it, so none can fail."""
    port = free_port()
    options = pb.NamespaceOption(network=pb.NODE)
    linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))
    with cri.daemon.other_network({"type": "no-such-plugin"}):
        pod = await cri.run_pod(cri.pod_config(linux=linux))
        assert (await cri.pod_status(pod)).network.ip == ""
        await cri.run(pod, container_config(image, server("host", port)))
        await serves(f"127.0.0.1:{port}", "host")
        await cri.remove_pod(pod)


async def test_addresses_are_released_when_the_pod_stops(cri: Cri) -> None:
    pods = await asyncio.gather(*(cri.run_pod() for _ in range(3)))
    addresses = {(await cri.pod_status(pod)).network.ip for pod in pods}
    assert len(addresses) == 3
    store = cri.daemon.ipam / cri.daemon.bridge
    assert addresses <= {path.name for path in store.iterdir()}
    await cri.stop_pod(pods[0])
    assert (await cri.pod_status(pods[0])).state == pb.SANDBOX_NOTREADY
    assert len(addresses & {path.name for path in store.iterdir()}) == 2
    await asyncio.gather(*(cri.remove_pod(pod) for pod in pods))
    assert not [path for path in store.iterdir() if path.name[0].isdigit()]


async def test_network_is_released_as_it_was_made(cri: Cri) -> None:
    """Whatever the configuration is by then: the pod remembers its own."""
    async with unchanged(cri.daemon):
        first, second = await asyncio.gather(cri.run_pod(), cri.run_pod())
        conf = cri.daemon.cni_conf / "10-test.conflist"
        text = conf.read_text()
        try:
            conf.unlink()
            await cri.remove_pod(first)
            with cri.daemon.other_network({"type": "no-such-plugin"}):
                await cri.stop_pod(second)
                await cri.remove_pod(second)
        finally:
            conf.write_text(text)


async def test_both_address_families(cri: Cri, image: str) -> None:
    plugin = cri.daemon.bridge_plugin()
    plugin["ipMasq"] = False
    plugin["ipam"]["ranges"].append([{"subnet": "fd00:c815:7e57::/64"}])
    with cri.daemon.other_network(plugin):
        pod = await cri.run_pod()
        status = (await cri.pod_status(pod)).network
        (other,) = status.additional_ips
        assert status.ip.startswith("10.") and other.ip.startswith("fd00:c815:7e57::")
        container = await cri.run(pod, container_config(image, sleeping()))
        shown = await cri.sh(container, "ip addr show eth0; ip addr show lo")
        assert f"{status.ip}/" in shown and f"{other.ip}/" in shown and "127.0.0.1/8" in shown
        await cri.remove_pod(pod)


RECORDER = """
cat > "$(dirname "$0")/$CNI_COMMAND.stdin"
env > "$(dirname "$0")/$CNI_COMMAND.env"
[ "$CNI_COMMAND" = DEL ] || echo '{"cniVersion": "1.0.0", "ips": [{"address": "198.51.100.7/24"}], "dns": {}}'
"""


def read_environment(path: Path) -> dict[str, str]:
    """What a recording plugin was told."""
    lines = path.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line.startswith("CNI_"))


async def test_what_plugins_are_told(cri: Cri) -> None:
    daemon = cri.daemon
    daemon.plugin("recorder", RECORDER)
    first = {"type": "recorder", "own": [1, {"a": "b"}]}
    second = {"type": "recorder", "capabilities": {"portMappings": True, "bandwidth": True}}
    config = cri.pod_config(port_mappings=mappings((1234, 80)))
    with cri.daemon.other_network(first, second):
        pod = await cri.run_pod(config)
        assert (await cri.pod_status(pod)).network.ip == "198.51.100.7"
        result = {"cniVersion": "1.0.0", "ips": [{"address": "198.51.100.7/24"}], "dns": {}}
        told = {
            "type": "recorder",
            "name": daemon.bridge,
            "cniVersion": "1.0.0",
            "prevResult": result,
            "runtimeConfig": {"portMappings": [{"hostPort": 1234, "containerPort": 80, "protocol": "tcp"}]},
        }
        assert json.loads((daemon.cni_bin / "ADD.stdin").read_text()) == told
        environment = read_environment(daemon.cni_bin / "ADD.env")
        assert Path(environment["CNI_NETNS"]).exists()
        arguments = dict(pair.split("=") for pair in environment.pop("CNI_ARGS").split(";"))
        meta = config.metadata
        assert arguments == {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": meta.namespace,
            "K8S_POD_NAME": meta.name,
            "K8S_POD_INFRA_CONTAINER_ID": pod,
            "K8S_POD_UID": meta.uid,
        }
        expected = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": pod, "CNI_IFNAME": "eth0"}
        assert expected.items() <= environment.items()
        assert environment["CNI_PATH"].split(":") == [str(daemon.cni_bin), "/opt/cni/bin", "/usr/lib/cni"]
        await cri.stop_pod(pod)
        deleted = {"type": "recorder", "own": [1, {"a": "b"}], "name": daemon.bridge, "cniVersion": "1.0.0"}
        assert json.loads((daemon.cni_bin / "DEL.stdin").read_text()) == deleted | {"prevResult": result}
        assert read_environment(daemon.cni_bin / "DEL.env")["CNI_NETNS"] == environment["CNI_NETNS"]
        await cri.remove_pod(pod)


async def test_node_without_a_network_is_not_ready(cri: Cri) -> None:
    """It is as soon as there is a configuration, without a restart."""
    conf = cri.daemon.cni_conf / "10-test.conflist"
    text = conf.read_text()

    async def ready() -> pb.RuntimeCondition:
        conditions = (await cri.runtime.Status(pb.StatusRequest())).status.conditions
        return next(item for item in conditions if item.type == "NetworkReady")

    conf.unlink()
    try:
        found = await ready()
        assert not found.status and found.reason and str(cri.daemon.cni_conf) in found.message
        async with unchanged(cri.daemon):
            with refused(grpc.StatusCode.UNAVAILABLE, str(cri.daemon.cni_conf)):
                await cri.run_pod()
        conf.write_text("{")
        assert str(conf) in (await ready()).message
    finally:
        conf.write_text(text)
    assert (await ready()).status
