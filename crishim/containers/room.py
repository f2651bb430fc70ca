"""What the verbs of this room work with: one value, handed to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from crishim.cgroups.layout import Cgroups
from crishim.config.paths import Paths
from crishim.config.settings import RuntimeSettings
from crishim.containers.table import ContainerTable
from crishim.host.facts import HostFacts
from crishim.images.store import ImageStore
from crishim.layers.store import LayerStore
from crishim.runtimes.handlers import Handlers
from crishim.state.events import Events
from crishim.state.operations import Operations
from crishim.state.store import Store


@dataclass(frozen=True)
class Room:
    """The node, as far as containers need it."""

    settings: RuntimeSettings
    paths: Paths
    facts: HostFacts
    cgroups: Cgroups
    store: Store
    operations: Operations
    handlers: Handlers
    images: ImageStore
    layers: LayerStore
    table: ContainerTable
    events: Events
    undelivered: dict[str, str] = field(default_factory=dict)
    """Containers made for callers who left before they heard of it: name to ID."""
