"""CNI configurations: which file counts, what is wrong with others, and what a plugin is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crishim.cni.config import choose, find_plugin, parse
from crishim.cni.network import result_ips
from crishim.errors import ConfigError

BRIDGE = {
    "type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local"}, "capabilities": {"ipRanges": True},
}  # fmt: skip
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True, "bandwidth": False}}
LIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [BRIDGE, PORTMAP, {"type": "tuning"}]}
ARGS = {
    "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}],
    "bandwidth": {"ingressRate": 1},
    "ipRanges": [[{"subnet": "10.1.0.0/24"}]],
    "dns": {"servers": ["10.0.0.10"]},
}


def text(**changes: Any) -> str:
    """The list with changes; None takes a key away."""
    return json.dumps({key: value for key, value in {**LIST, **changes}.items() if value is not None})


def test_list() -> None:
    """Name, version and plugins in order."""
    found = parse(text(disableCheck=True), "/etc/cni/net.d/10-pods.conflist")
    assert (found.name, found.cni_version, found.disable_check) == ("pods", "1.0.0", True)
    assert found.plugin_types() == ["bridge", "portmap", "tuning"]
    assert found.source == "/etc/cni/net.d/10-pods.conflist"


def test_single_plugin() -> None:
    """A .conf file is a list of one."""
    found = parse(json.dumps({"cniVersion": "0.3.1", "name": "lo", "type": "loopback", "x": 1}))
    assert (found.name, found.cni_version, found.plugin_types()) == ("lo", "0.3.1", ["loopback"])
    assert json.loads(found.plugin_input(found.plugins[0], {}, None))["x"] == 1


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_versions(version: str) -> None:
    """All that the specification has had."""
    assert parse(text(cniVersion=version)).cni_version == version


@pytest.mark.parametrize("version", [None, ""])
def test_no_version(version: str | None) -> None:
    """An old file without one is a version that every plugin knows."""
    assert parse(text(cniVersion=version)).cni_version in ("0.1.0", "0.2.0")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", "not an object"),
        ('"pods"', "not an object"),
        ("null", "not an object"),
        ("{}", "no name"),
        (text(name=None), "no name"),
        (text(name=""), "no name"),
        (text(name=5), "no name"),
        (text(cniVersion="2.0.0"), "cniVersion '2.0.0'"),
        (text(cniVersion=1), "cniVersion 1"),
        (text(cniVersion=["1.0.0"]), "cniVersion"),
        (text(plugins=[]), "no plugins"),
        (text(plugins={"type": "bridge"}), "no plugins"),
        ('{"name": "n", "plugins": null}', "no plugins"),
        (text(plugins=["bridge"]), "plugin without a valid type"),
        (text(plugins=[BRIDGE, {"name": "x"}]), "plugin without a valid type"),
        (text(plugins=[{"type": ""}]), "plugin without a valid type"),
        (text(plugins=[{"type": 5}]), "plugin without a valid type"),
        (text(plugins=[{"type": "../../bin/sh"}]), "plugin without a valid type"),
        (text(plugins=None), "plugin without a valid type"),
        (text(plugins=[{"type": "portmap", "capabilities": ["portMappings"]}]), "capabilities of plugin portmap"),
    ],
)
def test_faults(content: str | bytes, cause: str) -> None:
    """The file and the cause are named."""
    with pytest.raises(ConfigError) as caught:
        parse(content, "/etc/cni/net.d/x.conf")
    assert "/etc/cni/net.d/x.conf" in str(caught.value)
    assert cause in str(caught.value)


def test_stored_configuration_is_the_same() -> None:
    """What goes into the database at ADD serves DEL after a restart."""
    found = parse(text(), "f")
    again = parse(found.as_json())
    assert (again.name, again.cni_version, again.plugins) == (found.name, found.cni_version, found.plugins)
    single = parse(json.dumps({"cniVersion": "0.3.1", "name": "lo", "type": "loopback"}))
    assert parse(single.as_json()).plugin_types() == ["loopback"]


def test_plugin_input() -> None:
    """The plugin's part with the list's name and version; nothing that it has not asked for."""
    found = parse(text())
    assert json.loads(found.plugin_input(found.plugins[2], ARGS, None)) == {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "tuning",
    }
    assert json.loads(found.plugin_input(found.plugins[0], {}, {"cniVersion": "1.0.0"})) == {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "bridge",
        "bridge": "cni0",
        "ipam": {"type": "host-local"},
        "prevResult": {"cniVersion": "1.0.0"},
    }


def test_capability_args_go_to_plugins_that_declare_them() -> None:
    """A capability that is false is not declared."""
    found = parse(text())
    told = [json.loads(found.plugin_input(plugin, ARGS, None)).get("runtimeConfig") for plugin in found.plugins]
    assert told == [{"ipRanges": ARGS["ipRanges"]}, {"portMappings": ARGS["portMappings"]}, None]


def test_plugin_input_without_capability_args() -> None:
    """No empty runtimeConfig, and never the declaration itself."""
    found = parse(text())
    given = json.loads(found.plugin_input(found.plugins[1], {"dns": {}}, None))
    assert "runtimeConfig" not in given
    assert "capabilities" not in given


def test_name_and_version_of_the_list_win() -> None:
    """Whatever a plugin's part says of itself."""
    found = parse(text(plugins=[{"type": "x", "name": "mine", "cniVersion": "0.1.0"}]))
    given = json.loads(found.plugin_input(found.plugins[0], {}, None))
    assert (given["name"], given["cniVersion"]) == ("pods", "1.0.0")


