"""All requirements together."""

from __future__ import annotations

from pathlib import Path

from crishim.cli.requirements import cgroups, files, kernel, network, programs
from crishim.cli.requirements.requirement import Requirement
from crishim.config.settings import Config
from crishim.host.facts import read_facts


async def examine(config: Config) -> list[Requirement]:
    """Look at the host as a daemon with ``config`` would find it; blocks for a moment here and there."""
    facts = read_facts()
    return [
        *kernel.examine(facts, Path(config.root)),
        *cgroups.examine(config.runtime, systemd=facts.systemd),
        *await programs.examine(config.runtime),
        *network.examine(config.network),
        *files.examine(config),
    ]
