"""Exec, attach, port-forward and logs of a real daemon, by crictl over both transports and by clients of our own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from streamclient import SpdyClient, WebSocketClient, closing, exit_code

from crishim.containers import attach
from crishim.cri.api import api_pb2 as pb
from crishim.host import namespaces
from crishim.streaming.spdy import frames
from root.harness.client import Cri, container_config, log_lines, refused, sleeping
from root.harness.daemon import Daemon

pytestmark = pytest.mark.skipif(shutil.which("crictl") is None, reason="needs crictl")

TRANSPORTS = pytest.mark.parametrize("transport", ["spdy", "websocket"])
SECONDS = 30.0
SHELL = ["sh", "-c", 'while read line; do echo "got $line"; echo "err $line" >&2; done; echo bye']


@pytest_asyncio.fixture
async def container(cri: Cri, image: str) -> str:
    """A container that does nothing, in a pod of its own."""
    return await cri.run(await cri.run_pod(), container_config(image, sleeping()))


def crictl(daemon: Daemon, *arguments: str) -> list[str]:
    """crictl's command line."""
    endpoint = f"unix://{daemon.socket}"
    return ["crictl", "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, *arguments]


def run(daemon: Daemon, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """crictl to its end."""
    return subprocess.run(crictl(daemon, *arguments), input=stdin, capture_output=True, timeout=SECONDS, check=False)


async def call(cri: Cri, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """crictl to its end, in a thread."""
    return await asyncio.to_thread(run, cri.daemon, *arguments, stdin=stdin)


class Terminal:
    """crictl on a pseudo-terminal, as somebody at a keyboard sees it."""

    def __init__(self, command: Sequence[str], width: int = 111, height: int = 33) -> None:
        self.output = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], list(command))
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def until(self, pattern: bytes) -> None:
        """Read until a pattern appears, and forget what was before it."""
        end = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.output)) is None:
            assert time.monotonic() < end, f"{pattern!r} is not in {self.output!r}"
            assert self.read(), f"{pattern!r} is not in {self.output!r}"
        self.output = self.output[found.end() :]

    def read(self) -> bool:
        """Read something, False at the end."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:
            return False
        self.output += data
        return bool(data)

    def wait(self) -> int:
        """The exit code once it has ended; all output is read."""
        end = time.monotonic() + SECONDS
        while self.read():
            assert time.monotonic() < end, self.output
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@contextlib.contextmanager
def terminal(command: Sequence[str]) -> Iterator[Terminal]:
    """Ended at the end of the body."""
    made = Terminal(command)
    try:
        yield made
    finally:
        made.close()


async def at_terminal(cri: Cri, act: Callable[[Terminal], None], *arguments: str) -> None:
    """Do something at a terminal that runs crictl, in a thread."""

    def work() -> None:
        with terminal(crictl(cri.daemon, *arguments)) as made:
            act(made)

    await asyncio.to_thread(work)


async def exec_url(cri: Cri, container: str, command: Sequence[str], **wanted: bool) -> str:
    """The URL of Exec."""
    wanted = wanted or {"stdin": True, "stdout": True, "stderr": True}
    request = pb.ExecRequest(container_id=container, cmd=command, **wanted)
    return (await cri.runtime.Exec(request)).url


async def spdy(url: str, *kinds: str) -> tuple[SpdyClient, list[int]]:
    """A SPDY client with its streams; the first is the error stream."""
    client = await SpdyClient.upgrade(url)
    return client, [await client.open(kind) for kind in ("error", *kinds)]


async def eventually(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait for what nothing tells; the condition may be a coroutine function."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


# -- exec


@TRANSPORTS
async def test_exec(cri: Cri, container: str, transport: str) -> None:
    """Both outputs, and the exit code."""
    script = "echo out; echo err >&2; exit 3"
    done = await call(cri, "exec", "--transport", transport, container, "sh", "-c", script)
    assert done.returncode != 0
    assert done.stdout == b"out\n"
    assert done.stderr.startswith(b"err\n")
    assert b"exit code 3" in done.stderr
    done = await call(cri, "exec", "--transport", transport, container, "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@TRANSPORTS
async def test_exec_half_close(cri: Cri, container: str, transport: str) -> None:
    """``cat`` ends when its client's stdin does, and has given everything back."""
    data = os.urandom(1 << 20)
    done = await call(cri, "exec", "-i", "--transport", transport, container, "cat", stdin=data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data


@TRANSPORTS
async def test_much_output(cri: Cri, container: str, transport: str) -> None:
    """100 MiB arrive whole, in both directions, on both outputs."""
    done = await call(
        cri, "exec", "--transport", transport, container, "sh", "-c",
        "dd if=/dev/urandom of=/big bs=1M count=100 2>/dev/null; sha256sum /big",
    )  # fmt: skip
    digest = done.stdout.split()[0].decode()
    done = await call(cri, "exec", "--transport", transport, container, "sh", "-c", "cat /big; cat /big >&2")
    for data in (done.stdout, done.stderr):
        assert hashlib.sha256(data).hexdigest() == digest
    sums = await call(cri, "exec", "-i", "--transport", transport, container, "sha256sum", stdin=done.stdout)
    assert sums.stdout.split()[0].decode() == digest


@TRANSPORTS
async def test_exec_of_what_is_not_there(cri: Cri, container: str, transport: str) -> None:
    """Says so, and leaves nothing."""
    done = await call(cri, "exec", "--transport", transport, container, "/no/such/program")
    assert done.returncode != 0
    assert b"no such file" in done.stderr


@pytest.mark.parametrize("handler", ["runc", "crun"])
async def test_exec_is_like_the_container(cri: Cri, image: str, handler: str) -> None:
    """User, groups, capabilities, environment, directory and cgroup are the container's own, for both runtimes."""
    if shutil.which(handler) is None:
        pytest.skip(f"needs {handler}")
    security = pb.LinuxContainerSecurityContext(
        run_as_user=pb.Int64Value(value=1234), supplemental_groups=[77], no_new_privs=True
    )
    config = container_config(
        image, sleeping(), envs=[pb.KeyValue(key="WHO", value=b"me")], working_dir="/tmp",
        linux=pb.LinuxContainerConfig(security_context=security),
    )  # fmt: skip
    try:
        made = await cri.run(await cri.run_pod(handler=handler), config)
    except grpc.RpcError as err:
        if "hybrid mode" in str(err):
            pytest.skip("crun does not work with this node's cgroups")
        raise
    script = "id; env | grep -v -e SHLVL -e PWD -e HOSTNAME | sort; pwd; grep -e Cap -e NoNew /proc/self/status; "
    script += "cat /proc/self/cgroup; echo x > /dev/stdout; echo y > /dev/stderr"
    sync = await cri.exec(made, ["sh", "-c", script])
    done = await call(cri, "exec", made, "sh", "-c", script)
    assert (done.stdout, done.stderr) == (sync.stdout, b"y\n")
    assert b"uid=1234" in done.stdout and b"WHO=me" in done.stdout
    tty: list[bytes] = []

    def act(made_: Terminal) -> None:
        assert made_.wait() == 0
        tty.append(made_.output)

    await at_terminal(cri, act, "exec", "-it", made, "sh", "-c", script)
    lines = tty[0].replace(b"\r\n", b"\n")
    assert b"uid=1234" in lines and b"TERM=xterm\n" in lines and lines.endswith(b"x\ny\n")


@TRANSPORTS
async def test_terminal(cri: Cri, container: str, transport: str) -> None:
    """A shell with line editing, job control, sizes and an exit code."""

    def act(at: Terminal) -> None:
        at.until(rb"# ")
        at.type(b"stty size; tty\n")
        at.until(rb"33 111\r\n/dev/pts/\d+\r\n")
        at.resize(122, 44)
        time.sleep(0.3)
        at.type(b"stty size\n")
        at.until(rb"44 122\r\n")
        at.type(b"sleep 100; echo after\n")
        time.sleep(0.3)
        at.type(b"\x03")
        at.until(rb"\^C")
        at.type(b"exit 7\n")
        assert at.wait() != 0
        assert b"exit code 7" in at.output

    await at_terminal(cri, act, "exec", "-it", "--transport", transport, container, "sh")


@TRANSPORTS
async def test_terminal_from_its_beginning(cri: Cri, container: str, transport: str) -> None:
    """The first program already sees the size, and its last words are not lost."""

    def act(at: Terminal) -> None:
        assert at.wait() == 0
        assert at.output == b"33 111\r\n"

    for _ in range(5):
        await at_terminal(cri, act, "exec", "-it", "--transport", transport, container, "stty", "size")


async def test_much_at_a_terminal(cri: Cri, container: str) -> None:
    """Nothing is lost there either."""

    def act(at: Terminal) -> None:
        assert at.wait() == 0
        lines = at.output.split(b"\r\n")
        assert lines[:-1] == [b"%d" % number for number in range(1, 200_001)]

    await at_terminal(cri, act, "exec", "-it", container, "seq", "200000")


async def test_signals_in_exit_codes(cri: Cri, container: str) -> None:
    """128 and the number."""
    client, ids = await spdy(await exec_url(cri, container, ["sh", "-c", "kill -9 $$"]), "stdin", "stdout", "stderr")
    async with closing(client):
        assert exit_code(await client.all_of(ids[0])) == 137


async def test_a_child_that_keeps_the_pipes(cri: Cri, container: str) -> None:
    """Does not keep the session; what the command itself wrote is all there."""
    script = "(sleep 5; echo late) & seq 10000; exit 2"
    began = time.monotonic()
    client, ids = await spdy(await exec_url(cri, container, ["sh", "-c", script]), "stdin", "stdout", "stderr")
    async with closing(client):
        out = await client.all_of(ids[2])
        assert exit_code(await client.all_of(ids[0])) == 2
    assert out.split() == [b"%d" % number for number in range(1, 10001)]
    assert time.monotonic() - began < 4
    await cri.exec(container, ["sh", "-c", "killall sleep"])


async def test_a_chatty_child_that_keeps_the_pipes(cri: Cri, container: str) -> None:
    """Neither."""
    client, ids = await spdy(await exec_url(cri, container, ["sh", "-c", "yes & exit 0"]), "stdin", "stdout", "stderr")
    async with closing(client):
        assert exit_code(await client.all_of(ids[0])) == 0
    await eventually(lambda: _without(cri, container, "yes"))


async def _without(cri: Cri, container: str, program: str) -> bool:
    return program not in (await cri.sh(container, "ps -o comm")).split()


@TRANSPORTS
async def test_a_command_survives_its_client(cri: Cri, container: str, transport: str) -> None:
    """Its stdin ends, what it writes goes nowhere, it is not killed; nothing stays of it afterwards."""
    script = "cat > /in; for i in 1 2 3 4 5; do seq 200000; done; echo done > /end"
    command = ["exec", "-i", "--transport", transport, container, "sh", "-c", script]
    with subprocess.Popen(crictl(cri.daemon, *command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        client.stdin.write(b"typed")
        client.stdin.flush()
        await eventually(lambda: _reads(cri, container, "/in", "typed"))
        client.kill()
    await eventually(lambda: _reads(cri, container, "/end", "done\n"))


async def _reads(cri: Cri, container: str, path: str, text: str) -> bool:
    return await cri.sh(container, f"cat {path} 2>/dev/null || true") == text


@TRANSPORTS
async def test_a_shell_ends_with_its_terminal(cri: Cri, container: str, transport: str) -> None:
    """Nobody will talk to it again; a command that runs is not ended."""

    def act(at: Terminal) -> None:
        at.until(rb"# ")
        at.type(b"echo $$ > /shell\n")
        at.until(rb"# ")

    await at_terminal(cri, act, "exec", "-it", "--transport", transport, container, "sh")
    pid = (await cri.sh(container, "cat /shell")).strip()
    await eventually(lambda: _gone(cri, container, pid))

    def act_busy(at: Terminal) -> None:
        at.until(rb"started")

    script = "echo started; sleep 1; echo done > /busy"
    await at_terminal(cri, act_busy, "exec", "-it", "--transport", transport, container, "sh", "-c", script)
    await eventually(lambda: _reads(cri, container, "/busy", "done\n"))


async def _gone(cri: Cri, container: str, pid: str) -> bool:
    return (await cri.exec(container, ["test", "-d", f"/proc/{pid}"])).exit_code != 0


async def test_hundreds_of_execs_leave_nothing(cri: Cri, container: str) -> None:
    """Processes, directories and mounts are what the fixture checks; descriptors here."""
    fds = Path(f"/proc/{cri.daemon.pid}/fd")
    await _burst(cri, container, 20)
    before = len(os.listdir(fds))
    for _ in range(5):
        await _burst(cri, container, 40)
    await eventually(lambda: len(os.listdir(fds)) <= before)


async def _burst(cri: Cri, container: str, count: int) -> None:
    async def one(number: int) -> None:
        tty = number % 2 == 1
        url = await exec_url(cri, container, ["echo", str(number)], stdin=True, stdout=True, tty=tty)
        if number % 4 < 2:
            client, ids = await spdy(url, "stdin", "stdout", *(["resize"] if tty else []))
            async with closing(client):
                assert (await client.all_of(ids[2])).strip() == str(number).encode()
                assert exit_code(await client.all_of(ids[0])) == 0
        else:
            async with closing(await WebSocketClient.upgrade(url)) as other:
                await other.until_closed()
                assert other.on(1).strip() == str(number).encode()

    await asyncio.gather(*(one(number) for number in range(count)))


async def test_idle_sessions_cost_little(cri: Cri, container: str) -> None:
    """200 of them at most 60 MiB, in the daemon and what it started."""
    before = _memory(cri.daemon.pid)
    clients: list[SpdyClient] = []
    try:
        for _ in range(200):
            client, ids = await spdy(await exec_url(cri, container, ["cat"]), "stdin", "stdout", "stderr")
            clients.append(client)
            await client.send(ids[1], b"x")
            await client.until(lambda client=client, ids=ids: ids[2] in client.received)
        grown = _memory(cri.daemon.pid) - before
        assert grown <= 60 << 20, f"{grown >> 20} MiB"
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def _memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_what_makes_no_sense(cri: Cri, image: str, container: str) -> None:
    """Is refused before there is a URL."""
    runtime = cri.runtime
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "tty and stderr"):
        await runtime.Exec(pb.ExecRequest(container_id=container, cmd=["x"], tty=True, stdout=True, stderr=True))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "none of stdin"):
        await runtime.Exec(pb.ExecRequest(container_id=container, cmd=["x"]))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cmd is empty"):
        await runtime.Exec(pb.ExecRequest(container_id=container, stdout=True))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "container_id"):
        await runtime.Exec(pb.ExecRequest(cmd=["x"], stdout=True))
    with refused(grpc.StatusCode.NOT_FOUND, "nonsense"):
        await runtime.Exec(pb.ExecRequest(container_id="nonsense", cmd=["x"], stdout=True))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "tty and stderr"):
        await runtime.Attach(pb.AttachRequest(container_id=container, tty=True, stdout=True, stderr=True))
    with refused(grpc.StatusCode.NOT_FOUND, "nonsense"):
        await runtime.Attach(pb.AttachRequest(container_id="nonsense", stdout=True))
    with refused(grpc.StatusCode.NOT_FOUND, "nonsense"):
        await runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id="nonsense"))
    with refused(grpc.StatusCode.NOT_FOUND, "nonsense"):
        await runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id="nonsense"))
    pod = await cri.run_pod()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "70000"):
        await runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod, port=[70000]))
    created = await cri.create(pod, container_config(image, sleeping()))
    ended = await cri.run(pod, container_config(image, ["true"]))
    await cri.wait_exit(ended)
    for which in (created, ended):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
            await runtime.Exec(pb.ExecRequest(container_id=which, cmd=["x"], stdout=True))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
            await runtime.Attach(pb.AttachRequest(container_id=which, stdout=True))
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
            await runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=which))
    await cri.stop_pod(pod)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not ready"):
        await runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod))


