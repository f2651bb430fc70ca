"""critest itself: where it is, how it is built, and one run of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from crishim.host.mounts import mounts_below, unmount_below

from .programs import Missing

_PACKAGE = "sigs.k8s.io/cri-tools/cmd/critest"
_INTERRUPT_SECONDS = 60.0
_MARKS = {"S [SKIPPED]": "s", "• [FAILED]": "F", "• [PANICKED]": "F", "• [TIMEDOUT]": "F", "•": "."}


@dataclass(frozen=True)
class Request:
    """What to run and against which runtime."""

    critest: Path
    handler: str
    focus: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    websocket: bool = False
    nri_socket: str = ""
    seed: int | None = None

    def arguments(self, socket: str, output: Path) -> list[str]:
        """The command line; reports go into ``output``."""
        endpoint = f"unix://{socket}"
        made = [f"--runtime-endpoint={endpoint}", f"--image-endpoint={endpoint}", f"--runtime-handler={self.handler}"]
        made += ["--config=/nonexistent", "--ginkgo.no-color", "--ginkgo.v"]
        made += [f"--ginkgo.json-report={output}/report.json", f"--ginkgo.junit-report={output}/junit.xml"]
        made += [f"--ginkgo.focus={item}" for item in self.focus] + [f"--ginkgo.skip={item}" for item in self.skip]
        made += [f"--websocket-{what}" for what in ("exec", "attach", "portforward") if self.websocket]
        made += [f"--nri-socket={self.nri_socket}"] if self.nri_socket else []
        made += [f"--ginkgo.seed={self.seed}"] if self.seed is not None else []
        return [str(self.critest), *made]


def find(cache: Path, tools: Path) -> Path:
    """critest from ``cache/bin`` or PATH, otherwise built into the former; ``tools`` has the go.mod that pins it."""
    own = cache / "bin/critest"
    if own.exists():
        return own
    installed = shutil.which("critest")
    return Path(installed) if installed else _build(own, tools)


def _build(place: Path, tools: Path) -> Path:
    if shutil.which("go") is None:
        raise Missing(f"critest is neither in {place.parent} nor on PATH, and there is no go to build it")
    print("building critest, which takes some minutes the first time", file=sys.stderr)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        for name in ("go.mod", "go.sum"):  # a copy: -mod=mod adds to them what only critest needs
            shutil.copy(tools / name, directory)
        environment = os.environ | {"GOFLAGS": "-mod=mod -buildvcs=false"}
        command = ["go", "test", "-c", "-o", "critest", _PACKAGE]
        if subprocess.run(command, cwd=directory, env=environment, check=False).returncode != 0:
            raise Missing("critest does not build")
        Path(directory, "critest").rename(place)
    return place


def knows(critest: Path, flag: str) -> bool:
    """Whether this critest has the option; newer ones have more."""
    done = subprocess.run([critest, "--help"], capture_output=True, text=True, check=False)
    return f"-{flag}" in done.stdout + done.stderr


def run(request: Request, socket: str, output: Path) -> int:
    """Run critest, show its progress, keep its output in ``output``; its exit status."""
    with _temporary() as directory, (output / "critest.log").open("w") as log:
        process = subprocess.Popen(
            request.arguments(socket, output),
            env=os.environ | {"TMPDIR": str(directory)},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # interrupts reach it through us, once
        )
        try:
            return _follow(process, log)
        finally:
            _end(process)


def _follow(process: subprocess.Popen[str], log: TextIO) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        mark = next((mark for begin, mark in _MARKS.items() if line.startswith(begin)), "")
        print(mark, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return process.wait()


def _end(process: subprocess.Popen[str]) -> None:
    """Ask critest to clean up after itself, as it does on an interrupt; later, do not ask."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_INTERRUPT_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A directory for the suite's logs, volumes and mount points."""
    directory = Path(tempfile.mkdtemp(prefix="critest-"))
    try:
        yield directory
    finally:
        unmount_below(directory)
        if mounts_below(directory):  # specs bind-mount /etc in here: deleting through that would be the end of it
            print(f"hack/conformance: {directory} still has mounts, it stays", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
