"""The containers of the node in memory: what the database says, and what only lives while we do."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from crishim.errors import NotFound
from crishim.host.pidfd import ProcessHandle
from crishim.model.records import ContainerRecord, ContainerState
from crishim.observe.timeline import Timeline


@dataclass(eq=False)
class Container:
    """One container."""

    record: ContainerRecord
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held for every change of state, never while waiting for the container to end."""
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    handle: ProcessHandle | None = None
    """Its first process, while it runs; closed by the one who waits for the end."""
    made_by: Hashable = None
    """The key of the operation that creates it; None if an earlier daemon did."""
    watcher: asyncio.Task[None] | None = None
    kill_timer: asyncio.TimerHandle | None = None
    killed: bool = False
    """Whether SIGKILL has been sent: no gentler signal is wanted after it."""
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def shown(self) -> bool:
        """Whether clients may know of it."""
        return self.record.state is not ContainerState.CREATING

    def send(self, signum: int) -> None:
        """Send a signal to the first process, if it still runs."""
        if self.handle is not None and self.handle.fd >= 0:
            self.handle.send(signum)


@dataclass(frozen=True)
class ContainerFilter:
    """Which containers to list; empty means any. ``id`` may be a prefix."""

    id: str = ""
    sandbox_id: str = ""
    state: ContainerState | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def matches(self, record: ContainerRecord) -> bool:
        """Whether all that is given fits."""
        return (
            record.id.startswith(self.id)
            and record.sandbox_id.startswith(self.sandbox_id)
            and (self.state is None or shown_state(record) is self.state)
            and self.labels.items() <= record.config.labels.items()
        )


def shown_state(record: ContainerRecord) -> ContainerState:
    """The state for clients, who know nothing of removal under way."""
    return ContainerState.EXITED if record.state is ContainerState.REMOVING else record.state


class ContainerTable:
    """All containers by ID."""

    def __init__(self) -> None:
        self._items: dict[str, Container] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, container: Container) -> None:
        """Enter a container."""
        self._items[container.record.id] = container

    def drop(self, container_id: str) -> None:
        """Strike a container out."""
        self._items.pop(container_id, None)

    def find(self, container_id: str) -> Container | None:
        """The container with this ID or unique prefix of one, unless it is still being created."""
        found = self._items.get(container_id)
        if found is None and container_id:
            matching = [item for key, item in self._items.items() if key.startswith(container_id)]
            found = matching[0] if len(matching) == 1 else None
        if found is not None and found.record.state is ContainerState.CREATING:
            return None
        return found

    def get(self, container_id: str) -> Container:
        """Like :meth:`find`; :class:`NotFound` if there is none."""
        found = self.find(container_id)
        if found is None:
            raise NotFound(f"container {container_id!r} does not exist")
        return found

    def select(self, wanted: ContainerFilter) -> list[ContainerRecord]:
        """The records that match, oldest first."""
        return [
            item.record
            for item in self._items.values()
            if item.record.state is not ContainerState.CREATING and wanted.matches(item.record)
        ]

    def of_sandbox(self, sandbox_id: str) -> list[Container]:
        """Every container of a sandbox, also those still being created."""
        return [item for item in self._items.values() if item.record.sandbox_id == sandbox_id]

    def user_of_image(self, image_id: str) -> str:
        """A container that was made from an image, or empty."""
        return next((item.record.id for item in self._items.values() if item.record.image_id == image_id), "")

    def all(self) -> Iterable[Container]:
        """Everything."""
        return list(self._items.values())