async def test_what_ended_before_the_client_came(cri: Cri, image: str) -> None:
    """Is told on the error stream."""
    pod = await cri.run_pod()
    made = await cri.run(pod, container_config(image, sleeping()))
    url = await exec_url(cri, made, ["true"])
    other = (await cri.runtime.Attach(pb.AttachRequest(container_id=made, stdout=True))).url
    await cri.stop(made, 5)
    for each, kinds in ((url, ["stdin", "stdout", "stderr"]), (other, ["stdout"])):
        client, ids = await spdy(each, *kinds)
        async with closing(client):
            assert b"not running" in await client.all_of(ids[0])


# -- attach


@TRANSPORTS
async def test_attach(cri: Cri, image: str, transport: str) -> None:
    """Both outputs; the client's end of stdin ends its session, not the container's stdin."""
    made = await cri.run(await cri.run_pod(), container_config(image, SHELL, stdin=True))
    for word in (b"one", b"two"):
        done = await call(cri, "attach", "-i", "--transport", transport, made, stdin=word + b"\n")
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == (b"got " + word + b"\n", b"err " + word + b"\n")
    assert (await cri.status(made)).state == pb.CONTAINER_RUNNING


@TRANSPORTS
async def test_stdin_once(cri: Cri, image: str, transport: str) -> None:
    """The container's stdin ends with that of the first client, who gets all that comes afterwards."""
    made = await cri.run(await cri.run_pod(), container_config(image, SHELL, stdin=True, stdin_once=True))
    done = await call(cri, "attach", "-i", "--transport", transport, made, stdin=b"one\n")
    assert done.stdout == b"got one\nbye\n"
    assert (await cri.wait_exit(made)).exit_code == 0


