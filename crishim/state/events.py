"""What happened to containers, told to everyone who listens, in order."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class EventKind(enum.Enum):
    """The four turns of a container's life that the CRI reports."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


@dataclass(frozen=True)
class Event:
    """One turn; for a sandbox ``container_id`` is its own ID. ``at`` is nanoseconds since 1970."""

    kind: EventKind
    container_id: str
    sandbox_id: str
    at: int


class Events:
    """Where events are told. Listeners are called at once, in order, and must not wait."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` with every event from now on; the result ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, event: Event) -> None:
        """Report an event that is durable already."""
        for listener in list(self._listeners):
            listener(event)
