"""CNI network configurations: which file counts, and what a plugin is given.

Source: the CNI specification 1.1.0 (github.com/containernetworking/cni, SPEC.md), sections 1 and 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crishim.errors import ConfigError

SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


@dataclass(frozen=True)
class NetworkConfig:
    """One network: a list of plugins, run in order for ADD and in reverse for DEL."""

    name: str
    cni_version: str
    plugins: tuple[Mapping[str, Any], ...]
    source: str = ""
    disable_check: bool = False

    def as_json(self) -> str:
        """The list as it goes into the database."""
        return json.dumps({"name": self.name, "cniVersion": self.cni_version, "plugins": list(self.plugins)})

    def plugin_types(self) -> list[str]:
        """The plugins' names, in order."""
        return [str(plugin["type"]) for plugin in self.plugins]

    def programs(self) -> list[str]:
        """All programs it needs: the plugins, and those that they ask for addresses."""
        ipam = [plugin["ipam"].get("type") for plugin in self.plugins if isinstance(plugin.get("ipam"), dict)]
        return [*self.plugin_types(), *(str(kind) for kind in ipam if kind)]

    def plugin_input(
        self, plugin: Mapping[str, Any], capability_args: Mapping[str, Any], previous: Any | None
    ) -> bytes:
        """What ``plugin`` reads on stdin: its part, the list's name and version, what it asked to be told."""
        given = {key: value for key, value in plugin.items() if key != "capabilities"}
        given |= {"name": self.name, "cniVersion": self.cni_version}
        wanted = plugin.get("capabilities") or {}
        runtime_config = {key: value for key, value in capability_args.items() if wanted.get(key)}
        if runtime_config:
            given["runtimeConfig"] = runtime_config
        if previous is not None:
            given["prevResult"] = previous
        return json.dumps(given).encode()


def parse(text: str | bytes, source: str = "") -> NetworkConfig:
    """A conflist, or a single plugin's configuration as a list of one; :class:`ConfigError` says what is wrong."""
    try:
        data = json.loads(text)
    except ValueError as err:
        raise ConfigError(f"cni configuration {source}: not JSON: {err}") from err
    if not isinstance(data, dict):
        raise ConfigError(f"cni configuration {source}: not an object")
    plugins = data.get("plugins") if "plugins" in data else [data]
    name, version = data.get("name"), data.get("cniVersion") or "0.2.0"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"cni configuration {source}: no name")
    if version not in SUPPORTED:
        raise ConfigError(f"cni configuration {source}: cniVersion {version!r} is not one of {', '.join(SUPPORTED)}")
    if not isinstance(plugins, list) or not plugins:
        raise ConfigError(f"cni configuration {source}: no plugins")
    for plugin in plugins:
        kind = plugin.get("type") if isinstance(plugin, dict) else None
        if not isinstance(kind, str) or not kind or "/" in kind:
            raise ConfigError(f"cni configuration {source}: plugin without a valid type")
        if not isinstance(plugin.get("capabilities") or {}, dict):
            raise ConfigError(f"cni configuration {source}: capabilities of plugin {kind} is not an object")
    return NetworkConfig(name, version, tuple(plugins), source, bool(data.get("disableCheck")))


def choose(conf_dir: Path) -> NetworkConfig:
    """The first valid configuration of ``conf_dir`` in the order of names, as kubelets expect.

    :class:`ConfigError` if there is none; it names the first file that is wrong.
    """
    try:
        files = sorted(path for path in conf_dir.iterdir() if path.suffix in (".conflist", ".conf", ".json"))
    except OSError as err:
        raise ConfigError(f"no cni configuration: {conf_dir}: {(err.strerror or '').lower()}") from err
    problems = []
    for path in files:
        try:
            return parse(path.read_bytes(), str(path))
        except OSError as err:
            problems.append(f"{path}: {err.strerror}")
        except ConfigError as err:
            problems.append(str(err))
    raise ConfigError(problems[0] if problems else f"no cni configuration in {conf_dir}")


def find_plugin(kind: str, bin_dirs: list[str]) -> Path | None:
    """The program of a plugin type."""
    return next((path for folder in bin_dirs if (path := Path(folder, kind)).is_file()), None)
