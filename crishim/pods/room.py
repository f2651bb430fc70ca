"""What the verbs of this room work with: one value, handed to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from crishim.cni.network import Networks
from crishim.containers.room import Room as ContainerRoom
from crishim.pods.table import SandboxTable


@dataclass(frozen=True)
class Room:
    """The node, as far as pods need it: all that containers need, the networks and the sandboxes."""

    containers: ContainerRoom
    networks: Networks
    table: SandboxTable
    undelivered: dict[str, str] = field(default_factory=dict)
    """Sandboxes made for callers who left before they heard of it: name to ID."""
