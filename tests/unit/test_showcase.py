"""What the demo is made of: its registry, its image, and where it takes place."""

from __future__ import annotations

import gzip
import io
import json
import socket
import tarfile
import tomllib
from collections.abc import Iterator
from http import HTTPStatus
from ipaddress import IPv4Network
from pathlib import Path

import pytest
import urllib3

from crishim.cgroups.layout import Cgroups
from crishim.cli.showcase import image, place
from crishim.cli.showcase.image import File
from crishim.cli.showcase.place import Place
from crishim.cli.showcase.registry import Registry, select
from crishim.config.load import load
from crishim.config.settings import Config, HandlerSettings, NetworkSettings, RuntimeSettings
from crishim.errors import HostFailure
from crishim.images.manifest import Document, read_config, read_manifest

HEADER = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
FILES = [File("/bin/tool", b"x" * 1000, 0o755), File("/bin/other", link="/bin/tool"), File("/etc/passwd", b"root")]


@pytest.fixture
def registry() -> Iterator[Registry]:
    """A running registry."""
    with Registry() as registry:
        yield registry


def get(registry: Registry, path: str, method: str = "GET", **headers: str) -> urllib3.BaseHTTPResponse:
    """Ask it on a connection of our own, which is closed."""
    with urllib3.PoolManager() as pool:
        return pool.request(method, f"http://{registry.host}{path}", headers=headers, retries=False)


def test_registry_serves_images(registry: Registry) -> None:
    """Manifests by tag and digest, with their type; blobs by digest; nothing else."""
    made = image.assemble([image.archive(FILES)], {})
    name = registry.add("some/where", "v1", made)
    assert name == f"{registry.host}/some/where:v1"
    assert get(registry, "/v2/").status == 200
    for reference in ("v1", made.digest):
        answer = get(registry, f"/v2/some/where/manifests/{reference}")
        assert (answer.status, answer.data) == (200, made.manifest)
        assert answer.headers["Content-Type"] == made.media_type
        assert answer.headers["Docker-Content-Digest"] == made.digest
    for digest, blob in made.blobs.items():
        assert get(registry, f"/v2/some/where/blobs/{digest}").data == blob
    assert get(registry, "/v2/some/where/manifests/v2").status == 404
    assert get(registry, "/v2/else/where/manifests/v1").status == 404
    assert [request.status for request in registry.requests][-2:] == [404, 404]


def test_registry_answers_heads_and_ranges(registry: Registry) -> None:
    """A part of a blob, or its length alone."""
    digest = registry.add_blob(b"0123456789")
    path = f"/v2/any/blobs/{digest}"
    answer = get(registry, path, Range="bytes=2-4")
    assert (answer.status, answer.data, answer.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    answer = get(registry, path, method="HEAD")
    assert (answer.status, answer.data, answer.headers["Content-Length"]) == (200, b"", "10")
    answer = get(registry, path, Range="bytes=10-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */10")


def test_registry_hangs_up_on_tls(registry: Registry) -> None:
    """At once, so that a client that tries TLS first goes on without."""
    host, _, port = registry.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(b"\x16\x03\x01 a client hello")
        assert client.recv(100) == b""


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [
        ("", 200, (0, 10)),
        ("bytes=0-", 206, (0, 10)),
        ("bytes=3-5", 206, (3, 6)),
        ("bytes=3-99", 206, (3, 10)),
        ("bytes=-4", 206, (6, 10)),
        ("bytes=-40", 206, (0, 10)),
        ("bytes=10-", 416, (0, 0)),
        ("bytes=-0", 416, (0, 0)),
        ("bytes=5-3", 200, (0, 10)),
        ("bytes=-", 200, (0, 10)),
        ("bytes=0-1,3-4", 200, (0, 10)),
        ("lines=0-1", 200, (0, 10)),
    ],
)
def test_ranges(wanted: str, status: int, part: tuple[int, int]) -> None:
    """RFC 9110: what is malformed or manifold is answered with the whole."""
    assert select(wanted, 10) == (HTTPStatus(status), part)


