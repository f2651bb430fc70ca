"""One requirement as a value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """What was looked at, what was found, and what to do if that is not good enough."""

    name: str
    found: str
    ok: bool = True
    needed: bool = True
    """Whether pods cannot run without it; anything else is only worth a warning."""
    advice: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``warning`` or ``missing``."""
        if self.ok:
            return "ok"
        return "missing" if self.needed else "warning"


def can_run_pods(found: Iterable[Requirement]) -> bool:
    """Whether everything is there that pods need."""
    return all(requirement.ok for requirement in found if requirement.needed)


def gist(err: OSError) -> str:
    """An error of the system as part of a sentence."""
    return (err.strerror or str(err)).lower()
