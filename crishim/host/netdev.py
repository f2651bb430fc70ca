"""Interface counters of a network namespace: proc_net_dev(5), read from within."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crishim.host.namespaces import enter


@dataclass(frozen=True)
class Interface:
    """Counters since the interface was made."""

    name: str
    rx_bytes: int
    rx_errors: int
    tx_bytes: int
    tx_errors: int


def interfaces(namespace: Path | None) -> list[Interface]:
    """The interfaces of the namespace pinned at ``namespace``, of our own for None, without ``lo``; blocks."""
    text = enter([namespace], _read) if namespace is not None else _read()
    return [_parse(line) for line in text.splitlines()[2:] if not line.strip().startswith("lo:")]


def _read() -> str:
    return Path("/proc/thread-self/net/dev").read_text()


def _parse(line: str) -> Interface:
    name, _, rest = line.partition(":")
    fields = [int(field) for field in rest.split()]
    return Interface(name.strip(), fields[0], fields[2], fields[8], fields[10])
