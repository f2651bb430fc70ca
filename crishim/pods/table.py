"""The sandboxes of the node in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from crishim.errors import NotFound
from crishim.model.records import SandboxRecord, SandboxState, sandbox_name
from crishim.observe.timeline import Timeline

_HIDDEN = (SandboxState.CREATING, SandboxState.LINGERING)


@dataclass(eq=False)
class Sandbox:
    """One pod sandbox."""

    record: SandboxRecord
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held for every change of state."""
    watcher: asyncio.Task[None] | None = None
    """Waits for the end of the process that holds a shared PID namespace."""
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(frozen=True)
class SandboxFilter:
    """Which sandboxes to list; empty means any. ``id`` may be a prefix."""

    id: str = ""
    ready: bool | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def matches(self, record: SandboxRecord) -> bool:
        """Whether all that is given fits."""
        return (
            record.id.startswith(self.id)
            and (self.ready is None or (record.state is SandboxState.READY) is self.ready)
            and self.labels.items() <= record.config.labels.items()
        )


class SandboxTable:
    """All sandboxes by ID."""

    def __init__(self) -> None:
        self._items: dict[str, Sandbox] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, sandbox: Sandbox) -> None:
        """Enter a sandbox."""
        self._items[sandbox.record.id] = sandbox

    def drop(self, sandbox_id: str) -> None:
        """Strike a sandbox out."""
        self._items.pop(sandbox_id, None)

    def find(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox with this ID or unique prefix of one, unless it is still being created."""
        found = self._items.get(sandbox_id)
        if found is None and sandbox_id:
            matching = [item for key, item in self._items.items() if key.startswith(sandbox_id)]
            found = matching[0] if len(matching) == 1 else None
        return found if found is not None and found.record.state not in _HIDDEN else None

    def get(self, sandbox_id: str) -> Sandbox:
        """Like :meth:`find`; :class:`NotFound` if there is none."""
        found = self.find(sandbox_id)
        if found is None:
            raise NotFound(f"pod sandbox {sandbox_id!r} does not exist")
        return found

    def named(self, name: str) -> Sandbox | None:
        """The sandbox that has this name."""
        owners = (item for item in self._items.values() if item.record.state is not SandboxState.LINGERING)
        return next((item for item in owners if sandbox_name(item.record.config) == name), None)

    def select(self, wanted: SandboxFilter) -> list[SandboxRecord]:
        """The records that match, oldest first."""
        return [
            item.record
            for item in self._items.values()
            if item.record.state not in _HIDDEN and wanted.matches(item.record)
        ]

    def all(self) -> Iterable[Sandbox]:
        """Everything."""
        return list(self._items.values())
