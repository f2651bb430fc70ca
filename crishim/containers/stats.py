"""What containers use: cgroup files read on the call, writable layers counted behind the scenes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from crishim.cgroups import stats as cgroup_stats
from crishim.cgroups.stats import Usage
from crishim.containers.room import Room
from crishim.containers.table import Container
from crishim.host.threads import in_thread
from crishim.host.usage import disk_usage
from crishim.model.records import ContainerRecord, ContainerState

COUNT_AGAIN_SECONDS = 30.0
"""How old a count of a writable layer may get before it is made anew."""

_MIN_INTERVAL_NS = 500_000_000


@dataclass(frozen=True)
class LayerUsage:
    """A writable layer as last counted; ``at`` is nanoseconds since 1970."""

    at: int
    used: int
    inodes: int


@dataclass(frozen=True)
class ContainerUsage:
    """One container at one moment; ``nano_cores`` is its rate over the last interval."""

    record: ContainerRecord
    usage: Usage | None
    nano_cores: int | None
    layer: LayerUsage | None


class Meter:
    """Measures containers; remembers what rates and background counts need."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._samples: dict[str, tuple[Usage, int | None]] = {}
        self._layers: dict[str, LayerUsage] = {}

    async def measure(self, containers: Sequence[Container]) -> list[ContainerUsage]:
        """All of ``containers`` in one pass over their cgroup files, in one thread."""
        records = [container.record for container in containers]
        usages = await in_thread(lambda: self._read(records))
        self._forget()
        return [self._one(record, usage) for record, usage in zip(records, usages, strict=True)]

    def _read(self, records: list[ContainerRecord]) -> list[Usage | None]:
        cgroups = self._room.cgroups
        return [
            cgroup_stats.read(cgroups, cgroups.relative_path(record.cgroup))
            if record.state is ContainerState.RUNNING
            else None
            for record in records
        ]

    def _one(self, record: ContainerRecord, usage: Usage | None) -> ContainerUsage:
        self._count_layer(record)
        rate = self._rate(record, usage) if usage is not None else None
        return ContainerUsage(record, usage, rate, self._layers.get(record.id))

    def _rate(self, record: ContainerRecord, usage: Usage) -> int | None:
        """Nanoseconds of CPU per second since the last sample, at first since the start of the container."""
        if usage.cpu_ns is None:
            return None
        known = self._samples.get(record.id)
        if known is not None and usage.at - known[0].at < _MIN_INTERVAL_NS:
            return known[1]
        since, before = (known[0].at, known[0].cpu_ns or 0) if known else (record.started_at, 0)
        rate = max(0, usage.cpu_ns - before) * 1_000_000_000 // max(1, usage.at - since)
        self._samples[record.id] = (usage, rate)
        return rate

    def _count_layer(self, record: ContainerRecord) -> None:
        known = self._layers.get(record.id)
        key = ("count layer", record.id)
        fresh = known is not None and time.time_ns() - known.at < COUNT_AGAIN_SECONDS * 1e9
        if not fresh and not self._room.operations.under_way(key):
            self._room.operations.spawn(key, lambda: self._count(record.id))

    async def _count(self, container_id: str) -> None:
        upper = self._room.paths.writable / container_id / "upper"
        used, inodes = await in_thread(lambda: disk_usage(upper))
        self._layers[container_id] = LayerUsage(time.time_ns(), used, inodes)

    def _forget(self) -> None:
        """Drop what is remembered of containers that are gone, once it is most of it."""
        if len(self._layers) > 2 * len(self._room.table) + 64:
            self._layers.clear()
            self._samples.clear()
