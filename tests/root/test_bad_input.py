"""What must fail: with the right status, a sentence that names the thing, and nothing left on the node."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from crishim.cri.api import api_pb2 as pb
from root.harness import registry as behaviours
from root.harness.client import Cri, connect, container_config, metadata, refused, sleeping, unique
from root.harness.daemon import Daemon
from root.harness.images import (
    OTHER_ARCHITECTURE,
    Document,
    Entry,
    Image,
    Layer,
    busybox,
    hard_link,
    index,
    layer,
    sha256,
    symlink,
)
from root.harness.leaks import assert_no_leaks, take, unchanged
from root.harness.registry import Behaviour, FakeRegistry, Registry, free_port

from .conftest import MakeDaemon

MAX_LAYER_BYTES = 16 << 20
MAX_LAYER_ENTRIES = 1000
STALL_SECONDS = 0.5
PLUGIN_SECONDS = 1.0
UNKNOWN_ID = "0123456789abcdef" * 4


def broken_runtime(verb: str) -> str:
    """An OCI runtime that fails at one of its commands."""
    return f"""
for argument in "$@"; do
    if [ "$argument" = {verb} ]; then
        echo '{{"level":"error","msg":"this runtime cannot {verb}","time":"2026-01-01T00:00:00Z"}}' >&2
        exit 1
    fi
done
exec runc "$@"
"""


@pytest.fixture(scope="module")
def daemon(make_module_daemon: MakeDaemon, image: str) -> Daemon:
    """One with low limits, and with runtimes that fail."""
    daemon = make_module_daemon()
    handlers = {f"no-{verb}": str(daemon.plugin(f"no-{verb}", broken_runtime(verb))) for verb in ("create", "start")}
    handlers["absent"] = str(daemon.base / "no-such-runtime")
    daemon.configure(
        {
            "image": {
                "max_layer_bytes": MAX_LAYER_BYTES,
                "max_layer_entries": MAX_LAYER_ENTRIES,
                "stall_seconds": STALL_SECONDS,
            },
            "network": {"plugin_timeout": PLUGIN_SECONDS},
            "runtime": {"handlers": {name: {"path": path} for name, path in handlers.items()}},
        }
    )
    daemon.start()
    daemon.pull(image)
    return daemon


@pytest.fixture
def fake(cri: Cri, fake_registry: FakeRegistry) -> FakeRegistry:
    """A registry in this process that the daemon uses."""
    with cri.daemon.registries_conf.open("a") as conf:
        conf.write(f'[[registry]]\nlocation = "{fake_registry.host}"\ninsecure = true\n')
    return fake_registry


@contextlib.asynccontextmanager
async def fails(cri: Cri, code: StatusCode, *mentions: str) -> AsyncIterator[None]:
    """The body's call is refused and changes nothing on the node."""
    async with unchanged(cri.daemon):
        with refused(code, *mentions):
            yield


# references and IDs


MALFORMED = [
    " ",
    "case/UPPER",
    "with space",
    "x:",
    "x:tag!",
    "x:" + "t" * 129,
    "x@",
    "x@sha256:abc",
    "x@md5:" + "0" * 32,
    "x@sha256:" + "g" * 64,
    ":tag",
    "a//b",
    "/a",
    "a/",
    "http://example.com/x",
    "example.com/" + "a" * 300,
    "0" * 64,
    "-x",
    "x\n",
    "x\0y",
    "ä",
    "exa mple.com/x",
    "example.com:port/x",
]


async def test_malformed_references(cri: Cri) -> None:
    async with unchanged(cri.daemon):
        for reference in MALFORMED:
            with refused(StatusCode.INVALID_ARGUMENT, repr(reference)[:40].rstrip("'")):
                await cri.pull(reference)


async def test_malformed_references_of_what_may_be_here(cri: Cri) -> None:
    pod = await cri.run_pod()
    async with unchanged(cri.daemon):
        for reference in ("case/UPPER", "x:tag!", "x@sha256:abc"):
            for call in (cri.image, cri.remove_image):
                with refused(StatusCode.INVALID_ARGUMENT, repr(reference)):
                    await call(reference)
            with refused(StatusCode.INVALID_ARGUMENT, repr(reference)):
                await cri.create(pod, container_config(reference, ["true"]))