async def test_a_bystander_does_not_end_stdin(cri: Cri, image: str) -> None:
    """With stdin_once, a client without stdin may come and go, often."""
    made = await cri.run(await cri.run_pod(), container_config(image, SHELL, stdin=True, stdin_once=True))
    fds = Path(f"/proc/{cri.daemon.pid}/fd")
    before = len(os.listdir(fds))
    for _ in range(10):
        client, _ = await spdy(await attach_url(cri, made, stdout=True), "stdout")
        await client.close()
        await asyncio.sleep(0.05)
    await eventually(lambda: len(os.listdir(fds)) <= before + 3)
    done = await call(cri, "attach", "-i", made, stdin=b"one\n")
    assert done.stdout == b"got one\nbye\n"


async def attach_url(cri: Cri, container: str, **wanted: bool) -> str:
    """The URL of Attach."""
    return (await cri.runtime.Attach(pb.AttachRequest(container_id=container, **wanted))).url


async def test_several_clients(cri: Cri, image: str) -> None:
    """Each gets everything; one that leaves harms nobody."""
    script = "read x; seq 200000; read x; echo end"
    made = await cri.run(await cri.run_pod(), container_config(image, ["sh", "-c", script], stdin=True))
    clients = [await spdy(await attach_url(cri, made, stdout=True), "stdout") for _ in range(3)]
    web = await WebSocketClient.upgrade(await attach_url(cri, made, stdin=True, stdout=True))
    leaver, _ = await spdy(await attach_url(cri, made, stdout=True), "stdout")
    await asyncio.sleep(0.2)
    await web.send(0, b"go\n")
    await leaver.until(lambda: leaver.received)
    await leaver.close()
    await web.until(lambda: web.on(1).endswith(b"200000\n"))
    await web.send(0, b"go\n")
    await web.until_closed()
    wanted = b"".join(b"%d\n" % number for number in range(1, 200_001)) + b"end\n"
    assert web.on(1) == wanted
    for client, ids in clients:
        assert await client.all_of(ids[1]) == wanted
        assert exit_code(await client.all_of(ids[0])) == 0
        await client.close()
    await web.close()


