"""Tokens: what a CRI call hands out and a client shows once, soon after."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from crishim.errors import ResourceExhausted

T = TypeVar("T")

LIFETIME_SECONDS = 60.0
"""From the call that makes a token to the connection that uses it: what both peers give."""
MAX_WAITING = 1000
"""Tokens that may be out at once; Kubernetes' streaming library has the same bound."""
_BYTES = 24


class Tokens(Generic[T]):
    """What has been offered and not yet taken."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._offers: dict[str, tuple[float, T]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def offer(self, what: T) -> str:
        """A new token for ``what``: 192 random bits, in URL-safe characters."""
        self._expire()
        if len(self._offers) >= MAX_WAITING:
            raise ResourceExhausted(f"{MAX_WAITING} streaming URLs wait for their clients already")
        token = secrets.token_urlsafe(_BYTES)
        self._offers[token] = (self._clock() + LIFETIME_SECONDS, what)
        return token

    def take(self, token: str) -> T | None:
        """What the token is for, once and only in time."""
        self._expire()
        found = self._offers.pop(token, None)
        return found[1] if found is not None else None

    def _expire(self) -> None:
        """Drop the oldest as far as they are out of time: they lie in the order of their making."""
        now = self._clock()
        while self._offers:
            token, (until, _) = next(iter(self._offers.items()))
            if until > now:
                return
            del self._offers[token]
