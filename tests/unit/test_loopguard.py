"""The guard itself: it sees what blocks the loop, and nothing else."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import loopguard
import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py")

BAD = """
import asyncio, time
import pytest

async def test_blocks():
    await asyncio.sleep(0)
    time.sleep(0.6)

async def test_waits():
    await asyncio.sleep(0.6)

def test_blocks_without_a_loop():
    time.sleep(0.6)

@pytest.mark.parametrize("seconds", [0.6])
async def test_blocks_in_a_callback(seconds):
    asyncio.get_running_loop().call_soon(time.sleep, seconds)
    await asyncio.sleep(0.01)
"""


async def test_sees_a_blocked_loop() -> None:
    """Whether in a callback or in the task itself; the message names the culprit and the time."""
    loop = asyncio.get_running_loop()
    with loopguard.watching(loop, 0.02) as blocked:
        loop.call_soon(time.sleep, 0.03)
        await asyncio.sleep(0.001)
        time.sleep(0.03)
        await asyncio.sleep(0)
    assert len(blocked) == 2
    assert "sleep" in blocked[0]
    assert "test_sees_a_blocked_loop" in blocked[1]


async def test_leaves_a_free_loop_alone() -> None:
    """Waiting, short work and threads do not count."""
    loop = asyncio.get_running_loop()
    with loopguard.guarding(loop, 0.1):
        await asyncio.gather(asyncio.sleep(0.15), asyncio.to_thread(time.sleep, 0.15))


async def test_fails_and_restores_the_loop() -> None:
    """The failure is the test's; afterwards the loop is as it was."""
    loop = asyncio.get_running_loop()
    before = loop.get_debug(), loop.slow_callback_duration
    with pytest.raises(pytest.fail.Exception, match="blocked"), loopguard.guarding(loop, 0.01):
        time.sleep(0.02)
        await asyncio.sleep(0)
    assert (loop.get_debug(), loop.slow_callback_duration) == before


def test_conftest_guards_asynchronous_tests(pytester: pytest.Pytester) -> None:
    """In a run with our conftest, exactly the tests that block are reported."""
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    unit = pytester.mkdir("tests") / "unit"
    unit.mkdir()
    (unit.parent / "loopguard.py").write_text(Path(loopguard.__file__).read_text())
    (unit / "conftest.py").write_text(CONFTEST.read_text())
    (unit / "test_bad.py").write_text(BAD)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(["ERROR*test_blocks - *", "ERROR*test_blocks_in_a_callback*"])
