"""Messages made once for each version of a record: lists are asked for every second, records seldom change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar


class _Record(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Record)
M = TypeVar("M")


class MessageCache(Generic[R, M]):
    """The messages of the latest list. A record is never changed in place, so the same record is the same message."""

    def __init__(self, make: Callable[[R], M]) -> None:
        self._make = make
        self._made: dict[str, tuple[R, M]] = {}

    def all(self, records: Iterable[R]) -> list[M]:
        """A message for each record, in order."""
        return [self._one(record) for record in records]

    def prune(self, known: int) -> None:
        """Forget everything once most of it is of records that are gone."""
        if len(self._made) > 2 * known + 64:
            self._made.clear()

    def _one(self, record: R) -> M:
        made = self._made.get(record.id)
        if made is None or made[0] is not record:
            made = self._made[record.id] = (record, self._make(record))
        return made[1]