@TRANSPORTS
async def test_attach_to_a_terminal(cri: Cri, image: str, transport: str) -> None:
    """Sizes, and detaching by keys without harm."""
    script = "while true; do read line || exit 5; echo got $line; stty size; done"
    made = await cri.run(await cri.run_pod(), container_config(image, ["sh", "-c", script], stdin=True, tty=True))

    def act(at: Terminal) -> None:
        time.sleep(0.5)
        at.type(b"one\r")
        at.until(rb"got one\r\n33 111\r\n")
        at.resize(99, 22)
        time.sleep(0.5)
        at.type(b"two\r")
        at.until(rb"got two\r\n22 99\r\n")

    await at_terminal(cri, act, "attach", "-it", "--transport", transport, made)

    def again(at: Terminal) -> None:
        time.sleep(0.5)
        at.type(b"three\r")
        at.until(rb"got three\r\n")
        at.type(b"\x04")
        assert at.wait() == 0

    await at_terminal(cri, again, "attach", "-it", "--transport", transport, made)
    assert (await cri.wait_exit(made)).exit_code == 5


async def test_a_slow_client_does_not_stop_the_container(cri: Cri, image: str) -> None:
    """It is dismissed; until then the container waits, at most so long."""
    script = "read x; dd if=/dev/zero bs=1M count=64 2>/dev/null; echo end; sleep 100"
    pod = await cri.run_pod()
    made = await cri.run(pod, container_config(image, ["sh", "-c", script], stdin=True))
    slow = await SpdyClient.upgrade(await attach_url(cri, made, stdin=True, stdout=True), read=False)
    for kind in ("error", "stdin", "stdout"):
        await slow.open(kind, wait=False)
    await asyncio.sleep(0.3)
    slow.writer.write(slow.endpoint.take() + frames.data_header(3, 3) + b"go\n")
    log = Path((await cri.status(made)).log_path)

    def through() -> bool:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100))
            return b" end" in file.read()

    await eventually(through, attach.STALL_SECONDS + 10)
    await slow.close()


