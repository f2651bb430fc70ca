"""conmon: the monitor that outlives us, one for each container.

It starts the OCI runtime, keeps the container's output as CRI log lines, waits for the container, and
writes its exit code to a file. The contract is conmon(8) and its sources: ``_OCI_SYNCPIPE`` names the
descriptor on which it tells the container's process ID, or -1 and what the OCI runtime printed.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path

from crishim.errors import DeadlineExceeded, HostFailure
from crishim.host import process
from crishim.host.pidfd import wait_readable

_REPORT_LIMIT = 1 << 20


@dataclass(frozen=True)
class Monitor:
    """One conmon and the container that it is to create."""

    program: str
    container_id: str
    name: str
    bundle: Path
    runtime: str
    runtime_args: tuple[str, ...]
    log_path: Path | None
    exit_dir: Path
    attach_dir: Path
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    systemd_cgroup: bool = False
    log_size_max: int = -1

    def argv(self) -> list[str]:
        """conmon's command line."""
        arguments = [
            self.program,
            "--sync",
            "--cid", self.container_id,
            "--cuuid", self.container_id,
            "--name", self.name,
            "--bundle", str(self.bundle),
            "--runtime", self.runtime,
            "--container-pidfile", str(self.bundle / "pidfile"),
            "--exit-dir", str(self.exit_dir),
            "--persist-dir", str(self.bundle),
            "--socket-dir-path", str(self.attach_dir),
            "--log-path", f"k8s-file:{self.log_path}" if self.log_path else "null:",
            "--log-level", "error",
        ]  # fmt: skip
        arguments += [f"--runtime-arg={argument}" for argument in self.runtime_args]
        for wanted, option in (
            (self.terminal, "--terminal"),
            (self.stdin, "--stdin"),
            (self.stdin and not self.stdin_once, "--leave-stdin-open"),
            (self.systemd_cgroup, "--systemd-cgroup"),
        ):
            if wanted:
                arguments.append(option)
        if self.log_size_max > 0:
            arguments += ["--log-size-max", str(self.log_size_max)]
        return arguments


@dataclass(frozen=True)
class Created:
    """The processes of a created container."""

    pid: int
    monitor_pid: int


async def create(monitor: Monitor, timeout: float) -> Created:
    """Start conmon, which creates the container; its complaint is raised if it cannot."""
    if not os.access(monitor.runtime, os.X_OK):  # conmon would not tell
        raise HostFailure(f"cannot create the container: {monitor.runtime} is not an executable file")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "_OCI_SYNCPIPE": str(writer)}
        started = process.start(monitor.argv(), env=environment, cwd=str(monitor.bundle), pass_fds=(writer,))
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        async with asyncio.timeout(timeout):
            pid = _pid(await _read_report(reader))
    except BaseException as err:
        await process.end(started)  # with the OCI runtime, which would go on creating
        if isinstance(err, TimeoutError):
            raise DeadlineExceeded(f"the OCI runtime did not create the container within {timeout:g} s") from err
        raise
    finally:
        os.close(reader)
    process.disown(started)  # it is waited for by pidfd from here on, by a later daemon too
    return Created(pid, started.pid)


async def _read_report(fd: int) -> bytes:
    """One line of JSON, or all there is until conmon closes the pipe."""
    os.set_blocking(fd, False)
    report = bytearray()
    while len(report) < _REPORT_LIMIT and b"\n" not in report:
        await wait_readable(fd)
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            break
        report += chunk
    return bytes(report)


def _pid(report: bytes) -> int:
    try:
        data = json.loads(report)
        pid, message = int(data["data"] if "data" in data else data["pid"]), str(data.get("message", ""))
    except (ValueError, KeyError, TypeError):
        pid, message = -1, report.decode(errors="replace").strip()
    if pid <= 0:
        raise HostFailure(f"cannot create the container: {reason(message) or 'conmon ended without a word'}")
    return pid


def reason(message: str) -> str:
    """The gist of what an OCI runtime printed: the ``msg`` of its last log line, else its last line."""
    lines = [line for line in message.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    last = lines[-1].strip()
    try:
        return str(json.loads(last)["msg"])
    except (ValueError, KeyError, TypeError):
        pass
    _, found, quoted = last.partition("msg=")
    if found:
        try:
            return str(json.loads(quoted))
        except ValueError:
            return quoted.strip('"')
    return last
