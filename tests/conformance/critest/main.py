"""The program: prepare, run, report, clean up."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import images, node, programs, registry, report, suite

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".cache"
STORE = CACHE / "critest"
EXPECTED = Path(__file__).with_name("expected.toml")
_RUNS_KEPT = 20


def main() -> int:
    """Run the suite; 0 if every spec did what is expected of it."""
    options = _parser().parse_args()
    if os.geteuid() != 0:
        print("hack/conformance: containers need root, run it with sudo", file=sys.stderr)
        return 2
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        with _alone():
            return _run(options)
    except programs.Missing as err:
        print(f"hack/conformance: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hack/conformance: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hack/conformance",
        description=f"Run critest against a crishim of its own and compare with {EXPECTED.relative_to(ROOT)}.",
    )
    add = parser.add_argument
    add("--handler", choices=("runc", "crun"), default="runc", help="the runtime handler to ask for (default: runc)")
    add("--focus", action="append", default=[], metavar="REGEX", help="only specs that match; may be repeated")
    add("--skip", action="append", default=[], metavar="REGEX", help="no specs that match; may be repeated")
    add("--repeat", type=int, default=1, metavar="N", help="run the suite N times on the same daemon")
    add("--seed", type=int, help="the seed of the order of specs (default: a random one)")
    add("--websocket", action="store_true", help="stream over WebSocket instead of SPDY")
    add("--nri-socket", default="", metavar="PATH", help="run NRI specs too; needs a critest that has them")
    add("--runtime-endpoint", default="", metavar="SOCKET", help="test the runtime on this socket instead")
    add("--registry-port", type=int, default=0, metavar="PORT", help="where to serve images (default: a free port)")
    return parser


def _run(options: argparse.Namespace) -> int:
    request = _request(options)
    programs.check()
    nginx = programs.nginx(STORE)
    store = registry.stored(STORE, nginx)
    if not options.runtime_endpoint:
        node.isolate(options.handler)  # after everything that comes from the network
    with registry.serving(store, options.registry_port) as port:
        rounds = _rounds(options, request, port)
    verdict = report.Verdict.of(rounds, report.expectations(EXPECTED, lambda kind: _is_host(kind, options.handler)))
    print("\n".join(report.table(verdict)))
    return 0 if verdict.good else 1


def _request(options: argparse.Namespace) -> suite.Request:
    critest = suite.find(CACHE, ROOT / "hack/tools")
    if options.nri_socket and not suite.knows(critest, "nri-socket"):
        raise programs.Missing(f"{critest} has no NRI specs: later releases of cri-tools have")
    return suite.Request(
        critest=critest,
        handler=options.handler,
        focus=tuple(options.focus),
        skip=tuple(options.skip),
        websocket=options.websocket,
        nri_socket=options.nri_socket,
        seed=options.seed,
    )


def _rounds(options: argparse.Namespace, request: suite.Request, port: int) -> list[list[report.Result]]:
    output = _output(options.handler)
    print(f"logs and reports: {output}", file=sys.stderr)
    with _runtime(options, port, output) as socket:
        return [_round(request, socket, output / str(number)) for number in range(1, options.repeat + 1)]


def _runtime(options: argparse.Namespace, port: int, output: Path) -> contextlib.AbstractContextManager[str]:
    if not options.runtime_endpoint:
        return node.own_daemon(options.handler, port, lambda log: _keep(output / "daemon.log", log))
    conf = STORE / "registries.conf"
    conf.write_text(images.registries_conf(port))
    print(f"the runtime must use {conf}", file=sys.stderr)
    return node.given_runtime(options.runtime_endpoint)


def _keep(path: Path, text: str) -> None:
    path.write_text(text)


def _round(request: suite.Request, socket: str, output: Path) -> list[report.Result]:
    output.mkdir()
    status = suite.run(request, socket, output)
    if not (output / "report.json").exists():
        raise programs.Missing(f"critest ended with {status} and without a report, see {output}/critest.log")
    return report.read(output / "report.json")


def _output(handler: str) -> Path:
    """A new directory for what this run leaves; the oldest ones go."""
    runs = STORE / "runs"
    output = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{handler}"
    output.mkdir(parents=True)
    for old in sorted(runs.iterdir())[:-_RUNS_KEPT]:
        shutil.rmtree(old)
    return output


def _is_host(kind: str, handler: str) -> bool:
    """Whether this host, with this handler, is of the ``kind`` that an entry of the list is for."""
    if kind == "no-apparmor":
        enabled = Path("/sys/module/apparmor/parameters/enabled")
        return not enabled.exists() or enabled.read_text().strip() != "Y"
    if kind == "crun-without-features":
        return (
            handler == "crun" and subprocess.run(["crun", "features"], capture_output=True, check=False).returncode != 0
        )
    raise programs.Missing(f"{EXPECTED}: unknown kind of host {kind!r}")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One at a time: the images are one registry, and critest's host ports are fixed."""
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise programs.Missing("another hack/conformance runs in this checkout") from err
        yield
