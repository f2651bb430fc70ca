"""``crishim demo`` for real: it shows a pod, and leaves the host as it was, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crishim.cli.showcase.story import PAGE

DEMO = [sys.executable, "-P", "-m", "crishim", "demo"]
NAMES = ("crishim-demo", "crishimdemo", "crishim-check")
"""In the names of all that is a demo's, but for interfaces."""
SETTLE_SECONDS = 5.0


def mounts() -> set[str]:
    """The mount points: pinned network namespaces are some of them."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def interfaces() -> set[str]:
    """Bridges of demos, and what is attached to no bridge (any more)."""
    found = set(Path("/sys/class/net").iterdir())
    return {str(path) for path in found if path.name.startswith("crishim-") or not (path / "master").exists()}


def cgroups() -> set[str]:
    """Every cgroup of every hierarchy."""
    return {folder for folder, _, _ in os.walk("/sys/fs/cgroup")}


def processes() -> set[str]:
    """Command lines: those of conmon, runtimes and daemon name the demo's directories."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                found.add(f"{folder.name} {(folder / 'cmdline').read_text(errors='replace')}")
    return found


def directories() -> set[str]:
    """Of root, state, and of trying overlayfs."""
    tops = ("/run", "/var/lib", "/var/tmp", "/tmp")
    return {str(path) for top in tops for path in Path(top).iterdir()}


def traces() -> set[str]:
    """What a demo could leave behind; what others on this machine do meanwhile is not counted."""
    everything = mounts() | cgroups() | processes() | directories()
    own = {trace for trace in everything if any(name in trace for name in NAMES)}
    return own | {name for name in interfaces() if Path(name).name.startswith(("crishim-", "veth"))}


def new_traces(before: set[str]) -> set[str]:
    """What is there now that was not ``before``, after a moment for the kernel."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (new := traces() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return new


def forwarding() -> str:
    """A setting that CNI plugins like to change."""
    return Path("/proc/sys/net/ipv4/ip_forward").read_text()


def test_demo_shows_a_pod() -> None:
    """The page arrives, the log is shown, every step has a time, nothing stays."""
    before, setting = traces(), forwarding()
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {PAGE}" in done.stdout
    assert "stdout F the shop is open" in done.stdout
    assert "uid=0(root)" in done.stdout
    assert "exited, exit status 0" in done.stdout
    assert "nothing is left" in done.stdout.splitlines()[-1]
    assert "\033[" not in done.stdout
    assert not done.stderr
    assert new_traces(before) == set()
    assert forwarding() == setting


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "step",
    ["Starting the daemon", "Pulling the image", "Starting a pod", "Creating a container", "Fetching a page"],
)
def test_interrupted_demo_leaves_nothing(step: str, signum: signal.Signals) -> None:
    """At any step: what was begun is ended, what was made is removed, and a second signal changes nothing."""
    before = traces()
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert demo.stdout is not None
    said = b""
    while step.encode() not in said:
        piece = os.read(demo.stdout.fileno(), 1 << 16)
        assert piece, said
        said += piece
    demo.send_signal(signum)
    demo.send_signal(signum)
    rest, complaints = demo.communicate(timeout=60)
    assert demo.returncode == 128 + signum, (said + rest + complaints).decode()
    assert b"Interrupted; nothing is left." in rest
    assert not complaints
    assert new_traces(before) == set()


def test_failed_demo_says_why() -> None:
    """The daemon's last words, and what is wrong with the host."""
    before = traces()
    command = [*DEMO, "--runtime-conmon", "/nonexistent/conmon"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    reason = "runtime.conmon /nonexistent/conmon is not an executable file"
    assert f"The demo failed: RuntimeNotReady: {reason}" in done.stdout
    assert reason in done.stdout.partition("The daemon's last words:")[2]
    assert "conmon" in done.stdout.partition("What crishim check finds wrong:")[2]
    assert new_traces(before) == set()


def test_demo_without_a_listener() -> None:
    """``crishim demo | head`` leaves nothing either."""
    before = traces()
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert demo.stdout is not None
    assert os.read(demo.stdout.fileno(), 1)
    demo.stdout.close()
    demo.wait(60)
    assert new_traces(before) == set()
