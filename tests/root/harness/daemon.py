"""A crishim daemon of a test's own: its directories, network and socket, its life and what is left after it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from crishim.cri.api import api_pb2 as pb
from crishim.cri.api.api_pb2_grpc import ImageServiceStub, RuntimeServiceStub

CGROUPS = Path("/sys/fs/cgroup")
_START_SECONDS = 40.0
_STOP_SECONDS = 60.0
_READY = "serving CRI v1 on"
_LOG_SHOWN = 30_000


class Daemon:
    """``crishim serve`` in a process of its own; it can be ended and started again on what it left."""

    def __init__(
        self, insecure: Sequence[str] = (), settings: Mapping[str, Any] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        """``insecure`` are registries without TLS, ``settings`` change the configuration, ``prefix`` runs it."""
        self.base = _directory()
        self.root, self.state = self.base / "root", self.base / "state"
        self.socket, self.logs = self.base / "s", self.base / "logs"
        self.config_file, self.log_file = self.base / "crishim.toml", self.base / "log"
        self.registries_conf = self.base / "registries.conf"
        self.cni_conf, self.cni_bin, self.ipam = self.base / "cni", self.base / "bin", self.base / "ipam"
        self.env: dict[str, str] = {}
        self.prefix = tuple(prefix)
        self.subnet = free_subnet()
        self.bridge = f"ct{random.randrange(16**8):08x}"
        self.process: subprocess.Popen[bytes] | None = None
        self._shown = 0
        self.logs.mkdir()
        self.cni_conf.mkdir()
        self.cni_bin.mkdir()
        self.registries_conf.write_text("".join(_registry(host) for host in insecure))
        self.settings = _merged(self._defaults(), settings or {})
        self.configure({})
        self.write_network()

    def _defaults(self) -> dict[str, Any]:
        policy = self.base / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        return {
            "root": str(self.root),
            "state": str(self.state),
            "api": {"listen": str(self.socket)},
            "image": {
                "registries_conf": str(self.registries_conf),
                "policy": str(policy),
                "certs_dir": str(self.base / "certs"),
            },
            "network": {
                "conf_dir": str(self.cni_conf),
                "bin_dirs": [str(self.cni_bin), "/opt/cni/bin", "/usr/lib/cni"],
            },
            "log": {"level": "debug"},
        }

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Change the configuration for the next start."""
        self.settings = _merged(self.settings, settings)
        self.config_file.write_text("\n".join(_toml(self.settings)) + "\n")

    def write_network(self, *plugins: Mapping[str, Any], name: str = "10-test.conflist") -> Path:
        """A network configuration: a bridge with port mapping, unless ``plugins`` are given."""
        conflist = {
            "cniVersion": "1.0.0",
            "name": self.bridge,
            "plugins": list(plugins) or [self.bridge_plugin(), {"type": "portmap", "capabilities": _PORT_MAPPINGS}],
        }
        path = self.cni_conf / name
        path.write_text(json.dumps(conflist))
        return path

    @contextlib.contextmanager
    def other_network(self, *plugins: Mapping[str, Any]) -> Iterator[None]:
        """Another configuration, which counts for new pods while the body runs."""
        path = self.write_network(*plugins, name="00-other.conflist")
        try:
            yield
        finally:
            path.unlink()

    def bridge_plugin(self) -> dict[str, Any]:
        """The main plugin of the usual network."""
        return {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.ipam),
                "ranges": [[{"subnet": self.subnet}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }

    @property
    def gateway(self) -> str:
        """The bridge's own address."""
        return self.subnet.replace(".0/24", ".1")

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self.process is not None
        return self.process.pid

    @property
    def target(self) -> str:
        """The socket for gRPC."""
        return f"unix:{self.socket}"

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def start(self, *arguments: str) -> None:
        """Start it and wait until it serves."""
        self.launch(*arguments)
        self.wait_ready()

    def launch(self, *arguments: str) -> None:
        """Start it without waiting."""
        assert not self.alive, "the daemon runs already"
        command = [*self.prefix, sys.executable, "-m", "crishim", "serve", "--config", str(self.config_file)]
        environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"} | self.env
        with self.log_file.open("ab") as log, self._output.open("wb") as output:
            self.process = subprocess.Popen([*command, *arguments], stdout=output, stderr=log, env=environment)

    @property
    def _output(self) -> Path:
        return self.base / "stdout"

    def wait_ready(self) -> str:
        """Wait for the line that says it serves; the line."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self.alive:
            text = self._output.read_text()
            if text.startswith(_READY) and text.endswith("\n"):
                return text
            time.sleep(0.01)
        raise AssertionError(f"the daemon did not start:\n{self.log()[-4000:]}")

    def start_in_vain(self, *arguments: str) -> str:
        """Start one that must end at once with an error; what it printed on standard error."""
        before = len(self.log())
        self.launch(*arguments)
        assert self.process is not None
        try:
            assert self.process.wait(_START_SECONDS) != 0
        finally:
            self.kill()
        return self.log()[before:]

    def kill(self) -> None:
        """SIGKILL: a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)

    def restart(self) -> None:
        """A crash and a new start."""
        self.kill()
        self.start()

    def log(self) -> str:
        """All that it has logged."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def new_log(self) -> str:
        """What it has logged since the last call."""
        text = self.log()
        new, self._shown = text[self._shown :], len(text)
        return new[-_LOG_SHOWN:]

    def plugin(self, name: str, script: str) -> Path:
        """A CNI plugin of this daemon's own, or any other program in its directory: a shell script."""
        path = self.cni_bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def monitors(self) -> Iterator[int]:
        """The processes of conmon that serve this daemon."""
        needle = str(self.state / "exits").encode()
        for pid, arguments in processes():
            if needle in arguments and b"--cid" in arguments:
                yield pid

    def close(self) -> None:
        """Remove everything, by the daemon's own means if they work."""
        try:
            if self.alive:
                with contextlib.suppress(grpc.RpcError):
                    self._remove_pods()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.terminate()
        finally:
            self.kill()
            self._clean_up()

    @contextlib.contextmanager
    def stubs(self) -> Iterator[tuple[RuntimeServiceStub, ImageServiceStub]]:
        """Both services for code that is not asynchronous."""
        with grpc.insecure_channel(self.target) as channel:
            yield RuntimeServiceStub(channel), ImageServiceStub(channel)

    def pull(self, reference: str) -> str:
        """Pull an image; its ID."""
        with self.stubs() as (_, images):
            request = pb.PullImageRequest(image=pb.ImageSpec(image=reference))
            return images.PullImage(request, timeout=60).image_ref

    def _remove_pods(self) -> None:
        with self.stubs() as (runtime, _):
            for pod in runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items:
                runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=40)

    def _clean_up(self) -> None:
        self._kill_all()
        for name in _names_below(self.state / "sandboxes"):
            for directory in cgroups_named(f"crishim-{name}"):
                remove_cgroup(directory)
        self._drop_rules()
        for _ in range(3):
            for mount in _mounts_below(self.base):
                subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        if Path(f"/sys/class/net/{self.bridge}").exists():
            subprocess.run(["ip", "link", "delete", self.bridge], check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def _kill_all(self) -> None:
        """conmon processes, containers, holders, plugins: all that has our directory in its life."""
        needle = str(self.base).encode()
        for pid, arguments in processes():
            if any(needle in argument for argument in arguments) or self.owns_holder(pid, arguments):
                _kill(pid)
        for pid_file in (self.state / "containers").glob("*/pidfile"):
            with contextlib.suppress(OSError, ValueError):
                _kill(int(pid_file.read_text()))

    def owns_holder(self, pid: int, arguments: Sequence[bytes]) -> bool:
        """Whether a process holds a PID namespace for this daemon: its root tells where it is from."""
        if list(arguments[:2]) != [b"/init", b"-P"]:
            return False
        with contextlib.suppress(OSError):
            return f"/{self.base.name}/" in Path(f"/proc/{pid}/mountinfo").read_text()
        return False

    def _drop_rules(self) -> None:
        """The packet filter's rules of our network, where no plugin has dropped them."""
        table = subprocess.run(["iptables-save", "-t", "nat"], check=False, capture_output=True, text=True).stdout
        ours = [line for line in table.splitlines() if line.startswith("-A") and f'\\"{self.bridge}\\"' in line]
        chains = set[str]()
        for line in ours:
            words = shlex.split(line)
            chains |= {word for word in (words[1], words[-1]) if word.startswith("CNI-") and "HOSTPORT" not in word}
            subprocess.run(["iptables", "-t", "nat", "-D", *words[1:]], check=False, capture_output=True)
        for option in ("-F", "-X"):
            for chain in chains:
                subprocess.run(["iptables", "-t", "nat", option, chain], check=False, capture_output=True)


_PORT_MAPPINGS = {"portMappings": True}


def _directory() -> Path:
    """A new directory with a short path, in memory if there is such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="ct-", dir=memory if memory.is_dir() else None))


def _registry(host: str) -> str:
    return f'[[registry]]\nlocation = "{host}"\ninsecure = true\n'


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def _toml(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield f"{name} = {json.dumps(value)}"
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"[{prefix}{name}]"
            yield from _toml(value, f"{prefix}{name}.")


def free_subnet() -> str:
    """A /24 below 10.200.0.0/13 that no route leads to."""
    taken = Path("/proc/net/route").read_text().splitlines()[1:]
    used = {tuple(int(line.split()[1], 16).to_bytes(4, "little")[:3]) for line in taken}
    prefixes = {net[:2] for line in taken for net in [_route(line)] if net[1] == "0000FFFF"}
    while True:
        second, third = random.randrange(200, 208), random.randrange(256)
        if (10, second, third) not in used and (f"10.{second}", "0000FFFF") not in prefixes:
            return f"10.{second}.{third}.0/24"


def _route(line: str) -> tuple[str, str]:
    fields = line.split()
    return socket.inet_ntoa(int(fields[1], 16).to_bytes(4, "little")).rsplit(".", 2)[0], fields[7]


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """Every process with its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")


def hierarchies() -> list[Path]:
    """The roots of all cgroup hierarchies."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def cgroups_named(part: str) -> Iterator[Path]:
    """The cgroups with ``part`` in their names, in every hierarchy."""
    for top in hierarchies():
        for folder, names, _ in os.walk(top):
            yield from (Path(folder, name) for name in names if part in name)


def remove_cgroup(top: Path) -> None:
    """Kill what is in a cgroup, and remove it with all below."""
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            for pid in Path(directory, "cgroup.procs").read_text().split():
                _kill(int(pid))
        for _ in range(20):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
                break
            time.sleep(0.02)


def _kill(pid: int) -> None:
    if pid not in (1, os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _names_below(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def _mounts_below(directory: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{directory}/")), reverse=True)
