"""Running programs: bounded in time and output, never hanging on a pipe, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crishim.errors import Code, HostFailure
from crishim.host import pidfd, process
from crishim.host.process import DRAIN_SECONDS, Command, Completed, run


def count_descriptors() -> int:
    """How many descriptors we have open."""
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Our children, zombies included."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def gone(pid: int) -> bool:
    """Whether a process has ended, be it a zombie of someone else."""
    return pidfd.start_time(pid) == 0


async def until(true: Callable[[], object]) -> None:
    """Wait a moment for something that is about to happen."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 (another process does it)
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test ends with the descriptors and children that it began with: no leak, no zombie."""
    fds, before = count_descriptors(), children()
    yield
    assert count_descriptors() <= fds, "descriptors were leaked"
    assert children() <= before, "a child was not reaped"


def sh(script: str, **fields: object) -> Command:
    """A shell script."""
    return Command(["/bin/sh", "-c", script], **fields)  # type: ignore[arg-type]


class Timer:
    """How long the body took."""

    def __enter__(self) -> Timer:
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began


async def test_output_and_status() -> None:
    """Both streams apart, byte by byte."""
    done = await run(sh(r"printf 'out\0\377'; printf err >&2; exit 3"))
    assert done == Completed(done.argv, 3, b"out\0\xff", b"err")
    assert not done.timed_out


async def test_killed_by_a_signal() -> None:
    """A negative return code."""
    done = await run(sh("kill -TERM $$"))
    assert done.returncode == -signal.SIGTERM
    assert done.complaint == "killed by signal 15"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo a >&2; echo ' b ' >&2; echo >&2; exit 1", " b"),
        ("echo out; exit 7", "exit status 7"),
        (r"printf '\377x' >&2; exit 1", "\ufffdx"),
    ],
)
async def test_complaint(script: str, complaint: str) -> None:
    """The last line of standard error, else how it ended."""
    assert (await run(sh(script))).complaint == complaint


async def test_environment_and_directory(tmp_path: Path) -> None:
    """Exactly what was given; the standard input is empty unless given."""
    done = await run(sh('echo "$A-$HOME-$PWD"; cat', env={"A": "b"}, cwd=str(tmp_path)))
    assert done.stdout.decode() == f"b--{tmp_path}\n"


async def test_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, ours."""
    monkeypatch.setenv("CRISHIM_TEST", "x")
    assert (await run(sh("echo $CRISHIM_TEST"))).stdout == b"x\n"


async def test_descriptors_of_the_child() -> None:
    """Only the standard three."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        found = (await run(Command(["/bin/ls", "/proc/self/fd"]))).stdout.split()
        assert str(writer).encode() not in found
        assert {b"0", b"1", b"2"} <= set(found)
        assert len(found) == 4, "ls itself has the folder open"
    finally:
        os.close(reader)
        os.close(writer)


async def test_missing_program() -> None:
    """An error that names it, at once."""
    with pytest.raises(HostFailure, match=r"cannot start /no/such: No such file") as caught:
        await run(Command(["/no/such", "x"], stdin=b"x"))
    assert caught.value.code is Code.INTERNAL


async def test_program_that_cannot_run(tmp_path: Path) -> None:
    """Not executable, or of no known format."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(HostFailure, match=r"file: Permission denied"):
        await run(Command([str(file)]))
    file.write_bytes(b"\x7fELF garbage")
    file.chmod(0o755)
    with pytest.raises(HostFailure, match="format"):
        await run(Command([str(file)]))


async def test_output_limit() -> None:
    """What is more is read and dropped, for each stream: the program is not stopped by a full pipe."""
    script = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2; exit 5"
    done = await run(sh(script, output_limit=1000, timeout=10))
    assert (len(done.stdout), len(done.stderr), done.returncode) == (1000, 1000, 5)


async def test_output_limit_is_exact() -> None:
    """One byte less than the limit, the limit, one more."""
    for size in (99, 100, 101):
        assert len((await run(sh(f"head -c {size} /dev/zero", output_limit=100))).stdout) == min(size, 100)