# -- port-forward


class EchoServer:
    """Gives back what it gets, then says bye; on a socket that was made in a pod's network."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)
            connection.sendall(b"bye")

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(5)


def listen(daemon: Daemon, pod: str, family: socket.AddressFamily) -> EchoServer:
    """A server inside a pod, or on the node if it has its network."""
    path = daemon.state / "sandboxes" / pod / "ns" / "net"
    address = "127.0.0.1" if family == socket.AF_INET else "::1"

    def make() -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(128)
        return listener

    return EchoServer(namespaces.enter([path] if path.exists() else [], make))


@contextlib.asynccontextmanager
async def forwarding(cri: Cri, pod: str, transport: str, *ports: int) -> AsyncIterator[list[int]]:
    """``crictl port-forward``; the local ports."""
    command = crictl(cri.daemon, "port-forward", "--transport", transport, pod, *(f":{port}" for port in ports))
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        found: dict[int, int] = {}
        async with asyncio.timeout(SECONDS):
            while len(found) < len(ports):
                line = (await process.stdout.readline()).decode()
                assert line, "crictl has ended"
                if match := re.search(r"127\.0\.0\.1:(\d+) -> (\d+)", line):
                    found[int(match[2])] = int(match[1])
        drain = asyncio.create_task(process.stdout.read())
        yield [found[port] for port in ports]
        drain.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def talk(port: int, data: bytes) -> bytes:
    """Send, half-close, and read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        sending = asyncio.create_task(_send(writer, data))
        async with asyncio.timeout(SECONDS):
            answer = await reader.read()
            await sending
        return answer
    finally:
        writer.close()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    writer.write_eof()


