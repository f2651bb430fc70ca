"""Operations: who goes away stops nothing, who comes back joins, and nothing is done twice at once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable

import pytest

from crishim.errors import HostFailure, Unavailable
from crishim.observe.metrics import REGISTRY
from crishim.state.operations import Operations


class Work:
    """An operation that waits until it is told how to end, and counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = False
        self.cleaning = asyncio.Event()
        self.cleaned = asyncio.Event()
        self.cleaned.set()
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        self.begun += 1
        try:
            return await asyncio.shield(self.outcome)
        except asyncio.CancelledError:
            self.cancelled = True
            self.cleaning.set()
            await self.cleaned.wait()
            raise


async def spin() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def give_up(task: asyncio.Task[str]) -> None:
    """Cancel a caller."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
async def operations() -> Operations:
    """None under way."""
    return Operations()


@pytest.fixture
async def work() -> Work:
    """One operation."""
    return Work()


async def test_result(operations: Operations, work: Work) -> None:
    """Of the operation; afterwards it is not under way, and can be done again."""
    task = asyncio.create_task(operations.join("a", work))
    await spin()
    assert operations.under_way("a")
    work.outcome.set_result("done")
    assert await task == "done"
    assert not operations.under_way("a")
    assert await operations.join("a", work) == "done"
    assert work.begun == 2


async def test_cancelled_caller(operations: Operations, work: Work) -> None:
    """The operation goes on, and a retry joins it instead of starting another."""
    task = asyncio.create_task(operations.join("a", work))
    await spin()
    await give_up(task)
    assert operations.under_way("a")
    assert not work.cancelled
    retry = asyncio.create_task(operations.join("a", work))
    await spin()
    work.outcome.set_result("done")
    assert await retry == "done"
    assert work.begun == 1


async def test_deadline_of_a_caller(operations: Operations, work: Work) -> None:
    """The same for a caller whose time runs out."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await operations.join("a", work)
    work.outcome.set_result("done")
    assert await operations.join("a", work) == "done"
    assert work.begun == 1


async def test_many_callers(operations: Operations, work: Work) -> None:
    """Share one operation; one that leaves takes nothing from the others."""
    tasks = [asyncio.create_task(operations.join("a", work)) for _ in range(10)]
    await spin()
    await give_up(tasks[0])
    work.outcome.set_result("done")
    assert await asyncio.gather(*tasks[1:]) == ["done"] * 9
    assert work.begun == 1


async def test_keys_are_apart(operations: Operations) -> None:
    """Other keys are other operations, at the same time."""
    works = {key: Work() for key in ("a", ("a", 1), 1)}
    tasks = {key: asyncio.create_task(operations.join(key, work)) for key, work in works.items()}
    await spin()
    for key, work in reversed(works.items()):
        work.outcome.set_result(str(key))
        assert await tasks[key] == str(key)


async def test_failure(operations: Operations, work: Work) -> None:
    """Is told to all who wait; the key is free at once, and a retry starts anew."""
    tasks = [asyncio.create_task(operations.join("a", work)) for _ in range(3)]
    await spin()
    work.outcome.set_exception(HostFailure("disk full"))
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, HostFailure)
    assert not operations.under_way("a")
    again = Work()
    again.outcome.set_result("done")
    assert await operations.join("a", again) == "done"


async def test_retry_at_the_moment_of_failure(operations: Operations, work: Work) -> None:
    """The key is free when the caller hears of the failure."""
    work.outcome.set_exception(HostFailure("disk full"))
    with pytest.raises(HostFailure):
        await operations.join("a", work)
    again = Work()
    again.outcome.set_result("done")
    assert await operations.join("a", again) == "done"
    assert again.begun == 1


