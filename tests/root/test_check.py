"""``crishim check`` on this host, whole and with things missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Check = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A directory of CNI plugins that are there and do nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bridge", "host-local", "portmap"):
        (folder / name).symlink_to("/bin/true")
    return folder


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    """A directory with one network."""
    folder = tmp_path / "net.d"
    folder.mkdir()
    plugins = [{"type": "bridge", "ipMasq": True, "ipam": {"type": "host-local"}}, {"type": "portmap"}]
    conf = {"cniVersion": "1.0.0", "name": "testnet", "plugins": plugins}
    (folder / "10-test.conflist").write_text(json.dumps(conf))
    return folder


@pytest.fixture
def check(tmp_path: Path, plugins: Path, networks: Path) -> Check:
    """Runs ``crishim check --json`` with more flags; the status and the requirements by name."""

    def run(*flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
        config = tmp_path / "crishim.toml"
        config.write_text(
            f'root = "{tmp_path}/root"\nstate = "{tmp_path}/state"\n'
            f'image.registries_conf = "{tmp_path}/none"\n'
            f'network.conf_dir = "{networks}"\nnetwork.bin_dirs = ["{plugins}"]\n'
        )
        command = [sys.executable, "-P", "-m", "crishim", "check", "--json", "--config", str(config), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not done.stderr
        return done.returncode, {item["name"]: item for item in json.loads(done.stdout)}

    return run


def wrong(found: dict[str, dict[str, Any]]) -> list[str]:
    """The needed things that are not there."""
    return [name for name, item in found.items() if item["needed"] and not item["ok"]]


def test_this_host_can_run_pods(check: Check, tmp_path: Path) -> None:
    """All that is needed is found, with the versions; nothing is made or mounted for it."""
    before = sorted(os.listdir(tmp_path)), Path("/proc/self/mountinfo").read_text().count("crishim-check")
    status, found = check()
    assert (status, wrong(found)) == (0, [])
    assert found["cni network"]["found"].startswith("testnet, from ")
    assert "runc version" in found["runtime runc (default)"]["found"]
    assert "conmon version" in found["conmon"]["found"]
    assert {"overlayfs", "namespaces", "cgroups", "iptables", "cni plugin host-local"} <= found.keys()
    after = sorted(os.listdir(tmp_path)), Path("/proc/self/mountinfo").read_text().count("crishim-check")
    assert after == (sorted([*before[0], "crishim.toml"]), before[1])


def test_missing_conmon_is_named(check: Check) -> None:
    """With what to do."""
    status, found = check("--runtime-conmon", "/nonexistent/conmon")
    assert (status, wrong(found)) == (1, ["conmon"])
    assert found["conmon"]["found"] == "/nonexistent/conmon is missing"
    assert found["conmon"]["advice"] == "install conmon, or set runtime.conmon"


@pytest.mark.parametrize("name", ["bridge", "host-local", "portmap"])
def test_missing_plugin_is_named(check: Check, plugins: Path, name: str) -> None:
    """Those of the list, and those that give addresses."""
    (plugins / name).unlink()
    status, found = check()
    assert (status, wrong(found)) == (1, [f"cni plugin {name}"])


def test_empty_network_directory(check: Check, networks: Path) -> None:
    """No network is configured."""
    (networks / "10-test.conflist").unlink()
    status, found = check()
    assert (status, wrong(found)) == (1, ["cni network"])
    assert found["cni network"]["found"] == f"no cni configuration in {networks}"


def test_missing_default_runtime(check: Check, tmp_path: Path) -> None:
    """The default one is needed, another is not."""
    (tmp_path / "crishim.toml.d").mkdir()
    (tmp_path / "crishim.toml.d" / "runtimes.toml").write_text('runtime.handlers.other.path = "/nonexistent/other"\n')
    status, found = check()
    assert (status, found["runtime other"]["ok"]) == (0, False)
    status, found = check("--runtime-default", "other")
    assert (status, wrong(found)) == (1, ["runtime other (default)"])


@pytest.mark.parametrize(
    ("flag", "name"), [("--image-registries-conf", "registries.conf"), ("--image-policy", "policy.json")]
)
def test_broken_image_settings(check: Check, tmp_path: Path, flag: str, name: str) -> None:
    """What cannot be parsed stops every pull."""
    (tmp_path / "broken").write_text("{[")
    status, found = check(flag, str(tmp_path / "broken"))
    assert (status, wrong(found)) == (1, [name])


AS_NOBODY = """
import os, sys
from crishim.cli.main import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.argv = ["crishim", "check"]
main()
"""
"""The interpreter may be where only root can reach it: everything is imported before root is given up."""


def test_without_root() -> None:
    """It says so in words, without a traceback, on lines for people."""
    command = [sys.executable, "-P", "-c", AS_NOBODY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert not done.stderr
    assert "missing  user" in done.stdout
    assert "run it as root" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Pods cannot run on this host: user, ")