@TRANSPORTS
async def test_port_forward(cri: Cri, transport: str) -> None:
    """By IPv4 and IPv6, half-closed, with much data, many at once."""
    pod = await cri.run_pod()
    servers = [await asyncio.to_thread(listen, cri.daemon, pod, family) for family in (socket.AF_INET, socket.AF_INET6)]
    try:
        async with forwarding(cri, pod, transport, *(server.port for server in servers)) as ports:
            for port in ports:
                data = os.urandom(4 << 20)
                assert await talk(port, data) == data + b"bye"
                answers = await asyncio.gather(*(talk(port, b"%d" % number * 1000) for number in range(50)))
                assert answers == [b"%d" % number * 1000 + b"bye" for number in range(50)]
    finally:
        for server in servers:
            await asyncio.to_thread(server.close)


async def test_port_forward_to_the_nodes_network(cri: Cri) -> None:
    """A pod with host network has the node's ports."""
    node = pb.NamespaceOption(network=pb.NODE)
    linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=node))
    pod = await cri.run_pod(cri.pod_config(linux=linux))
    server = await asyncio.to_thread(listen, cri.daemon, pod, socket.AF_INET)
    try:
        async with forwarding(cri, pod, "spdy", server.port) as ports:
            assert await talk(ports[0], b"hello") == b"hellobye"
    finally:
        await asyncio.to_thread(server.close)


