"""The node: all rooms built from the settings and put together, taken up from the database, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from crishim.cgroups import layout
from crishim.cni.network import Networks
from crishim.config.paths import Paths
from crishim.config.settings import Config, ImageSettings
from crishim.containers import lifecycle as container_lifecycle
from crishim.containers import strays
from crishim.containers.attach import Parking
from crishim.containers.room import Room as ContainerRoom
from crishim.containers.stats import Meter
from crishim.containers.table import ContainerTable
from crishim.cri import messages
from crishim.cri.api import api_pb2 as pb
from crishim.cri.cache import MessageCache
from crishim.host.facts import HostFacts, read_facts
from crishim.host.reaper import become_subreaper, reap_forgotten
from crishim.host.threads import in_thread
from crishim.images.pull import Puller
from crishim.images.store import ImageStore
from crishim.layers.client import Limits, UnpackWorkers
from crishim.layers.store import LayerStore
from crishim.model.records import ContainerRecord, SandboxRecord
from crishim.pods import lifecycle as pod_lifecycle
from crishim.pods.room import Room as PodRoom
from crishim.pods.table import SandboxTable
from crishim.runtimes.handlers import Handlers
from crishim.state.database import Database
from crishim.state.events import Events
from crishim.state.operations import Operations
from crishim.state.store import Store
from crishim.streaming.server import StreamServer

_log = logging.getLogger(__name__)

_SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class Node:
    """Everything that a call can need."""

    config: Config
    facts: HostFacts
    database: Database
    workers: UnpackWorkers
    puller: Puller
    pods: PodRoom
    meter: Meter
    streams: StreamServer
    parking: Parking = field(default_factory=Parking)
    background: set[asyncio.Task[None]] = field(default_factory=set)
    container_items: MessageCache[ContainerRecord, pb.Container] = field(
        default_factory=lambda: MessageCache(messages.container_item)
    )
    sandbox_items: MessageCache[SandboxRecord, pb.PodSandbox] = field(
        default_factory=lambda: MessageCache(messages.sandbox_item)
    )

    @property
    def containers(self) -> ContainerRoom:
        """The containers' room."""
        return self.pods.containers


Verb = Callable[[Node, Any], Awaitable[Any]]
"""What carries out one call of the CRI: the request in, the response out."""


StreamVerb = Callable[[Node, Any], AsyncIterator[Any]]
"""The same for a call that answers with a stream."""


def build(config: Config) -> Node:
    """Open the database and make the rooms; blocks. Nothing is changed on the node yet."""
    facts = read_facts()
    paths = Paths.of(config)
    paths.prepare()
    cgroups = layout.detect(config.runtime.cgroup_manager, systemd=facts.systemd)
    database = Database(paths.database)
    store, operations = Store(database), Operations()
    limits = Limits(config.image.max_layer_bytes, config.image.max_layer_entries)
    workers = UnpackWorkers(limits, ThreadPoolExecutor(16, thread_name_prefix="crishim-layer"))
    layers = LayerStore(paths.layers, store, workers, operations)
    images = ImageStore(store, layers)
    table = ContainerTable()
    images.users = table.user_of_image
    room = ContainerRoom(
        settings=config.runtime,
        paths=paths,
        facts=facts,
        cgroups=cgroups,
        store=store,
        operations=operations,
        handlers=Handlers(config.runtime, paths, systemd_cgroup=cgroups.systemd),
        images=images,
        layers=layers,
        table=table,
        events=Events(),
    )
    pods = PodRoom(room, Networks(config.network), SandboxTable())
    puller = Puller(config.image, images, layers, operations)
    return Node(config, facts, database, workers, puller, pods, Meter(room), StreamServer(config.api))


async def start(node: Node) -> None:
    """Take up what the database knows, as the kernel shows it."""
    become_subreaper()
    room, store = node.containers, node.containers.store
    await room.handlers.probe()
    rebooted = await in_thread(lambda: _boot_changed(node))
    lost = await in_thread(lambda: room.layers.load(after_crash_of_host=rebooted))
    await room.layers.forget(lost)
    await room.images.forget(await in_thread(room.images.load))
    await store.set_fact("boot_id", node.facts.boot_id)
    sandboxes = await in_thread(store.sandboxes)
    containers = await in_thread(store.containers)
    await in_thread(lambda: strays.end(room, containers, sandboxes))
    for container in sorted(containers, key=lambda record: record.created_at):
        await container_lifecycle.recover(room, container)
    for sandbox in sorted(sandboxes, key=lambda record: record.created_at):
        await pod_lifecycle.recover(node.pods, sandbox)
    await in_thread(lambda: strays.sweep(room, {r.id for r in containers}, {r.id for r in sandboxes}))
    await node.streams.start()
    _warn(node)
    node.background.add(asyncio.create_task(reap_forgotten(), name="reaper"))
    _log.info("took up %d sandboxes, %d containers, %d images", len(sandboxes), len(containers), len(room.images.all()))


def _warn(node: Node) -> None:
    """What Status would say, and files that are named but not there: ``crishim check`` says more."""
    problem = node.containers.handlers.problem()
    if problem:
        _log.warning("the runtime is not ready: %s", problem)
    if not os.access(node.config.runtime.holder, os.X_OK):
        _log.warning("runtime.holder %s is not an executable file: no pod can share PIDs", node.config.runtime.holder)
    defaults = ImageSettings()
    for key in ("registries_conf", "policy", "auth_file"):
        path = getattr(node.config.image, key)
        if path and path != getattr(defaults, key) and not os.path.exists(path):
            _log.warning("image.%s %s does not exist", key, path)


def _boot_changed(node: Node) -> bool:
    known = node.containers.store.fact("boot_id")
    return known is not None and known != node.facts.boot_id


async def stop(node: Node) -> None:
    """Finish what is under way and let go; containers go on running."""
    await node.streams.stop()
    node.parking.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLE_SECONDS):
            await node.containers.operations.settle()
    watchers = [item.watcher for item in node.containers.table.all()] + [item.watcher for item in node.pods.table.all()]
    tasks = [task for task in (*watchers, *node.background) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await in_thread(node.workers.close)
    await in_thread(node.database.close)
