"""Tokens: once, soon, and not to be guessed."""

from __future__ import annotations

import re

import pytest

from crishim.errors import ResourceExhausted
from crishim.streaming.tokens import LIFETIME_SECONDS, MAX_WAITING, Tokens


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_good_once() -> None:
    """And for what it was made."""
    tokens: Tokens[str] = Tokens()
    one, two = tokens.offer("one"), tokens.offer("two")
    assert tokens.take(two) == "two"
    assert tokens.take(two) is None
    assert tokens.take(one) == "one"
    assert tokens.take("") is None


def test_a_token_expires() -> None:
    """It is forgotten then, not only refused."""
    clock = Clock()
    tokens: Tokens[str] = Tokens(clock)
    old = tokens.offer("old")
    clock.now += LIFETIME_SECONDS / 2
    young = tokens.offer("young")
    clock.now += LIFETIME_SECONDS / 2
    assert tokens.take(old) is None
    assert len(tokens) == 1
    assert tokens.take(young) == "young"


def test_tokens_cannot_be_guessed() -> None:
    """192 bits each, fit for URLs."""
    tokens: Tokens[int] = Tokens()
    made = {tokens.offer(number) for number in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32}", token) for token in made)


def test_tokens_that_wait_are_bounded() -> None:
    """Who never connects cannot fill memory; the places come back with time."""
    clock = Clock()
    tokens: Tokens[int] = Tokens(clock)
    for number in range(MAX_WAITING):
        tokens.offer(number)
    with pytest.raises(ResourceExhausted):
        tokens.offer(0)
    clock.now += LIFETIME_SECONDS
    tokens.offer(0)
    assert len(tokens) == 1