async def test_refused_ports(cri: Cri) -> None:
    """Are told on the error stream, with the reason; others go on."""
    pod = await cri.run_pod()
    server = await asyncio.to_thread(listen, cri.daemon, pod, socket.AF_INET)
    try:
        url = (await cri.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod))).url
        async with closing(await SpdyClient.upgrade(url, "portforward.k8s.io")) as client:
            error = await client.open("error", port="1", requestid="0")
            data = await client.open("data", port="1", requestid="0")
            message = await client.all_of(error)
            assert b"port 1 " in message and b"refused" in message
            assert await client.all_of(data) == b""
            await client.open("error", port=str(server.port), requestid="1")
            data = await client.open("data", port=str(server.port), requestid="1")
            await client.send(data, b"still here", fin=True)
            assert await client.all_of(data) == b"still herebye"
    finally:
        await asyncio.to_thread(server.close)


async def test_forwarded_connections_end_with_their_streams(cri: Cri) -> None:
    """A reset reaches the server in the pod, as does the client's leaving."""
    pod = await cri.run_pod()
    server = await asyncio.to_thread(listen, cri.daemon, pod, socket.AF_INET)
    fds = Path(f"/proc/{cri.daemon.pid}/fd")
    before = len(os.listdir(fds))
    try:
        url = (await cri.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod))).url
        async with closing(await SpdyClient.upgrade(url, "portforward.k8s.io")) as client:
            for number in range(10):
                await client.open("error", port=str(server.port), requestid=str(number))
                data = await client.open("data", port=str(server.port), requestid=str(number))
                await client.send(data, b"x")
                await client.until(lambda data=data: data in client.received)
                if number < 5:
                    client.endpoint.reset(data)
                    client.flush()
            await eventually(lambda: len(os.listdir(fds)) <= before + 6)
        await eventually(lambda: len(os.listdir(fds)) <= before)
    finally:
        await asyncio.to_thread(server.close)


# -- hostile clients


async def test_tokens(cri: Cri, container: str) -> None:
    """Wrong and used ones are refused."""
    url = await exec_url(cri, container, ["true"], stdout=True)
    for wrong in (url[:-1], url + "x", url.replace("/exec/", "/attach/")):
        with pytest.raises(AssertionError, match="404"):
            await SpdyClient.upgrade(wrong)
    with pytest.raises(AssertionError, match="404"):
        await SpdyClient.upgrade(url)  # it was used, for the wrong thing
    client, ids = await spdy(url := await exec_url(cri, container, ["true"], stdout=True), "stdout")
    async with closing(client):
        with pytest.raises(AssertionError, match="404"):
            await SpdyClient.upgrade(url)
        assert exit_code(await client.all_of(ids[0])) == 0