async def test_large_output() -> None:
    """All of it arrives, also what was in the pipe when the program ended."""
    done = await run(sh("head -c 5000000 /dev/zero; printf end", output_limit=1 << 30))
    assert len(done.stdout) == 5_000_003
    assert done.stdout.endswith(b"end")


async def test_endless_output() -> None:
    """Bounded by the timeout, and the loop lives on meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    done = await run(Command(["/usr/bin/yes"], timeout=0.3, output_limit=10))
    ticker.cancel()
    assert done.timed_out
    assert done.stdout == b"y\ny\ny\ny\ny\n"
    assert ticks > 3


async def test_timeout_kills_the_group(tmp_path: Path) -> None:
    """Children included; what was printed until then is kept."""
    pids = tmp_path / "pids"
    with Timer() as timer:
        done = await run(sh(f"echo hello; sleep 60 & echo $$ $! > {pids}; wait", timeout=0.3))
    assert done.timed_out
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b"hello\n"
    assert timer.seconds < 0.3 + DRAIN_SECONDS + 1
    for pid in pids.read_text().split():
        await until(functools.partial(gone, int(pid)))


async def test_timeout_of_a_program_that_ignores_signals() -> None:
    """SIGKILL is not ignored."""
    done = await run(sh("trap '' TERM INT HUP; while :; do sleep 0.05; done", timeout=0.2))
    assert done.timed_out


async def test_no_timeout_in_time() -> None:
    """A program that ends before it has not timed out."""
    assert not (await run(sh("exit 0", timeout=20))).timed_out


async def test_child_that_keeps_the_output_open(tmp_path: Path) -> None:
    """A daemon left behind delays nothing but the drain, and is left alone."""
    pid_file = tmp_path / "pid"
    with Timer() as timer:
        done = await run(sh(f"echo hello; sleep 60 & echo $! > {pid_file}", timeout=20))
    pid = int(pid_file.read_text())
    try:
        assert (done.returncode, done.stdout, done.timed_out) == (0, b"hello\n", False)
        assert timer.seconds < DRAIN_SECONDS + 1
        assert not gone(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_child_that_goes_on_printing(tmp_path: Path) -> None:
    """The drain ends all the same."""
    pid_file = tmp_path / "pid"
    with Timer() as timer:
        done = await run(sh(f"yes & echo $! > {pid_file}", timeout=20, output_limit=10))
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert not done.timed_out
    assert timer.seconds < DRAIN_SECONDS + 1


async def test_end_of_the_output_ends_the_wait() -> None:
    """The drain is only waited for as long as somebody has the output open."""
    with Timer() as timer:
        for _ in range(10):
            assert (await run(sh("echo x"))).stdout == b"x\n"
    assert timer.seconds < 10 * DRAIN_SECONDS * 0.8


async def test_nothing_of_a_program_disturbs_the_next(tmp_path: Path) -> None:
    """Which gets the same descriptors: those that were still read or written are forgotten by the loop."""
    pid_file = tmp_path / "pid"
    for number in range(3):
        done = await run(sh(f"exec 3<&0; sleep 60 & echo $! > {pid_file}", stdin=b"x" * 1_000_000, timeout=20))
        assert done.returncode == 0
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        data = str(number).encode() * 100_000
        assert (await run(Command(["/bin/cat"], stdin=data, timeout=20))).stdout == data


@pytest.mark.parametrize("size", [1, 65536, 65537, 5_000_000])
async def test_input(size: int) -> None:
    """Arrives whole, with its end."""
    data = os.urandom(size)
    done = await run(Command(["/bin/cat"], stdin=data, output_limit=1 << 30, timeout=20))
    assert done.stdout == data


async def test_input_that_is_read_slowly() -> None:
    """The loop is free meanwhile, and nothing is lost."""
    data = b"x" * 3_000_000
    code = """if True:
        import os, time
        count = 0
        while data := os.read(0, 300_000):
            count += len(data)
            time.sleep(0.001)
        print(count)
    """
    done = await run(Command([sys.executable, "-S", "-c", code], stdin=data, timeout=20))
    assert done.stdout == b"3000000\n"


@pytest.mark.parametrize("script", ["exit 0", "exec <&-; sleep 0.1", "head -c 10 >/dev/null", "sleep 0.1"])
async def test_input_that_is_not_read(script: str) -> None:
    """Whatever the program does with its end, it is its status that counts."""
    done = await run(sh(script, stdin=b"x" * 5_000_000, timeout=20))
    assert (done.returncode, done.timed_out) == (0, False)


async def test_input_that_is_not_read_until_the_timeout() -> None:
    """A full pipe does not keep the timeout from coming."""
    done = await run(sh("sleep 60", stdin=b"x" * 5_000_000, timeout=0.2))
    assert done.timed_out


async def test_cancellation_kills_the_group(tmp_path: Path) -> None:
    """At once, with its children."""
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait"
    task = asyncio.create_task(run(sh(script, stdin=b"x" * 1_000_000)))
    await until(pids.exists)
    with Timer() as timer:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert timer.seconds < 1
    for pid in pids.read_text().split():
        await until(functools.partial(gone, int(pid)))


async def test_cancellation_while_draining(tmp_path: Path) -> None:
    """Is heard, and everything is closed."""
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(run(sh(f"sleep 60 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}")))
    await until(pid_file.exists)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


async def test_many_at_once() -> None:
    """Each one gets its own output; nothing is left of any."""
    done = await asyncio.gather(*(run(Command(["/bin/cat"], stdin=str(number).encode())) for number in range(40)))
    assert [item.stdout for item in done] == [str(number).encode() for number in range(40)]


async def test_own_session() -> None:
    """A signal for our process group, such as Ctrl-C, does not reach it."""
    done = await run(Command([sys.executable, "-S", "-c", "import os; print(os.getsid(0) == os.getpid())"]))
    assert done.stdout == b"True\n"


async def test_start_and_wait() -> None:
    """For programs that outlive a call: the status is that of the program, also when asked twice."""
    started = process.start(["/bin/sh", "-c", "sleep 0.05; exit 4"])
    assert await process.wait_exit(started) == 4
    assert await process.wait_exit(started) == 4


async def test_start_with_a_descriptor() -> None:
    """Those that are named are passed on, under their number."""
    reader, writer = os.pipe()
    try:
        started = process.start(["/bin/sh", "-c", f"echo hello > /proc/self/fd/{writer}"], pass_fds=[writer])
        assert await process.wait_exit(started) == 0
        assert os.read(reader, 100) == b"hello\n"
    finally:
        os.close(reader)
        os.close(writer)


async def test_kill_group_twice() -> None:
    """What has ended stays ended; its number may be another's by then."""
    started = process.start(["/bin/sleep", "60"])
    process.kill_group(started)
    assert await process.wait_exit(started) == -signal.SIGKILL
    process.kill_group(started)
    assert started.returncode == -signal.SIGKILL


