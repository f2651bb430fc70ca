"""The pod network: its configuration, the plugins that it names, and what those need of the host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crishim.cli.requirements.requirement import Requirement
from crishim.cni.config import NetworkConfig, choose, find_plugin
from crishim.config.settings import NetworkSettings
from crishim.errors import ConfigError

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def examine(settings: NetworkSettings) -> list[Requirement]:
    """The network that new pods would get."""
    try:
        config = choose(Path(settings.conf_dir))
    except ConfigError as err:
        advice = f"put a network configuration (NAME.conflist) into {settings.conf_dir}"
        return [Requirement("cni network", err.message, False, advice=advice), forwarding()]
    return [
        Requirement("cni network", f"{config.name}, from {config.source}"),
        *(plugin(kind, settings.bin_dirs) for kind in programs(config)),
        *iptables(config, shutil.which("iptables")),
        forwarding(),
    ]


def programs(config: NetworkConfig) -> list[str]:
    """The plugins of the list and those that they call for addresses, each once."""
    ipam = [part.get("ipam") for part in config.plugins]
    called = [str(part["type"]) for part in ipam if isinstance(part, dict) and part.get("type")]
    return list(dict.fromkeys([*config.plugin_types(), *called]))


def plugin(kind: str, bin_dirs: list[str]) -> Requirement:
    """One plugin's program."""
    path = find_plugin(kind, bin_dirs)
    found, ok = str(path), True
    if path is None or not os.access(path, os.X_OK):
        found, ok = f"{path} is not executable" if path else f"not in {', '.join(bin_dirs)}", False
    return Requirement(f"cni plugin {kind}", found, ok, advice="install the CNI plugins, or set network.bin_dirs")


def iptables(config: NetworkConfig, path: str | None) -> Iterator[Requirement]:
    """The program, if a plugin of the list runs it; portmap does only for pods with host ports."""
    users = dict(_users_of_iptables(config))
    if users:
        yield Requirement(
            "iptables",
            path or f"not on PATH, plugin {', '.join(users)} runs it",
            path is not None,
            needed=any(users.values()),
            advice="install iptables",
        )


def _users_of_iptables(config: NetworkConfig) -> Iterator[tuple[str, bool]]:
    """Plugins that run it, and whether they do for every pod."""
    for part in config.plugins:
        kind = str(part["type"])
        nft = "nftables" in (part.get("backend"), part.get("ipMasqBackend"))
        if kind in ("bridge", "ptp") and part.get("ipMasq") and not nft:
            yield kind, True
        elif kind in ("portmap", "firewall") and not nft:
            yield kind, kind == "firewall"


def forwarding() -> Requirement:
    """Without it pods reach no further than their node."""
    try:
        on = _FORWARDING.read_text().strip() == "1"
    except OSError:
        on = False
    return Requirement(
        "ip_forward", "on" if on else "off", on, needed=False, advice="set the sysctl net.ipv4.ip_forward to 1"
    )