async def test_unknown_ids(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    async with unchanged(cri.daemon):
        for call in (
            cri.status(UNKNOWN_ID),
            cri.start(UNKNOWN_ID),
            cri.exec(UNKNOWN_ID, ["true"]),
            cri.pod_status(UNKNOWN_ID),
            cri.create(UNKNOWN_ID, container_config(image, ["true"])),
        ):
            with refused(StatusCode.NOT_FOUND, UNKNOWN_ID):
                await call
        for unknown in ("localhost/not/pulled:v1", "sha256:" + "1" * 64, "123456789abc"):
            with refused(StatusCode.NOT_FOUND, unknown):
                await cri.create(pod, container_config(unknown, ["true"]))


async def test_ids_that_are_empty(cri: Cri, image: str) -> None:
    async with unchanged(cri.daemon):
        for call, field in (
            (cri.status(""), "container_id"),
            (cri.start(""), "container_id"),
            (cri.stop(""), "container_id"),
            (cri.remove(""), "container_id"),
            (cri.exec("", ["true"]), "container_id"),
            (cri.pod_status(""), "pod_sandbox_id"),
            (cri.stop_pod(""), "pod_sandbox_id"),
            (cri.remove_pod(""), "pod_sandbox_id"),
            (cri.create("", container_config(image, ["true"])), "pod_sandbox_id"),
            (cri.pull(""), "image"),
            (cri.image(""), "image"),
            (cri.remove_image(""), "image"),
        ):
            with refused(StatusCode.INVALID_ARGUMENT, field):
                await call


# what registries deliver


def one_file(text: str = "x") -> Image:
    """A small image."""
    return Image((layer([Entry("file", text.encode() * 500)]),))


TAMPERED: list[tuple[str, Behaviour, StatusCode, str]] = [
    ("manifest", behaviours.wrong, StatusCode.FAILED_PRECONDITION, "manifest"),
    ("manifest", behaviours.longer, StatusCode.FAILED_PRECONDITION, "manifest"),
    ("manifest", behaviours.shorter, StatusCode.FAILED_PRECONDITION, "manifest"),
    ("manifest", behaviours.broken_off, StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("manifest", behaviours.stalled, StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("manifest", behaviours.failing(404), StatusCode.NOT_FOUND, "manifest"),
    ("manifest", behaviours.failing(403), StatusCode.PERMISSION_DENIED, "manifest"),
    ("manifest", behaviours.failing(500), StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("config", behaviours.wrong, StatusCode.FAILED_PRECONDITION, "config"),
    ("config", behaviours.longer, StatusCode.FAILED_PRECONDITION, "config"),
    ("config", behaviours.shorter, StatusCode.FAILED_PRECONDITION, "config"),
    ("config", behaviours.broken_off, StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("config", behaviours.failing(404), StatusCode.NOT_FOUND, "blob"),
    ("layer", behaviours.wrong, StatusCode.FAILED_PRECONDITION, "layer"),
    ("layer", behaviours.longer, StatusCode.FAILED_PRECONDITION, "layer"),
    ("layer", behaviours.shorter, StatusCode.FAILED_PRECONDITION, "layer"),
    ("layer", behaviours.broken_off, StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("layer", behaviours.stalled, StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("layer", behaviours.failing(404), StatusCode.NOT_FOUND, "blob"),
    ("layer", behaviours.failing(500), StatusCode.UNKNOWN, "RegistryUnavailable: "),
    ("layer", behaviours.redirected("http://127.0.0.1:1/"), StatusCode.UNKNOWN, "RegistryUnavailable: "),
]


@pytest.mark.parametrize(
    ("part", "behaviour", "code", "mention"),
    [pytest.param(*row, id=f"{row[0]}-{number}") for number, row in enumerate(TAMPERED)],
)
async def test_part_of_an_image_that_does_not_come_as_it_should(
    cri: Cri, fake: FakeRegistry, part: str, behaviour: Behaviour, code: StatusCode, mention: str
) -> None:
    image = Image((layer([Entry("lower", b"lower")]), *one_file(unique("tampered")).layers))
    fake.put("tampered", image)
    digest = {"manifest": image.manifest.digest, "config": image.id, "layer": image.layers[-1].digest}[part]
    fake.behaviours[digest] = behaviour
    name = f"{fake.host}/tampered@{image.manifest.digest}"
    async with fails(cri, code, mention):
        await cri.pull(name)
    del fake.behaviours[digest]
    assert await cri.pull(name) == image.id, "nothing stands in the way of the next pull"


def gzipped(data: bytes, diff_id: str = "") -> Layer:
    """A layer of any content."""
    return Layer(gzip.compress(data, 1), diff_id or sha256(data))


@functools.cache
def bomb() -> Layer:
    """A layer that unpacks to more than the daemon allows."""
    return layer([Entry("zeros", bytes(MAX_LAYER_BYTES + 1))])


def good() -> Layer:
    """A layer with nothing wrong."""
    return layer([Entry("file", b"content")])


BROKEN: dict[str, tuple[Callable[[], Layer], str]] = {
    "diff ID": (lambda: dataclasses.replace(good(), diff_id=sha256(b"other")), sha256(b"other")),
    "neither gzip nor tar": (lambda: Layer(b"this is neither gzip nor tar" * 100, sha256(b"")), "neither gzip"),
    "gzip cut off": (lambda: dataclasses.replace(good(), data=good().data[:-20]), "gzip"),
    "gzip broken": (lambda: Layer(good().data[:20] + b"\xff" * 40 + good().data[60:], good().diff_id), "gzip"),
    "data after gzip": (lambda: dataclasses.replace(good(), data=good().data + b"more"), "gzip"),
    "gzip of no tar": (lambda: gzipped(b"not a tar archive" * 100), "tar"),
    "tar cut off": (lambda: gzipped(gzip.decompress(good().data)[:515]), "archive ends"),
    "bomb": (bomb, f"more than {MAX_LAYER_BYTES} bytes"),
    "entries": (
        lambda: layer([Entry(f"{number}") for number in range(MAX_LAYER_ENTRIES + 1)]),
        f"more than {MAX_LAYER_ENTRIES} entries",
    ),
    "escape": (lambda: layer([Entry("../escape", b"x")]), "../escape"),
    "escape in the middle": (lambda: layer([Entry("a/../../escape", b"x")]), "a/../../escape"),
    "hard link out": (lambda: layer([hard_link("link", "../../../../etc/passwd")]), "link"),
    "hard link to nothing": (lambda: layer([hard_link("link", "not-there")]), "not-there"),
    "file as directory": (lambda: layer([Entry("file", b"x"), Entry("file/below", b"x")]), "file"),
    "symlinks in a circle": (
        lambda: layer([symlink("a", "b"), symlink("b", "a"), Entry("a/x", b"x")]),
        "symlinks",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
async def test_layer_that_is_broken(cri: Cri, fake: FakeRegistry, what: str) -> None:
    make, mention = BROKEN[what]
    broken = await asyncio.to_thread(make)
    reference = fake.put("broken", Image((layer([Entry("below", b"1")]), broken)))
    async with fails(cri, StatusCode.FAILED_PRECONDITION, mention):
        await cri.pull(reference)


async def test_symlink_does_not_lead_out_of_a_layer(cri: Cri, fake: FakeRegistry, tmp_path: Path) -> None:
    """What is written through one lands in the layer, whatever it points to."""
    entries = [
        symlink("out", str(tmp_path)),
        Entry("out/file", b"x"),
        symlink("up", "../../.."),
        Entry("up/root", b"y"),
    ]
    image = Image((layer(entries),))
    await cri.pull(fake.put("symlinks", image))
    assert list(tmp_path.iterdir()) == []
    (content,) = [path for path in (cri.daemon.root / "layers").glob("*/fs") if (path / "up").is_symlink()]
    assert (content / "root").read_bytes() == b"y" and (content / str(tmp_path)[1:] / "file").read_bytes() == b"x"


def oci(**overrides: Any) -> Document:
    """A manifest with some of its parts replaced."""
    return dataclasses.replace(one_file(), overrides=overrides).manifest


def descriptor(data: bytes, **overrides: Any) -> dict[str, Any]:
    """A descriptor of the small image's layer, in part replaced."""
    return {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": sha256(data), "size": len(data)} | (
        overrides
    )


LAYER, CONFIG = one_file().layers[0].data, one_file().config_data
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFESTS: dict[str, tuple[Document, str]] = {
    "not JSON": (Document(b"{", oci().media_type), "manifest"),
    "not an object": (Document(b"[]", oci().media_type), "manifest"),
    "nothing in it": (Document(b"{}", oci().media_type), "manifest"),
    "schema 1": (Document(b'{"schemaVersion": 1, "name": "x"}', "application/json"), "schema 1"),
    "wrong types": (oci(layers="none"), "manifest"),
    "artifact": (oci(config=descriptor(CONFIG, mediaType="application/vnd.cncf.helm.config.v1+json")), "helm"),
    "unknown compression": (oci(layers=[descriptor(LAYER, mediaType="application/x-lz4")]), "application/x-lz4"),
    "too many layers": (oci(layers=[descriptor(LAYER)] * 200), "200 layers"),
    "layers missing": (oci(layers=[]), "0 layers"),
    "size of a layer too small": (oci(layers=[descriptor(LAYER, size=len(LAYER) - 1)]), "layer"),
    "size of a layer too large": (oci(layers=[descriptor(LAYER, size=len(LAYER) + 1)]), "layer"),
    "size of a layer negative": (oci(layers=[descriptor(LAYER, size=-1)]), "negative"),
    "size of the config": (oci(config=descriptor(CONFIG, mediaType=CONFIG_TYPE, size=len(CONFIG) + 1)), "config"),
    "size of the config huge": (oci(config=descriptor(CONFIG, mediaType=CONFIG_TYPE, size=1 << 40)), "config"),
    "kind of digest": (oci(layers=[descriptor(LAYER, digest="md5:" + "0" * 32)]), "md5"),
    "path as digest": (oci(layers=[descriptor(LAYER, digest="sha256:../../x")]), "../../x"),
    "other platform only": (
        index([dataclasses.replace(one_file(), architecture=OTHER_ARCHITECTURE)]),
        OTHER_ARCHITECTURE,
    ),
    "empty index": (index([]), "nothing"),
}


@pytest.mark.parametrize("what", list(MANIFESTS))
async def test_manifest_that_is_wrong(cri: Cri, fake: FakeRegistry, what: str) -> None:
    document, mention = MANIFESTS[what]
    fake.put("manifests", one_file())
    fake.manifests["manifests:bad"] = document
    async with fails(cri, StatusCode.FAILED_PRECONDITION, mention):
        await cri.pull(f"{fake.host}/manifests:bad")


@pytest.mark.parametrize(
    ("config", "mention"),
    [
        (b"{", "config"),
        (b"[1]", "config"),
        (json.dumps({"rootfs": {"diff_ids": "x"}}).encode(), "config"),
        (json.dumps({"os": "windows", "rootfs": {"diff_ids": ["sha256:" + "0" * 64]}}).encode(), "windows"),
        (json.dumps({"architecture": "mips", "rootfs": {"diff_ids": ["sha256:" + "0" * 64]}}).encode(), "mips"),
        (json.dumps({"os": "linux", "rootfs": {"diff_ids": []}}).encode(), "diff IDs"),
        (json.dumps({"os": "linux", "rootfs": {"diff_ids": ["../../x"]}}).encode(), "../../x"),
    ],
)
async def test_config_that_is_wrong(cri: Cri, fake: FakeRegistry, config: bytes, mention: str) -> None:
    fake.put("configs", one_file())
    fake.blobs[sha256(config)] = config
    fake.manifests["configs:bad"] = oci(config=descriptor(config, mediaType=CONFIG_TYPE))
    async with fails(cri, StatusCode.FAILED_PRECONDITION, mention):
        await cri.pull(f"{fake.host}/configs:bad")


async def test_image_that_the_registry_does_not_have(cri: Cri, registry: Registry) -> None:
    async with fails(cri, StatusCode.NOT_FOUND, registry.host, "no/such/image"):
        await cri.pull(f"{registry.host}/no/such/image:v1")


async def test_registry_that_is_not_there(cri: Cri) -> None:
    port = free_port()
    async with fails(cri, StatusCode.UNKNOWN, "RegistryUnavailable: ", f"127.0.0.1:{port}"):
        await cri.pull(f"127.0.0.1:{port}/x:v1")


async def test_image_that_the_policy_rejects(cri: Cri, image: str) -> None:
    policy = cri.daemon.base / "policy.json"
    text = policy.read_text()
    policy.write_text('{"default": [{"type": "reject"}]}')
    try:
        async with fails(cri, StatusCode.UNKNOWN, "SignatureValidationFailed: ", image):
            await cri.pull(image)
    finally:
        policy.write_text(text)


# pod networks


PLUGINS = {
    "error": (
        """[ $CNI_COMMAND = ADD ] || exit 0
        echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no address is left", "details": "of 254"}'; exit 1""",
        StatusCode.INTERNAL,
        "no address is left",
    ),
    "crash": ("[ $CNI_COMMAND = ADD ] || exit 0; echo 'went wrong' >&2; kill -9 $$", StatusCode.INTERNAL, "wrong"),
    "silent failure": ("[ $CNI_COMMAND = ADD ] || exit 0; exit 3", StatusCode.INTERNAL, "3"),
    "hang": ("[ $CNI_COMMAND = ADD ] || exit 0; sleep 97", StatusCode.DEADLINE_EXCEEDED, "within 1 s"),
    "garbage": ("echo garbage", StatusCode.INTERNAL, "plugin"),
    "nothing": ("true", StatusCode.INTERNAL, "plugin"),
    "list": ("echo '[]'", StatusCode.INTERNAL, "plugin"),
    "no addresses": ("echo '{}'", StatusCode.INTERNAL, "address"),
    "text as addresses": ("""echo '{"ips": "x"}'""", StatusCode.INTERNAL, "malformed result"),
    "numbers as addresses": ("""echo '{"ips": [1]}'""", StatusCode.INTERNAL, "malformed result"),
    "address without address": ("""echo '{"ips": [{}]}'""", StatusCode.INTERNAL, "malformed result"),
    "number as address": ("""echo '{"ips": [{"address": 5}]}'""", StatusCode.INTERNAL, "malformed result"),
    "words as address": ("""echo '{"ips": [{"address": "not one"}]}'""", StatusCode.INTERNAL, "not one"),
    "interface as text": (
        """echo '{"interfaces": [1], "ips": [{"address": "198.51.100.7/24", "interface": 0}]}'""",
        StatusCode.INTERNAL,
        "malformed result",
    ),
}


@pytest.mark.parametrize("what", list(PLUGINS))
async def test_network_plugin_that_fails(cri: Cri, what: str) -> None:
    """After the bridge plugin, which has given an address by then."""
    script, code, mention = PLUGINS[what]
    cri.daemon.plugin("failing", script)
    await cri.remove_pod(await cri.run_pod())  # the bridge is made once and stays
    name = unique("pod")
    with cri.daemon.other_network(cri.daemon.bridge_plugin(), {"type": "failing"}):
        async with fails(cri, code, mention):
            await cri.run_pod(cri.pod_config(name))
    assert await cri.run_pod(cri.pod_config(name)), "the name is free"


async def test_network_plugin_that_is_not_installed(cri: Cri) -> None:
    with cri.daemon.other_network({"type": "no-such-plugin"}):
        async with fails(cri, StatusCode.UNAVAILABLE, "no-such-plugin"):
            await cri.run_pod()


def sticky(daemon: Daemon) -> Path:
    """Install a plugin that refuses DEL as long as there is a file."""
    broken = daemon.base / "broken"
    daemon.plugin(
        "sticky",
        f"""
        if [ $CNI_COMMAND = ADD ]; then echo '{{"ips": [{{"address": "198.51.100.7/24"}}]}}'
        elif [ -e {broken} ]; then echo '{{"code": 11, "msg": "the switch is busy"}}'; exit 1; fi
        """,
    )
    return broken


async def test_network_plugin_that_does_not_let_go_for_a_while(cri: Cri) -> None:
    """The pod is there for another try."""
    broken = sticky(cri.daemon)
    with cri.daemon.other_network({"type": "sticky"}):
        pod = await cri.run_pod()
    broken.touch()
    for call in (cri.stop_pod, cri.remove_pod):
        with refused(StatusCode.INTERNAL, "sticky", "the switch is busy"):
            await call(pod)
    (listed,) = await cri.pods(id=pod)
    assert listed.state == pb.SANDBOX_NOTREADY
    broken.unlink()
    await cri.remove_pod(pod)
    assert await cri.pods(id=pod) == []


async def test_network_plugin_that_never_lets_go(make_daemon: MakeDaemon) -> None:
    """The pod goes all the same after some tries: it must not stop its successor."""
    daemon = make_daemon()
    daemon.write_network({"type": "sticky"})
    broken = sticky(daemon)
    await asyncio.to_thread(daemon.start)
    async with connect(daemon) as cri:
        config = cri.pod_config()
        pod = await cri.run_pod(config)
        broken.touch()
        for attempt in range(5):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await cri.remove_pod(pod)
                break
            assert attempt < 4
        assert await cri.pods() == []
        again = await cri.run_pod(config)
        await asyncio.to_thread(daemon.restart)
    async with connect(daemon) as cri:
        assert [item.id for item in await cri.pods()] == [again]
        broken.unlink()
        await cri.remove_pod(again)


async def test_network_plugin_that_fails_twice(cri: Cri) -> None:
    """Nothing of the pod stays, and the plugin is asked again to let go."""
    calls = cri.daemon.base / "calls"
    script = f"""echo $CNI_COMMAND >> {calls}; [ $(grep -c DEL {calls}) -lt 2 ] || exit 0
        echo '{{"code": 11, "msg": "cannot '$CNI_COMMAND'"}}'; exit 1"""
    cri.daemon.plugin("failing", script)
    with cri.daemon.other_network({"type": "failing"}):
        async with fails(cri, StatusCode.INTERNAL, "cannot ADD", "cannot DEL"):
            await cri.run_pod()
        for _ in range(200):
            if calls.read_text().split() == ["ADD", "DEL", "DEL"]:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail(f"DEL is not tried again: {calls.read_text().split()}")


# OCI runtimes and what they are given


async def test_runtime_that_cannot_create(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(handler="no-create")
    config = container_config(image, sleeping())
    for _ in range(2):
        async with fails(cri, StatusCode.INTERNAL, "this runtime cannot create"):
            await cri.create(pod, config)


async def test_runtime_that_cannot_start(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(handler="no-start")
    container = await cri.create(pod, container_config(image, sleeping()))
    with refused(StatusCode.INTERNAL, "this runtime cannot start"):
        await cri.start(container)
    status = await cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert "this runtime cannot start" in status.message
    assert status.created_at <= status.started_at <= status.finished_at
    with refused(StatusCode.FAILED_PRECONDITION, container):
        await cri.start(container)


async def test_runtime_that_is_not_installed(cri: Cri, image: str) -> None:
    pod = await cri.run_pod(handler="absent")
    async with fails(cri, StatusCode.INTERNAL, "no-such-runtime"):
        await cri.create(pod, container_config(image, sleeping()))


async def test_runtime_handler_that_is_not_configured(cri: Cri) -> None:
    async with fails(cri, StatusCode.INVALID_ARGUMENT, "kata", "runc"):
        await cri.run_pod(handler="kata")


async def made_once(cri: Cri, pod: str, image: str) -> None:
    """The pod's cgroup is made for its first container and stays as long as the pod."""
    await cri.remove(await cri.create(pod, container_config(image, ["true"])))


async def test_command_that_is_not_there(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    await made_once(cri, pod, image)
    for command in ("no-such-command", "/no/such/command", "/etc/passwd", "/etc"):
        async with fails(cri, StatusCode.INTERNAL, command):
            await cri.create(pod, container_config(image, [command]))


async def test_no_command_at_all(cri: Cri, registry: Registry) -> None:
    image = busybox().with_config(Cmd=None, Labels={"mark": unique("x")})
    await cri.pull(registry.push("commandless", image))
    pod = await cri.run_pod()
    async with fails(cri, StatusCode.INVALID_ARGUMENT, "command"):
        await cri.create(pod, container_config(image.id))


Change = Callable[[pb.ContainerConfig], None]


def change(**fields: Any) -> Change:
    """Sets fields of a container's config."""
    return lambda config: config.MergeFrom(pb.ContainerConfig(**fields))


def context(**fields: Any) -> Change:
    """Sets fields of the security context."""
    linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(**fields))
    return lambda config: config.linux.MergeFrom(linux)


def number(value: int) -> pb.Int64Value:
    """A wrapped number."""
    return pb.Int64Value(value=value)


def modes(**values: Any) -> pb.NamespaceOption:
    """Namespace options."""
    return pb.NamespaceOption(**values)


MOUNT = {"container_path": "/m", "host_path": "/etc"}
CONTAINERS: dict[str, tuple[Change, StatusCode, str]] = {
    "metadata": (lambda config: config.ClearField("metadata"), StatusCode.INVALID_ARGUMENT, "metadata"),
    "name": (lambda config: config.metadata.ClearField("name"), StatusCode.INVALID_ARGUMENT, "metadata.name"),
    "image": (lambda config: config.ClearField("image"), StatusCode.INVALID_ARGUMENT, "image"),
    "windows": (change(windows=pb.WindowsContainerConfig()), StatusCode.INVALID_ARGUMENT, "windows"),
    "log path": (change(log_path="../out"), StatusCode.INVALID_ARGUMENT, "log_path"),
    "log path absolute": (change(log_path="/tmp/x.log"), StatusCode.INVALID_ARGUMENT, "log_path"),
    "working directory": (change(working_dir="relative"), StatusCode.INVALID_ARGUMENT, "working_dir"),
    "environment": (change(envs=[pb.KeyValue(key="A=B", value=b"c")]), StatusCode.INVALID_ARGUMENT, "A=B"),
    "environment name": (change(envs=[pb.KeyValue(key="", value=b"c")]), StatusCode.INVALID_ARGUMENT, "environment"),
    "environment NUL": (change(envs=[pb.KeyValue(key="A", value=b"\0")]), StatusCode.INVALID_ARGUMENT, "A"),
    "environment bytes": (change(envs=[pb.KeyValue(key="A", value=b"\xff")]), StatusCode.INVALID_ARGUMENT, "A"),
    "mount source missing": (
        change(mounts=[pb.Mount(container_path="/m", host_path="/no/such/place")]),
        StatusCode.FAILED_PRECONDITION,
        "/no/such/place",
    ),
    "mount source relative": (
        change(mounts=[pb.Mount(container_path="/m", host_path="etc")]),
        StatusCode.INVALID_ARGUMENT,
        "host_path",
    ),
    "mount point relative": (
        change(mounts=[pb.Mount(container_path="m", host_path="/etc")]),
        StatusCode.INVALID_ARGUMENT,
        "container_path",
    ),
    "mount on the root": (
        change(mounts=[pb.Mount(container_path="/", host_path="/etc")]),
        StatusCode.INVALID_ARGUMENT,
        "container_path",
    ),
    "propagation": (
        change(mounts=[pb.Mount(**MOUNT, propagation=9)]),  # type: ignore[arg-type]
        StatusCode.INVALID_ARGUMENT,
        "propagation",
    ),
    "device missing": (
        change(devices=[pb.Device(host_path="/dev/no-such-device", container_path="/dev/x")]),
        StatusCode.FAILED_PRECONDITION,
        "/dev/no-such-device",
    ),
    "device is a file": (
        change(devices=[pb.Device(host_path="/etc/passwd", container_path="/dev/x")]),
        StatusCode.INVALID_ARGUMENT,
        "/etc/passwd",
    ),
    "device permissions": (
        change(devices=[pb.Device(host_path="/dev/null", container_path="/dev/x", permissions="rx")]),
        StatusCode.INVALID_ARGUMENT,
        "/dev/null",
    ),
    "stop signal": (change(stop_signal=9999), StatusCode.INVALID_ARGUMENT, "stop_signal"),
    "user unknown": (context(run_as_username="nobody-knows"), StatusCode.INVALID_ARGUMENT, "nobody-knows"),
    "user twice": (
        context(run_as_username="daemon", run_as_user=number(1)),
        StatusCode.INVALID_ARGUMENT,
        "run_as_user",
    ),
    "user negative": (context(run_as_user=number(-1)), StatusCode.INVALID_ARGUMENT, "-1"),
    "user too large": (context(run_as_user=number(1 << 40)), StatusCode.INVALID_ARGUMENT, str(1 << 40)),
    "group without user": (context(run_as_group=number(1)), StatusCode.INVALID_ARGUMENT, "run_as_group"),
    "capability": (
        context(capabilities=pb.Capability(add_capabilities=["FLY"])),
        StatusCode.INVALID_ARGUMENT,
        "FLY",
    ),
    "privileged": (context(privileged=True), StatusCode.FAILED_PRECONDITION, "privileged"),
    "network of the node": (
        context(namespace_options=modes(network=pb.NODE)),
        StatusCode.INVALID_ARGUMENT,
        "namespace_options.network",
    ),
    "ipc of the node": (
        context(namespace_options=modes(ipc=pb.NODE)),
        StatusCode.INVALID_ARGUMENT,
        "namespace_options.ipc",
    ),
    "target missing": (
        context(namespace_options=modes(pid=pb.TARGET)),
        StatusCode.INVALID_ARGUMENT,
        "target_id",
    ),
    "target unknown": (
        context(namespace_options=modes(pid=pb.TARGET, target_id=UNKNOWN_ID)),
        StatusCode.NOT_FOUND,
        UNKNOWN_ID,
    ),
    "mode unknown": (context(namespace_options=modes(pid=17)), StatusCode.INVALID_ARGUMENT, "17"),
    "apparmor": (context(apparmor_profile="strange"), StatusCode.INVALID_ARGUMENT, "strange"),
    "cdi": (change(CDI_devices=[pb.CDIDevice(name="vendor.com/gpu=0")]), StatusCode.UNIMPLEMENTED, "vendor.com/gpu=0"),
    "image volume": (
        change(mounts=[pb.Mount(container_path="/m", image=pb.ImageSpec(image="x"))]),
        StatusCode.UNIMPLEMENTED,
        "/m",
    ),
    "id mappings": (
        change(mounts=[pb.Mount(**MOUNT, uidMappings=[pb.IDMapping(length=1)])]),  # type: ignore[arg-type]
        StatusCode.UNIMPLEMENTED,
        "mappings of mount /m",
    ),
    "user namespace": (
        context(namespace_options=modes(userns_options=pb.UserNamespace(mode=pb.POD))),
        StatusCode.UNIMPLEMENTED,
        "user namespaces",
    ),
}


async def test_container_that_cannot_be(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    await made_once(cri, pod, image)
    for what, (apply, code, mention) in CONTAINERS.items():
        config = container_config(image, sleeping(), f"bad-{what.replace(' ', '-')}")
        apply(config)
        try:
            async with fails(cri, code, mention):
                await cri.create(pod, config)
        except BaseException as err:
            err.add_note(f"case: {what}")
            raise
    assert not Path("/no/such/place").exists() and not (cri.daemon.logs / "out").exists()


def pod_context(**fields: Any) -> pb.LinuxPodSandboxConfig:
    """The Linux part of a pod with a security context."""
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(**fields))


def pod_modes(**values: Any) -> pb.LinuxPodSandboxConfig:
    """The Linux part of a pod with namespace options."""
    return pod_context(namespace_options=modes(**values))


PODS: dict[str, tuple[dict[str, Any], StatusCode, str]] = {
    "windows": ({"windows": pb.WindowsPodSandboxConfig()}, StatusCode.INVALID_ARGUMENT, "windows"),
    "log directory": ({"log_directory": "relative"}, StatusCode.INVALID_ARGUMENT, "log_directory"),
    "host name": ({"hostname": "not a name"}, StatusCode.INVALID_ARGUMENT, "not a name"),
    "host name too long": ({"hostname": "x" * 65}, StatusCode.INVALID_ARGUMENT, "hostname"),
    "port": (
        {"port_mappings": [pb.PortMapping(host_port=70000, container_port=1)]},
        StatusCode.INVALID_ARGUMENT,
        "70000",
    ),
    "port negative": (
        {"port_mappings": [pb.PortMapping(host_port=80, container_port=-1)]},
        StatusCode.INVALID_ARGUMENT,
        "-1",
    ),
    "port nowhere": ({"port_mappings": [pb.PortMapping(host_port=80)]}, StatusCode.INVALID_ARGUMENT, "80"),
    "port protocol": (
        {"port_mappings": [pb.PortMapping(host_port=80, container_port=80, protocol=7)]},  # type: ignore[arg-type]
        StatusCode.INVALID_ARGUMENT,
        "protocol",
    ),
    "port address": (
        {"port_mappings": [pb.PortMapping(host_port=80, container_port=80, host_ip="localhost")]},
        StatusCode.INVALID_ARGUMENT,
        "localhost",
    ),
    "sysctl of the node": (
        {"linux": pb.LinuxPodSandboxConfig(sysctls={"kernel.panic": "1"})},
        StatusCode.INVALID_ARGUMENT,
        "kernel.panic",
    ),
    "sysctl escape": (
        {"linux": pb.LinuxPodSandboxConfig(sysctls={"net/../kernel/panic": "1"})},
        StatusCode.INVALID_ARGUMENT,
        "net/../kernel/panic",
    ),
    "sysctl unknown": (
        {"linux": pb.LinuxPodSandboxConfig(sysctls={"net.no.such": "1"})},
        StatusCode.INVALID_ARGUMENT,
        "net.no.such",
    ),
    "sysctl value": (
        {"linux": pb.LinuxPodSandboxConfig(sysctls={"net.core.somaxconn": "many"})},
        StatusCode.INVALID_ARGUMENT,
        "net.core.somaxconn",
    ),
    "sysctl without namespace": (
        {
            "linux": pb.LinuxPodSandboxConfig(
                sysctls={"net.core.somaxconn": "5"},
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=modes(network=pb.NODE)),
            )
        },
        StatusCode.INVALID_ARGUMENT,
        "net.core.somaxconn",
    ),
    "cgroup parent": (
        {"linux": pb.LinuxPodSandboxConfig(cgroup_parent="/a/../../b")},
        StatusCode.INVALID_ARGUMENT,
        "cgroup_parent",
    ),
    "network of a container": ({"linux": pod_modes(network=pb.CONTAINER)}, StatusCode.INVALID_ARGUMENT, "network"),
    "ipc of a target": ({"linux": pod_modes(ipc=pb.TARGET)}, StatusCode.INVALID_ARGUMENT, "ipc"),
    "pid of a target": ({"linux": pod_modes(pid=pb.TARGET)}, StatusCode.INVALID_ARGUMENT, "pid"),
    "group without user": ({"linux": pod_context(run_as_group=number(1))}, StatusCode.INVALID_ARGUMENT, "run_as_group"),
    "user namespace": (
        {"linux": pod_modes(userns_options=pb.UserNamespace(mode=pb.POD))},
        StatusCode.UNIMPLEMENTED,
        "user namespaces",
    ),
}


async def test_pod_that_cannot_be(cri: Cri) -> None:
    for what, (fields, code, mention) in PODS.items():
        try:
            async with fails(cri, code, mention):
                await cri.run_pod(cri.pod_config(**fields))
        except BaseException as err:
            err.add_note(f"case: {what}")
            raise


async def test_pod_without_identity(cri: Cri) -> None:
    async with unchanged(cri.daemon):
        with refused(StatusCode.INVALID_ARGUMENT, "config is missing"):
            await cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest())
        with refused(StatusCode.INVALID_ARGUMENT, "config.metadata"):
            await cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(hostname="x")))
        for field in ("name", "uid", "namespace"):
            config = pb.PodSandboxConfig(metadata=metadata())
            config.metadata.ClearField(field)
            with refused(StatusCode.INVALID_ARGUMENT, f"config.metadata.{field}"):
                await cri.run_pod(config)


async def test_container_without_config(cri: Cri) -> None:
    pod = await cri.run_pod()
    async with fails(cri, StatusCode.INVALID_ARGUMENT, "config is missing"):
        await cri.runtime.CreateContainer(pb.CreateContainerRequest(pod_sandbox_id=pod))


async def test_names_that_are_taken(cri: Cri, image: str) -> None:
    """By metadata alone: another attempt is another name."""
    config = cri.pod_config()
    pod = await cri.run_pod(config)
    async with fails(cri, StatusCode.ALREADY_EXISTS, config.metadata.name):
        await cri.run_pod(config)
    container = container_config(image, sleeping())
    await cri.create(pod, container)
    async with fails(cri, StatusCode.ALREADY_EXISTS, container.metadata.name):
        await cri.create(pod, container)
    container.metadata.attempt = config.metadata.attempt = 1
    await cri.create(pod, container)
    again = await cri.run_pod(config)
    await cri.create(again, container)


async def test_stop_with_a_negative_timeout(cri: Cri, image: str) -> None:
    container = await cri.run(await cri.run_pod(), container_config(image, sleeping()))
    async with fails(cri, StatusCode.INVALID_ARGUMENT, "timeout", "-1"):
        await cri.stop(container, -1)
    async with fails(cri, StatusCode.INVALID_ARGUMENT, "timeout", "-1"):
        await cri.exec(container, ["true"], -1)


async def test_log_directory_that_cannot_be_made(cri: Cri) -> None:
    async with fails(cri, StatusCode.INTERNAL, "/etc/passwd/logs"):
        await cri.run_pod(pb.PodSandboxConfig(metadata=metadata(), log_directory="/etc/passwd/logs"))


async def test_request_that_is_too_large(cri: Cri) -> None:
    async with fails(cri, StatusCode.RESOURCE_EXHAUSTED, str(16 << 20)):
        await cri.run_pod(cri.pod_config(annotations={"long": "x" * (17 << 20)}))
    assert (await cri.runtime.Version(pb.VersionRequest())).runtime_name == "crishim"


Raw = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]


async def test_bytes_that_are_no_message(cri: Cri) -> None:
    """The parser's errors must not end the daemon."""
    async with grpc.aio.insecure_channel(cri.daemon.target) as channel:
        call: Raw = channel.unary_unary("/runtime.v1.RuntimeService/RunPodSandbox")
        async with unchanged(cri.daemon):
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"\xff\xff\xff")
        unknown: Raw = channel.unary_unary("/runtime.v1.RuntimeService/NoSuchMethod")
        with refused(StatusCode.UNIMPLEMENTED):
            await unknown(b"")
    assert (await cri.runtime.Version(pb.VersionRequest())).runtime_name == "crishim"


# starting at all


def starts_in_vain(daemon: Daemon, *mentions: str, arguments: tuple[str, ...] = ()) -> None:
    """The daemon says in one line why it does not start."""
    lines = [line for line in daemon.start_in_vain(*arguments).splitlines() if line]
    assert lines and lines[-1].startswith("crishim: ") and "Traceback" not in "".join(lines), lines
    for mention in mentions:
        assert mention in lines[-1], f"{mention!r} is not in {lines[-1]!r}"


@pytest.fixture
def stopped(make_daemon: MakeDaemon) -> Daemon:
    """A daemon that has run and left its database."""
    daemon = make_daemon()
    daemon.start()
    assert daemon.terminate() == 0
    return daemon


def test_database_that_is_corrupt(stopped: Daemon) -> None:
    database = stopped.root / "crishim.db"
    for content in (b"this is no database" * 1000, database.read_bytes()[:5000] + b"\xff" * 20000):
        database.write_bytes(content)
        starts_in_vain(stopped, str(database))
        assert database.read_bytes() == content


def test_database_that_is_newer(stopped: Daemon) -> None:
    database = stopped.root / "crishim.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version=9999")
    content = database.read_bytes()
    starts_in_vain(stopped, str(database), "9999")
    assert database.read_bytes() == content


def test_database_with_a_record_that_cannot_be_read(stopped: Daemon) -> None:
    with contextlib.closing(sqlite3.connect(stopped.root / "crishim.db")) as connection:
        connection.execute("INSERT INTO sandboxes VALUES ('a', 'b', '{\"strange\": 1}')")
        connection.commit()
    starts_in_vain(stopped, "sandboxes")
    with contextlib.closing(sqlite3.connect(stopped.root / "crishim.db")) as connection:
        assert connection.execute("SELECT count(*) FROM sandboxes").fetchone() == (1,)


def test_database_that_is_a_directory(stopped: Daemon) -> None:
    database = stopped.root / "crishim.db"
    database.unlink()
    database.mkdir()
    starts_in_vain(stopped, str(database))
    assert database.is_dir()


def test_second_daemon_in_one_place(make_daemon: MakeDaemon) -> None:
    first, second = make_daemon(), make_daemon()
    first.start()
    before = take(first)
    starts_in_vain(second, str(first.root), arguments=("--root", str(first.root), "--state", str(first.state)))
    starts_in_vain(second, str(first.socket), arguments=("--api-listen", str(first.socket)))
    assert_no_leaks(first, before)
    with first.stubs() as (runtime, _):
        assert runtime.Version(pb.VersionRequest(), timeout=5).runtime_name == "crishim"


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (("--api-listen", "/tmp/" + "x" * 120), "107"),
        (("--api-listen", "relative.sock"), "relative.sock"),
        (("--root", "relative"), "relative"),
        (("--runtime-default", "kata"), "kata"),
        (("--metrics-listen", "nowhere"), "nowhere"),
        (("--image-stall-seconds", "0"), "image.stall_seconds"),
    ],
)
def test_settings_that_cannot_be(make_daemon: MakeDaemon, arguments: tuple[str, ...], mention: str) -> None:
    starts_in_vain(make_daemon(), mention, arguments=arguments)


def test_socket_that_is_something_else(make_daemon: MakeDaemon) -> None:
    """A file that is not a socket is nobody's leftover of ours."""
    daemon = make_daemon()
    daemon.socket.write_text("precious")
    starts_in_vain(daemon, str(daemon.socket))
    assert daemon.socket.read_text() == "precious"


def test_socket_that_a_crash_left(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.start()
    daemon.kill()
    assert stat.S_ISSOCK(os.stat(daemon.socket).st_mode)
    daemon.start()
    assert asyncio.run(_answers(daemon))


async def _answers(daemon: Daemon) -> bool:
    async with connect(daemon) as cri:
        return (await cri.runtime.Version(pb.VersionRequest())).runtime_name == "crishim"