async def test_start_time() -> None:
    """In ticks since boot."""
    started = process.start(["/bin/sleep", "60"])
    born = pidfd.start_time(started.pid) / os.sysconf("SC_CLK_TCK")
    await process.end(started)
    assert abs(born - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5
    assert pidfd.start_time(started.pid) == 0


async def test_handle() -> None:
    """A process is known by number and start time; another one with the number is not it."""
    started = process.start(["/bin/sleep", "60"])
    born = pidfd.start_time(started.pid)
    assert born > 0
    assert pidfd.ProcessHandle.open(started.pid, born + 1) is None
    handle = pidfd.ProcessHandle.open(started.pid, born)
    assert handle is not None
    with contextlib.closing(handle):
        assert (handle.pid, handle.started) == (started.pid, born)
        assert handle.send(signal.SIGTERM)
        async with asyncio.timeout(5):
            await handle.wait()
        assert pidfd.ProcessHandle.open(started.pid) is None, "a zombie has ended"
        assert handle.reap() == 128 + signal.SIGTERM
        assert handle.reap() is None
        assert not handle.send(signal.SIGTERM)
    handle.close()
    process.disown(started)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_handle_of_nothing(pid: int) -> None:
    """No such process."""
    assert pidfd.ProcessHandle.open(pid) is None
    assert pidfd.start_time(pid) == 0
