"""Where the demo takes place: directories, a bridge, a subnet and a cgroup that nothing else on the host uses."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import msgspec

from crishim.cgroups import layout
from crishim.cgroups.layout import Cgroups
from crishim.cli.requirements import kernel
from crishim.config.settings import ApiSettings, Config
from crishim.errors import HostFailure
from crishim.host import process
from crishim.host.facts import read_facts

PREFIX = "crishim-demo-"
_SUBNETS = "198.18.0.0/15", "10.224.0.0/11", "192.168.0.0/16"
"""Where to look for a free one: first the range that is meant for benchmarks (RFC 2544)."""
_ROOTS = ("/var/lib", "/var/tmp", tempfile.gettempdir(), "/run")


@dataclass(frozen=True)
class Place:
    """One demo's own corner of the host."""

    token: str
    root: Path
    state: Path
    subnet: IPv4Network
    cgroups: Cgroups

    @property
    def bridge(self) -> str:
        """The interface that the pod is attached to: at most 15 characters."""
        return f"crishim-{self.token}"

    @property
    def gateway(self) -> IPv4Address:
        """The bridge's own address."""
        return self.subnet[1]

    @property
    def cgroup(self) -> str:
        """The pod's cgroup, as a kubelet would name it for the driver in force."""
        return f"crishimdemo{self.token}.slice" if self.cgroups.systemd else f"/{PREFIX}{self.token}"

    @property
    def cgroup_directory(self) -> str:
        """The same below each hierarchy."""
        return self.cgroup.strip("/")

    @property
    def socket(self) -> Path:
        """Where the daemon listens."""
        return self.state / "crishim.sock"

    @property
    def config(self) -> Path:
        """The daemon's configuration."""
        return self.root / "crishim.toml"

    @property
    def log(self) -> Path:
        """What the daemon says."""
        return self.root / "daemon.log"

    @property
    def pod_logs(self) -> Path:
        """Where the pod's containers log."""
        return self.root / "logs"


def choose(settings: Config) -> Place:
    """Look for a place; nothing is made yet."""
    token = secrets.token_hex(3)
    return Place(
        token,
        _root() / f"{PREFIX}{token}",
        Path("/run", f"{PREFIX}{token}"),
        secrets.choice(free_subnets(Path("/proc/net/route").read_text())),
        layout.detect(settings.runtime.cgroup_manager, systemd=read_facts().systemd),
    )


def make(place: Place, settings: Config) -> None:
    """Make the directories, and write the daemon's configuration, network and trust policy."""
    try:
        for path in (place.state, place.root, place.root / "net.d", place.pod_logs):
            path.mkdir(mode=0o700)
        (place.root / "net.d" / "10-demo.conflist").write_text(json.dumps(network(place)))
        (place.root / "policy.json").write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        values = msgspec.to_builtins(own_settings(place, settings))
        place.config.write_text("".join(f"{line}\n" for line in as_toml(values)))
    except OSError as err:
        raise HostFailure(f"cannot make {err.filename}: {(err.strerror or str(err)).lower()}") from err


def trust(place: Place, registry: str) -> None:
    """Let the daemon pull from ``registry`` (HOST:PORT) without TLS."""
    (place.root / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')


def _root() -> Path:
    """A directory that can hold what overlays write."""
    found = next((Path(path) for path in _ROOTS if Path(path).is_dir() and kernel.overlay(Path(path)).ok), None)
    if found is None:
        raise HostFailure(f"overlayfs works in none of {', '.join(_ROOTS)}")
    return found


def free_subnets(routes: str) -> list[IPv4Network]:
    """Small subnets that no route of /proc/net/route leads to; the default route does not count."""
    used = list(_routes(routes))
    for area in _SUBNETS:
        candidates = IPv4Network(area).subnets(new_prefix=24)
        if free := [subnet for subnet in candidates if not any(subnet.overlaps(network) for network in used)]:
            return free
    raise HostFailure("every private subnet is routed somewhere on this host")


def _routes(text: str) -> Iterator[IPv4Network]:
    """Addresses there are numbers in the machine's byte order, in hexadecimal."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        address, mask = (int(fields[at], 16).to_bytes(4, sys.byteorder) for at in (1, 7))
        if any(mask):
            yield IPv4Network((address, int.from_bytes(mask, "big").bit_count()))


def own_settings(place: Place, settings: Config) -> Config:
    """``settings`` with everything moved to the demo's place: only the programs stay the host's."""
    replace = msgspec.structs.replace
    return replace(
        settings,
        root=str(place.root / "root"),
        state=str(place.state),
        api=ApiSettings(listen=str(place.socket)),
        image=replace(
            settings.image,
            registries_conf=str(place.root / "registries.conf"),
            policy=str(place.root / "policy.json"),
            certs_dir=str(place.root / "certs.d"),
            auth_file="",
        ),
        network=replace(settings.network, conf_dir=str(place.root / "net.d")),
        metrics=replace(settings.metrics, listen=""),
    )


def network(place: Place) -> dict[str, Any]:
    """The pod network: the demo's bridge, addresses remembered in the demo's directory, no firewall rule."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": str(place.subnet), "gateway": str(place.gateway)}]],
        "dataDir": str(place.state / "ipam"),
    }
    bridge = {"type": "bridge", "bridge": place.bridge, "ipam": ipam}
    return {"cniVersion": "0.4.0", "name": f"{PREFIX}{place.token}", "plugins": [bridge]}


def as_toml(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """One line a key, with its whole path: JSON's scalars and lists are TOML's too."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from as_toml(value, (*path, name))
        else:
            yield f"{'.'.join(map(json.dumps, (*path, name)))} = {json.dumps(value)}"


async def make_bridge(place: Place) -> None:
    """Made here and not by the plugin, which would also turn the host's ip_forward on."""
    await ip("link", "add", place.bridge, "type", "bridge")
    await ip("address", "add", f"{place.gateway}/{place.subnet.prefixlen}", "dev", place.bridge)
    await ip("link", "set", place.bridge, "up")


async def remove_links(names: Iterable[str]) -> None:
    """Delete interfaces; one that is gone, or goes meanwhile with the namespace of its other end, is fine."""
    for name in names:
        try:
            await ip("link", "delete", name)
        except HostFailure:
            if Path("/sys/class/net", name).exists():
                raise


async def ip(*arguments: str) -> None:
    """Run ip(8)."""
    done = await process.run(process.Command(["ip", *arguments], timeout=10))
    if done.returncode != 0:
        raise HostFailure(f"ip {' '.join(arguments)} failed: {done.complaint}")