def test_chooses_the_first_by_name(tmp_path: Path) -> None:
    """Of the three suffixes together; other files are not looked at."""
    (tmp_path / "00-notes.txt").write_text("nonsense")
    (tmp_path / "05.conflist.bak").write_text(text(name="bak"))
    (tmp_path / "20-b.conf").write_text(json.dumps({"cniVersion": "1.0.0", "name": "b", "type": "x"}))
    (tmp_path / "30-c.conflist").write_text(text(name="c"))
    assert choose(tmp_path).name == "b"
    (tmp_path / "10-a.json").write_text(text(name="a"))
    assert choose(tmp_path).name == "a"
    assert choose(tmp_path).source == str(tmp_path / "10-a.json")


def test_chooses_the_first_valid_one(tmp_path: Path) -> None:
    """A broken or unreadable file does not take the network from all new pods."""
    (tmp_path / "10-a.conflist").write_text("{")
    (tmp_path / "15-folder.conf").mkdir()
    (tmp_path / "16-dangling.conf").symlink_to("nowhere")
    (tmp_path / "20-b.conflist").write_text(text())
    assert choose(tmp_path).source == str(tmp_path / "20-b.conflist")


def test_no_valid_configuration(tmp_path: Path) -> None:
    """The first file that is wrong is named, else the folder."""
    with pytest.raises(ConfigError, match=f"^no cni configuration in {tmp_path}$"):
        choose(tmp_path)
    (tmp_path / "20-b.conflist").write_text(text(name=""))
    (tmp_path / "10-a.conflist").write_text("{")
    with pytest.raises(ConfigError, match=r"10-a\.conflist: not JSON"):
        choose(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    """Before a network add-on has been installed."""
    with pytest.raises(ConfigError, match=f"no cni configuration: {tmp_path}/net.d: no such file"):
        choose(tmp_path / "net.d")


def test_find_plugin(tmp_path: Path) -> None:
    """In the order of the folders; a folder of that name is no program."""
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        (folder / "bridge").touch()
    (first / "portmap").mkdir()
    (second / "portmap").touch()
    dirs = [str(tmp_path / "missing"), str(first), str(second)]
    assert find_plugin("bridge", dirs) == first / "bridge"
    assert find_plugin("portmap", dirs) == second / "portmap"
    assert find_plugin("tuning", dirs) is None
    assert find_plugin("..", dirs) is None


HOST = {"name": "cni0", "mac": "00:01"}
VETH = {"name": "veth1", "mac": "00:02", "sandbox": ""}
OWN = {"name": "eth0", "mac": "00:03", "sandbox": "/run/netns/x"}


@pytest.mark.parametrize(
    ("result", "ips"),
    [
        ({}, []),
        ({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.5/24", "gateway": "10.0.0.1"}}, ["10.0.0.5"]),
        (
            {"cniVersion": "0.2.0", "ip6": {"ip": "fd00::5/64"}, "ip4": {"ip": "10.0.0.5/24"}},
            ["10.0.0.5", "fd00::5"],
        ),
        (
            {
                "cniVersion": "0.3.1",
                "interfaces": [HOST, VETH, OWN],
                "ips": [
                    {"version": "4", "interface": 0, "address": "10.0.0.1/24"},
                    {"version": "4", "interface": 2, "address": "10.0.0.5/24", "gateway": "10.0.0.1"},
                    {"version": "6", "interface": 2, "address": "fd00::5/64"},
                ],
            },
            ["10.0.0.5", "fd00::5"],
        ),
        (
            {
                "cniVersion": "1.0.0",
                "interfaces": [OWN, {"name": "net1", "sandbox": "/run/netns/x"}],
                "ips": [{"interface": 1, "address": "192.168.0.9/16"}, {"interface": 0, "address": "10.0.0.5/24"}],
            },
            ["10.0.0.5"],
        ),
        (
            {
                "cniVersion": "1.1.0",
                "interfaces": [{**OWN, "mtu": 1500, "socketPath": ""}],
                "ips": [{"interface": 0, "address": "fd00::5/64"}, {"interface": 0, "address": "10.0.0.5/24"}],
                "dns": {},
            },
            ["fd00::5", "10.0.0.5"],
        ),
        ({"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.0.0.5/32"}]}, ["10.0.0.5"]),
        ({"cniVersion": "1.0.0", "ips": [], "interfaces": [OWN]}, []),
        ({"cniVersion": "1.0.0", "ips": None, "interfaces": None}, []),
    ],
)
def test_result_ips(result: dict[str, Any], ips: list[str]) -> None:
    """The pod's own addresses in the order of the result: the first one is the pod's IP."""
    assert result_ips(result, "eth0") == ips
