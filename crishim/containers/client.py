"""A client of exec or attach, as containers see it: where bytes come from and go to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from crishim.host.pump import Inlet, Outlet


class Size(NamedTuple):
    """Of a terminal, in characters."""

    width: int
    height: int


class Sizes:
    """The sizes that a client's terminal takes on."""

    def __init__(self) -> None:
        self.latest: Size | None = None
        self._listener: Callable[[Size], None] | None = None
        self._came = asyncio.Event()

    def push(self, size: Size) -> None:
        """The terminal has a new size."""
        self.latest = size
        self._came.set()
        if self._listener is not None:
            self._listener(size)

    def listen(self, listener: Callable[[Size], None] | None) -> None:
        """Tell ``listener`` of the present size and of all to come; None: nobody any more."""
        self._listener = listener
        if listener is not None and self.latest is not None:
            listener(self.latest)

    async def first(self, timeout: float) -> Size | None:
        """The first size, if it comes within ``timeout`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._came.wait()
        return self.latest


@dataclass(frozen=True)
class Client:
    """The streams that a client asked for; None where it did not."""

    stdin: Inlet | None = None
    stdout: Outlet | None = None
    stderr: Outlet | None = None
    sizes: Sizes = field(default_factory=Sizes)
    gone: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the client has left."""
