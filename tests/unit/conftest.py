"""What holds for every unit test: none of them blocks the event loop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loopguard import guarding


@pytest_asyncio.fixture
async def guarded_loop() -> AsyncIterator[None]:
    """Fails the test if one of its callbacks blocks the loop."""
    with guarding(asyncio.get_running_loop()):
        yield


@pytest.fixture(autouse=True)
def guard_loop(request: pytest.FixtureRequest) -> None:
    """Guards the loop of asynchronous tests; others get no loop."""
    if isinstance(request.node, pytest.Item) and pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("guarded_loop")