async def test_failure_that_nobody_waits_for(
    operations: Operations, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """Is a warning in the log, frees the key, and leaves asyncio nothing to complain of."""
    task = asyncio.create_task(operations.join(("pull", 5, "web"), work))
    await spin()
    await give_up(task)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with caplog.at_level(logging.WARNING, "crishim"):
        work.outcome.set_exception(HostFailure("disk full"))
        await operations.settle()
    assert [record.getMessage() for record in caplog.records] == ["pull web failed: disk full"]
    assert not operations.count()
    await spin()
    assert complaints == []


async def test_failure_that_somebody_waits_for(
    operations: Operations, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """Is the caller's to report: no warning."""
    task = asyncio.create_task(operations.join("a", work))
    await spin()
    with caplog.at_level(logging.WARNING, "crishim"):
        work.outcome.set_exception(HostFailure("disk full"))
        await asyncio.gather(task, return_exceptions=True)
    assert not caplog.records


async def test_an_operation_may_use_others(operations: Operations, work: Work) -> None:
    """RunPodSandbox stops an old sandbox first."""

    async def outer() -> str:
        return "outer " + await operations.join("inner", work)

    work.outcome.set_result("inner")
    assert await operations.join("outer", outer) == "outer inner"


async def test_spawn(operations: Operations, work: Work) -> None:
    """Starts without waiting; a caller can join it later."""
    task = operations.spawn("a", work)
    assert operations.under_way("a")
    joined = asyncio.create_task(operations.join("a", work))
    await spin()
    work.outcome.set_result("done")
    assert (await task, await joined) == ("done", "done")
    assert work.begun == 1


async def test_finished(operations: Operations, work: Work) -> None:
    """Waits for one key, whatever comes of it; a key that is not under way is finished."""
    await operations.finished("a")
    operations.spawn("a", work)
    other = Work()
    operations.spawn("b", other)
    waiting = asyncio.create_task(operations.finished("a"))
    await spin()
    assert not waiting.done()
    work.outcome.set_exception(HostFailure("no"))
    await waiting
    assert operations.count() == 1
    other.outcome.set_result("done")
    await operations.settle()
    assert operations.count() == 0


async def test_aborted_operation(operations: Operations, work: Work) -> None:
    """StopPodSandbox undoes a RunPodSandbox: it waits for the clean-up, and the first caller hears a reason."""
    work.cleaned.clear()
    caller = asyncio.create_task(operations.join(("run", "web", 1), work))
    await spin()
    aborting = asyncio.create_task(operations.finished(("run", "web", 1), cancel=True))
    await work.cleaning.wait()
    await spin()
    assert not aborting.done()
    work.cleaned.set()
    await aborting
    with pytest.raises(Unavailable, match="run web was aborted"):
        await caller


async def test_settle(operations: Operations) -> None:
    """Waits for all, for those whose callers are gone, for those that fail, and for those begun meanwhile."""
    ended: list[str] = []

    def work(name: str, then: Callable[[], object] = lambda: None) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            await asyncio.sleep(0.01)
            ended.append(name)
            then()

        return body

    def fail() -> None:
        raise HostFailure("no")

    operations.spawn("a", work("a", lambda: operations.spawn("b", work("b"))))
    operations.spawn("c", work("c", fail))
    task = asyncio.create_task(operations.join("d", work("d")))
    await spin()
    task.cancel()
    await operations.settle()
    assert sorted(ended) == ["a", "b", "c", "d"]
    await operations.settle()


async def test_abandoned_operation(operations: Operations, work: Work) -> None:
    """With abandon, the last caller to leave stops it and waits for its clean-up."""
    work.cleaned.clear()
    tasks = [asyncio.create_task(operations.join("a", work, abandon=True)) for _ in range(2)]
    await spin()
    await give_up(tasks[0])
    assert not work.cancelled
    tasks[1].cancel()
    await work.cleaning.wait()
    await spin()
    assert not tasks[1].done()
    work.cleaned.set()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert not operations.under_way("a")


async def test_abandon_spares_those_who_stay(operations: Operations, work: Work) -> None:
    """One who does not abandon keeps the operation alive."""
    leaving = asyncio.create_task(operations.join("a", work, abandon=True))
    staying = asyncio.create_task(operations.join("a", work))
    await spin()
    await give_up(leaving)
    assert not work.cancelled
    work.outcome.set_result("done")
    assert await staying == "done"


async def test_joining_while_it_is_abandoned(operations: Operations, work: Work) -> None:
    """The next pull of a layer starts after the clean-up of the last one; it is not cancelled along with it."""
    work.cleaned.clear()
    leaving = asyncio.create_task(operations.join("a", work, abandon=True))
    await spin()
    leaving.cancel()
    await work.cleaning.wait()
    again = Work()
    again.outcome.set_result("done")
    coming = [asyncio.create_task(operations.join("a", again, abandon=True)) for _ in range(2)]
    await spin()
    assert again.begun == 0
    work.cleaned.set()
    assert await asyncio.gather(*coming) == ["done", "done"]
    assert again.begun == 1
    with contextlib.suppress(asyncio.CancelledError):
        await leaving


async def test_leaving_after_the_end(operations: Operations, work: Work) -> None:
    """Abandoning what is done is nothing."""
    task = asyncio.create_task(operations.join("a", work, abandon=True))
    await spin()
    work.outcome.set_result("done")
    assert await task == "done"
    again = Work()
    joined = asyncio.create_task(operations.join("a", again))
    await spin()
    task.cancel()
    await spin()
    assert not again.cancelled
    again.outcome.set_result("again")
    assert await joined == "again"


async def test_context_of_the_first_caller(operations: Operations) -> None:
    """Its log lines and steps are those of the request that began it."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

    async def body() -> str:
        await asyncio.sleep(0)
        return variable.get()

    variable.set("first")
    assert await operations.join("a", body) == "first"


async def test_metric(operations: Operations, work: Work) -> None:
    """The gauge counts what is under way, also after a failure."""

    def gauge() -> float | None:
        return REGISTRY.get_sample_value("crishim_operations")

    before = gauge()
    assert before is not None
    task = asyncio.create_task(operations.join("a", work))
    await spin()
    assert gauge() == before + 1
    work.outcome.set_exception(HostFailure("no"))
    with pytest.raises(HostFailure):
        await task
    assert gauge() == before