async def test_hostile_clients_cost_bounded_memory(cri: Cri, container: str) -> None:
    """Slow readers, floods for commands that read nothing, giant frames, half-open connections: all at once."""
    before = _memory(cri.daemon.pid)
    clients: list[SpdyClient] = []
    try:
        for _ in range(10):
            url = await exec_url(cri, container, ["sh", "-c", "exec dd if=/dev/zero bs=1M 2>/dev/null"], stdout=True)
            clients.append(await SpdyClient.upgrade(url, read=False))
            for kind in ("error", "stdout"):
                await clients[-1].open(kind, wait=False)
            flood, ids = await spdy(await exec_url(cri, container, ["sleep", "100"], stdin=True), "stdin")
            clients.append(flood)
            flood.writer.write(frames.data_header(ids[1], frames.MAX_LENGTH) + bytes(frames.MAX_LENGTH))
            silent = await SpdyClient.upgrade(await exec_url(cri, container, ["true"]))
            clients.append(silent)
        await asyncio.sleep(2)
        grown = _memory(cri.daemon.pid) - before
        assert grown < 64 << 20, f"{grown >> 20} MiB"
        began = time.monotonic()
        assert (await call(cri, "exec", container, "echo", "hello")).stdout == b"hello\n"
        assert time.monotonic() - began < 5
    finally:
        await asyncio.gather(*(client.close() for client in clients))
        await cri.exec(container, ["sh", "-c", "killall dd; killall sleep"])


async def test_sigterm_ends_sessions(cri: Cri, container: str) -> None:
    """With a word for the client; the container goes on, and the next daemon serves it."""
    client, ids = await spdy(await exec_url(cri, container, ["sleep", "100"]), "stdin", "stdout", "stderr")
    async with closing(client):
        await cri.exec(container, ["true"])
        assert await asyncio.to_thread(cri.daemon.terminate) == 0
        assert b"being stopped" in await client.all_of(ids[0])
    await asyncio.to_thread(cri.daemon.start)
    done = await call(cri, "exec", container, "sh", "-c", "killall sleep; echo again")
    assert done.stdout == b"again\n"


# -- logs


async def test_reopen_while_writing(cri: Cri, image: str) -> None:
    """The kubelet's rotation: nothing is lost and nothing is there twice."""
    script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; [ $((i % 50)) = 0 ] && sleep 0.02; done"
    made = await cri.run(await cri.run_pod(), container_config(image, ["sh", "-c", script]))
    path = Path((await cri.status(made)).log_path)
    rotated = []
    for number in range(8):
        await asyncio.sleep(0.1)
        rotated.append(path.rename(path.with_suffix(f".{number}")))
        await cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=made))
        assert path.exists()
    await cri.wait_exit(made)
    lines = [line.text for each in (*rotated, path) for line in log_lines(each)]
    assert lines == [b"line %d" % number for number in range(1, 3001)]
    assert sum(1 for each in rotated if log_lines(each)) > 3


async def test_reopen_without_its_directory(cri: Cri, image: str) -> None:
    """It is made again; the container goes on."""
    made = await cri.run(await cri.run_pod(), container_config(image, SHELL, stdin=True))
    path = Path((await cri.status(made)).log_path)
    await asyncio.to_thread(shutil.rmtree, path.parent)
    await cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=made))
    await call(cri, "attach", "-i", made, stdin=b"one\n")
    await eventually(lambda: {line.text for line in log_lines(path)} == {b"got one", b"err one"})
    assert (await cri.status(made)).state == pb.CONTAINER_RUNNING


async def test_reopen_without_a_log(cri: Cri, image: str) -> None:
    """There is nothing to do."""
    config = container_config(image, sleeping())
    config.log_path = ""
    made = await cri.run(await cri.run_pod(), config)
    await cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=made))


async def test_nothing_is_left(cri: Cri, image: str) -> None:
    """Of an exec and an attach whose container is removed under them; the fixture looks."""
    made = await cri.run(await cri.run_pod(), container_config(image, sleeping(), stdin=True, stdin_once=True))
    command = ["sh", "-c", "echo up; exec sleep 100"]
    client, ids = await spdy(await exec_url(cri, made, command), "stdin", "stdout", "stderr")
    await client.until(lambda: ids[2] in client.received)
    other, other_ids = await spdy(await attach_url(cri, made, stdout=True), "stdout")
    await cri.remove(made)
    assert await other.all_of(other_ids[1]) == b""
    assert exit_code(await client.all_of(ids[0])) == 137
    await client.close()
    await other.close()