def test_image_is_what_the_daemon_reads() -> None:
    """Manifest and config pass its checks, and agree with the layer."""
    made = image.assemble([image.archive(FILES)], {"Cmd": ["/bin/tool"]})
    manifest = read_manifest(Document(made.digest, made.manifest, made.media_type))
    config = read_config(made.blobs[manifest.config.digest], manifest)
    assert config.config is not None
    assert config.config.cmd == ["/bin/tool"]
    layer = gzip.decompress(made.blobs[manifest.layers[0].digest])
    assert config.rootfs.diff_ids == [image.digest_of(layer)]
    assert made.size == len(made.manifest) + manifest.config.size + manifest.layers[0].size


def test_images_are_reproducible() -> None:
    """The same files, the same digest, at any time."""
    first, second = (image.assemble([image.archive(FILES)], {}) for _ in range(2))
    assert first.digest == second.digest


def test_archive_has_directories_and_links() -> None:
    """Each directory once, before what is in it."""
    with tarfile.open(fileobj=io.BytesIO(image.archive(FILES))) as tar:
        assert tar.getnames() == ["bin", "bin/tool", "bin/other", "etc", "etc/passwd"]
        assert (tar.getmember("bin/other").islnk(), tar.getmember("bin/other").linkname) == (True, "bin/tool")
        assert {(entry.uid, entry.mtime) for entry in tar} == {(0, 0)}


def routes(*lines: tuple[str, str]) -> str:
    """/proc/net/route with these destinations and masks."""
    return HEADER + "".join(f"eth0\t{to}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n" for to, mask in lines)


def test_free_subnets() -> None:
    """Those that no route leads to; everybody has a default route."""
    everything = list(IPv4Network("198.18.0.0/15").subnets(new_prefix=24))
    assert place.free_subnets(HEADER) == everything
    assert place.free_subnets(routes(("00000000", "00000000"))) == everything
    for taken in (("000112C6", "00FFFFFF"), ("050112C6", "FFFFFFFF")):
        assert place.free_subnets(routes(taken)) == [everything[0], *everything[2:]]
    assert place.free_subnets(routes(("000012C6", "0000FEFF")))[0] == IPv4Network("10.224.0.0/24")
    with pytest.raises(HostFailure, match="every private subnet"):
        place.free_subnets(routes(("00000000", "00000080"), ("00000080", "00000080")))


@pytest.fixture
def where(tmp_path: Path) -> Place:
    """A place of which nothing is made yet."""
    cgroups = Cgroups(unified=True, systemd=False, controllers=frozenset(), mount=tmp_path)
    return Place("abc123", tmp_path / "root", tmp_path / "state", IPv4Network("198.18.7.0/24"), cgroups)


def test_names_of_a_place(where: Place) -> None:
    """Interfaces have at most 15 characters; cgroups the form that their driver wants."""
    assert len(where.bridge) <= 15
    assert where.cgroups.check_parent(where.cgroup) == "/crishim-demo-abc123"


def test_names_under_systemd(where: Place) -> None:
    """One slice, directly below the root."""
    cgroups = Cgroups(unified=True, systemd=True, controllers=frozenset())
    slice_ = Place(where.token, where.root, where.state, where.subnet, cgroups).cgroup
    assert cgroups.check_parent(slice_) == slice_
    assert cgroups.relative_path(f"{slice_}:crishim:x").startswith(f"{slice_}/")


def test_settings_of_the_demo_daemon(where: Place, tmp_path: Path) -> None:
    """All places are the demo's, programs stay the host's, and the file says the same as the value."""
    handlers = {"my.own": HandlerSettings(path='/opt/run "c"', args=["--fast"])}
    given = Config(
        runtime=RuntimeSettings(default="my.own", conmon="/opt/conmon", handlers=handlers),
        network=NetworkSettings(bin_dirs=["/opt/cni"]),
    )
    place.make(where, given)
    config = load(where.config)
    assert config == place.own_settings(where, given)
    assert (config.runtime, config.network.bin_dirs) == (given.runtime, given.network.bin_dirs)
    for path in (config.root, config.state, config.api.listen, config.image.policy, config.network.conf_dir):
        assert path.startswith(str(tmp_path))
    assert json.loads((where.root / "net.d" / "10-demo.conflist").read_text()) == place.network(where)


def test_trust(where: Place) -> None:
    """The demo's registry speaks plain HTTP."""
    place.make(where, Config())
    place.trust(where, "127.0.0.1:5000")
    conf = tomllib.loads((where.root / "registries.conf").read_text())
    assert conf == {"registry": [{"location": "127.0.0.1:5000", "insecure": True}]}
