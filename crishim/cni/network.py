"""Attaches a pod to its network and takes it off again, by running CNI plugins.

Source: the CNI specification 1.1.0, sections 2 (protocol) and 4 (execution).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crishim.cni.config import NetworkConfig, choose, find_plugin
from crishim.config.settings import NetworkSettings
from crishim.errors import ConfigError, DeadlineExceeded, HostFailure
from crishim.host import process
from crishim.observe.timeline import step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attachment:
    """One pod's interface in one network."""

    config: NetworkConfig
    sandbox_id: str
    netns: str
    """Path of the namespace; empty for DEL when it is gone."""
    ifname: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    """CNI_ARGS: who the pod is."""
    capability_args: Mapping[str, Any] = field(default_factory=dict)
    """What plugins with a matching capability are told, such as ``portMappings``."""

    def environment(self, command: str, bin_dirs: list[str]) -> dict[str, str]:
        """The environment of a plugin."""
        return {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.sandbox_id,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": self.ifname,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in self.arguments.items()),
            "CNI_PATH": os.pathsep.join(bin_dirs),
        }


class Networks:
    """The node's pod network."""

    def __init__(self, settings: NetworkSettings) -> None:
        self._settings = settings

    def current(self) -> NetworkConfig:
        """The configuration for new pods; :class:`ConfigError` if there is none or a plugin is missing."""
        config = choose(Path(self._settings.conf_dir))
        for kind in config.programs():
            if find_plugin(kind, self._settings.bin_dirs) is None:
                raise ConfigError(
                    f"cni plugin {kind} of network {config.name} is not in {', '.join(self._settings.bin_dirs)}"
                )
        return config

    async def add(self, attachment: Attachment) -> dict[str, Any]:
        """Run ADD through the list; the result is the last plugin's. The caller undoes a failure with DEL."""
        result: Any = None
        for plugin in attachment.config.plugins:
            result = await self._run("ADD", attachment, plugin, result)
            if not isinstance(result, dict):
                raise HostFailure(f"cni plugin {plugin['type']} answered ADD with no result")
        return dict(result)

    async def delete(self, attachment: Attachment, previous: Any | None) -> None:
        """Run DEL through the list in reverse; all plugins are tried, then the first failure is raised."""
        failure: Exception | None = None
        for plugin in reversed(attachment.config.plugins):
            try:
                await self._run("DEL", attachment, plugin, previous)
            except (HostFailure, DeadlineExceeded) as err:
                failure = failure or err
        if failure is not None:
            raise failure

    async def _run(self, command: str, attachment: Attachment, plugin: Mapping[str, Any], previous: Any) -> Any:
        kind = str(plugin["type"])
        program = find_plugin(kind, self._settings.bin_dirs)
        if program is None:
            raise HostFailure(f"cni plugin {kind} is not in {', '.join(self._settings.bin_dirs)}")
        call = process.Command(
            [str(program)],
            stdin=attachment.config.plugin_input(plugin, attachment.capability_args, previous),
            env=attachment.environment(command, self._settings.bin_dirs),
            timeout=self._settings.plugin_timeout,
        )
        with step(f"cni {command.lower()} {kind}"):
            return _answer(command, kind, await process.run(call), self._settings.plugin_timeout)


def _answer(command: str, kind: str, done: process.Completed, timeout: float) -> Any:
    if done.timed_out:
        raise DeadlineExceeded(f"cni plugin {kind} did not finish {command} within {timeout:g} s")
    try:
        answer = json.loads(done.stdout) if done.stdout.strip() else None
    except ValueError:
        answer = None
    if done.returncode != 0:
        complaint = done.complaint
        if isinstance(answer, dict) and answer.get("msg"):
            complaint = ": ".join(str(answer[key]) for key in ("msg", "details") if answer.get(key))
        raise HostFailure(f"cni plugin {kind} failed to {command.lower()}: {complaint}")
    return answer


def result_ips(result: Mapping[str, Any], ifname: str) -> list[str]:
    """The pod's own addresses in a result, without prefix length, in the result's order.

    Results of version 0.3 and later list ``ips`` with an index into ``interfaces``; addresses of other
    interfaces (the host's end) are left out. Version 0.2 has ``ip4`` and ``ip6``.
    """
    interfaces = result.get("interfaces") or []
    found = []
    for item in result.get("ips") or []:
        index = item.get("interface")
        if index is not None and 0 <= index < len(interfaces):
            owner = interfaces[index]
            if not owner.get("sandbox") or owner.get("name", ifname) != ifname:
                continue
        found.append(str(item["address"]).partition("/")[0])
    old = [result[family] for family in ("ip4", "ip6") if isinstance(result.get(family), dict)]
    return found + [str(item["ip"]).partition("/")[0] for item in old if item.get("ip")]
