"""What the tests that need root share: a real registry, one daemon per module, and a check that nothing is left.

Without root every test in this folder is skipped, by name.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loopguard import guarding

from root.harness import leaks
from root.harness.client import Cri, connect
from root.harness.daemon import Daemon
from root.harness.images import busybox
from root.harness.registry import FakeRegistry, Registry, serving

MakeDaemon = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def needs_root() -> None:
    """These tests mount, chown, make device nodes, namespaces and cgroups, and start the confined worker."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest_asyncio.fixture
async def guarded_loop() -> AsyncIterator[None]:
    """Fails the test if one of its callbacks blocks the loop."""
    with guarding(asyncio.get_running_loop()):
        yield


@pytest.fixture(autouse=True)
def guard_loop(needs_root: None, request: pytest.FixtureRequest) -> None:
    """Guards the loop of asynchronous tests; others get no loop."""
    if isinstance(request.node, pytest.Item) and pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("guarded_loop")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry, with busybox in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    registry = Registry(tmp_path_factory.mktemp("registry"))
    try:
        registry.start()
        registry.push("busybox", busybox())
        yield registry
    finally:
        registry.stop()


@pytest.fixture(scope="session")
def image(registry: Registry) -> str:
    """The reference of busybox."""
    return f"{registry.host}/busybox:latest"


@pytest.fixture
def fake_registry() -> Iterator[FakeRegistry]:
    """A registry that can be told to misbehave."""
    with serving() as registry:
        yield registry


_living: list[Daemon] = []


@pytest.fixture(scope="module")
def make_module_daemon(registry: Registry) -> Iterator[MakeDaemon]:
    """Makes daemons that live as long as the module."""
    yield from _maker(registry)


@pytest.fixture
def make_daemon(registry: Registry) -> Iterator[MakeDaemon]:
    """Makes daemons that live as long as the test; they are not started yet."""
    yield from _maker(registry)


def _maker(registry: Registry) -> Iterator[MakeDaemon]:
    made: list[Daemon] = []

    def make(
        settings: Mapping[str, Any] | None = None, insecure: Sequence[str] = (), prefix: Sequence[str] = ()
    ) -> Daemon:
        daemon = Daemon([registry.host, *insecure], settings, prefix)
        made.append(daemon)
        _living.append(daemon)
        return daemon

    try:
        yield make
    finally:
        for daemon in made:
            _show_log(daemon)
            _living.remove(daemon)
            daemon.close()


@pytest.fixture(autouse=True)
def show_logs() -> Iterator[None]:
    """pytest shows what is printed here if the test fails: what the module's daemons logged meanwhile."""
    for daemon in _living:
        daemon.new_log()
    yield
    for daemon in _living:
        _show_log(daemon)


def _show_log(daemon: Daemon) -> None:
    print(f"--- log of the daemon in {daemon.base}\n{daemon.new_log()}")


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """The module's daemon, started, with busybox; a module may have a fixture of this name of its own."""
    daemon = make_module_daemon()
    daemon.start()
    daemon.pull(image)
    return daemon


@pytest_asyncio.fixture
async def cri(daemon: Daemon) -> AsyncIterator[Cri]:
    """A client of the module's daemon. What the test made is removed after it, and nothing else may be left."""
    async with connect(daemon) as cri:
        known = await _objects(cri)
        before = await asyncio.to_thread(leaks.take, daemon)
        try:
            yield cri
        finally:
            await _remove_new(daemon, known)
        await asyncio.to_thread(leaks.assert_no_leaks, daemon, before)


async def _objects(cri: Cri) -> set[str]:
    images = [name for image in await cri.image_list() for name in (image.id, *image.repo_tags)]
    return {*images, *(pod.id for pod in await cri.pods()), *(item.id for item in await cri.containers())}


async def _remove_new(daemon: Daemon, known: set[str]) -> None:
    """On a channel of its own: the test may have started the daemon again."""
    if not daemon.alive:
        await asyncio.to_thread(daemon.start)
    async with connect(daemon) as cri:
        pods = [pod.id for pod in await cri.pods() if pod.id not in known]
        await asyncio.gather(*(cri.remove_pod(pod) for pod in pods))
        containers = [item.id for item in await cri.containers() if item.id not in known]
        await asyncio.gather(*(cri.remove(container) for container in containers))
        for image in await cri.image_list():
            if image.id not in known:
                await cri.remove_image(image.id)
