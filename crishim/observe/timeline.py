"""What an operation did and how long each step took: kept with the pod, shown by ``crictl inspectp``."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)
_current: contextvars.ContextVar[Timeline | None] = contextvars.ContextVar("timeline", default=None)

KEEP = 64


@dataclass(frozen=True)
class Step:
    """One step: when it began (nanoseconds since 1970), how long it took (nanoseconds), how it ended."""

    name: str
    began: int
    took: int
    error: str = ""


@dataclass
class Timeline:
    """The latest steps of one object's life; old ones fall off."""

    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=KEEP))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Every :func:`step` of the body, and of tasks that it starts, is written here."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def as_json(self) -> list[dict[str, str | float]]:
        """For verbose ``info``: milliseconds, rounded."""
        return [
            {
                "step": s.name,
                "began": s.began / 1e9,
                "ms": round(s.took / 1e6, 3),
                **({"error": s.error} if s.error else {}),
            }
            for s in self.steps
        ]


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Record the body as a step of the timeline in force, if there is one."""
    timeline = _current.get()
    began, start = time.time_ns(), time.perf_counter_ns()
    error = ""
    try:
        yield
    except BaseException as err:
        error = str(err) or type(err).__name__
        raise
    finally:
        took = time.perf_counter_ns() - start
        if timeline is not None:
            timeline.steps.append(Step(name, began, took, error))
        _log.debug("%s took %.1f ms%s", name, took / 1e6, f", failed: {error}" if error else "")
