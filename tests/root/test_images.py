"""Pulls from a real registry and from one that is told what to do; names, removal, and what containers see."""

from __future__ import annotations

import asyncio
import json
import tarfile
import urllib.request
from pathlib import Path

import grpc
import pytest

from crishim.cri.api import api_pb2 as pb
from root.harness import registry as behaviours
from root.harness.client import Cri, container_config, refused, sleeping, unique
from root.harness.daemon import Daemon
from root.harness.images import (
    OTHER_ARCHITECTURE,
    Entry,
    Image,
    busybox,
    folder,
    hard_link,
    index,
    layer,
    sha256,
    symlink,
)
from root.harness.leaks import unchanged
from root.harness.registry import FakeRegistry, Login, Registry


def small(text: str = "x", **config: object) -> Image:
    """An image of one file; ``text`` makes it different from others."""
    return Image((layer([Entry("file", text.encode())]),), config)


def trust(daemon: Daemon, fake: FakeRegistry) -> None:
    """Let the daemon use ``fake`` without TLS. The file is read again when it changes."""
    with daemon.registries_conf.open("a") as conf:
        conf.write(f'[[registry]]\nlocation = "{fake.host}"\ninsecure = true\n')


# pulls


async def test_pull_by_tag_and_by_digest(cri: Cri, registry: Registry) -> None:
    image = small(unique("content"))
    reference = registry.push("by/tag", image, "v1")
    assert await cri.pull(reference) == image.id
    found = await cri.image(reference)
    assert found is not None and found.id == image.id
    digest = f"{registry.host}/by/tag@{image.manifest.digest}"
    assert (list(found.repo_tags), list(found.repo_digests)) == ([reference], [digest])
    await cri.remove_image(image.id)
    assert await cri.pull(digest) == image.id
    found = await cri.image(digest)
    assert found is not None and (list(found.repo_tags), list(found.repo_digests)) == ([], [digest])
    assert await cri.image(reference) is None
    assert await cri.pull(f"{registry.host}/by/tag:v1@{image.manifest.digest}") == image.id


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
async def test_both_kinds_of_manifests_and_platforms(cri: Cri, registry: Registry, docker: bool) -> None:
    """The image for this node is taken out of an index, whatever comes first in it."""
    mark = unique("platform")
    mine = Image((layer([Entry("mine", mark.encode())]),), {"User": "1000:5"}, docker)
    other = Image((layer([Entry("other", mark.encode())]),), {}, docker, OTHER_ARCHITECTURE)
    repository = f"indexed/{'docker' if docker else 'oci'}"
    for image in (other, mine):
        registry.push(repository, image, image.architecture)
    document = index([other, mine], docker=docker)
    reference = registry.push_document(repository, document, "latest")
    assert await cri.pull(reference) == mine.id
    found = await cri.image(reference)
    assert found is not None
    name = f"{registry.host}/{repository}"
    assert set(found.repo_digests) == {f"{name}@{document.digest}", f"{name}@{mine.manifest.digest}"}
    assert found.uid.value == 1000 and found.username == ""
    for reference in (*found.repo_digests, *found.repo_tags, found.id, found.id.removeprefix("sha256:")[:12]):
        same = await cri.image(reference)
        assert same is not None and same.id == mine.id, reference
    with refused(grpc.StatusCode.FAILED_PRECONDITION, OTHER_ARCHITECTURE):
        await cri.pull(f"{name}:{OTHER_ARCHITECTURE}")


async def test_layers_that_are_not_compressed_or_empty(cri: Cri, registry: Registry) -> None:
    image = Image((layer([Entry("a", b"1")], compress=False), layer([]), layer([Entry("b", b"2")])))
    assert await cri.pull(registry.push("plain", image)) == image.id
    nothing = Image((), {"Cmd": ["x"]})
    assert await cri.pull(registry.push("nothing", nothing)) == nothing.id


async def test_layers_on_top_of_each_other(cri: Cri, registry: Registry) -> None:
    """Whiteouts, opaque directories, replaced files, kinds of files, owners and modes: as a container sees them."""
    base = layer(
        [
            folder("d"),
            folder("d/gone"),
            Entry("d/gone/file", b"1"),
            Entry("d/kept", b"kept"),
            Entry("d/removed", b"1"),
            folder("opaque"),
            Entry("opaque/old", b"1"),
            Entry("changed", b"old"),
            folder("was-directory"),
            Entry("was-directory/file", b"1"),
            Entry("was-file", b"1"),
        ]
    )
    middle = layer(
        [
            Entry("d/.wh.removed"),
            Entry("d/.wh.gone"),
            Entry("opaque/.wh..wh..opq"),
            Entry("opaque/new", b"new"),
            Entry("changed", b"new", 0o4751, uid=33, gid=4),
            Entry("was-directory", b"file"),
            folder("was-file"),
            symlink("link", "d/kept"),
            hard_link("changed-too", "changed"),
            Entry("pipe", kind=tarfile.FIFOTYPE, mode=0o600),
            Entry("implicit/deep/file", b"deep"),
        ]
    )
    top = layer([folder("d/gone"), Entry("d/gone/again", b"again")])
    image = busybox().above(base, middle, top)
    await cri.pull(registry.push("layered", image))
    container = await cri.run(await cri.run_pod(), container_config(image.id, sleeping()))
    assert await cri.sh(container, "cd /d; echo *; cat gone/again; cat /link") == "gone kept\nagainkept"
    assert await cri.sh(container, "cd /d/gone; echo *; cd /opaque; echo *") == "again\nnew\n"
    assert await cri.sh(container, "stat -c '%a %u %g %h' /changed") == "4751 33 4 2\n"
    assert await cri.sh(container, "cat /changed /changed-too /was-directory; test -d /was-file") == "newnewfile"
    assert await cri.sh(container, "test -p /pipe; stat -c %a /pipe; cat /implicit/deep/file") == "600\ndeep"


async def test_containers_do_not_write_into_images(cri: Cri, image: str) -> None:
    pod = await cri.run_pod()
    first = await cri.run(pod, container_config(image, sleeping()))
    await cri.sh(first, "echo changed > /etc/passwd; rm -r /root; touch /new")
    second = await cri.run(pod, container_config(image, sleeping()))
    assert "www-data" in await cri.sh(second, "cat /etc/passwd; test -d /root; test ! -e /new")


async def test_same_pulls_at_once_share_the_work(cri: Cri, fake_registry: FakeRegistry) -> None:
    trust(cri.daemon, fake_registry)
    image = Image(tuple(layer([Entry(f"file{number}", unique("c").encode() * 1000)]) for number in range(4)))
    reference = fake_registry.put("shared", image)
    assert await asyncio.gather(*(cri.pull(reference) for _ in range(6))) == [image.id] * 6
    assert [fake_registry.asked(item.digest) for item in image.layers] == [1] * 4


async def test_images_share_layers(cri: Cri, fake_registry: FakeRegistry) -> None:
    """Also when pulled at the same time; what is here is not fetched again, and stays while one image needs it."""
    trust(cri.daemon, fake_registry)
    common = layer([Entry("common", unique("c").encode() * 1000)])
    images = [Image((common, layer([Entry("own", unique("own").encode())]))) for _ in range(3)]
    references = [fake_registry.put(f"common{number}", image) for number, image in enumerate(images)]
    await asyncio.gather(*(cri.pull(reference) for reference in references[:2]))
    await cri.pull(references[2])
    assert fake_registry.asked(common.digest) == 1
    before = len(list((cri.daemon.root / "layers").iterdir()))
    await cri.remove_image(images[0].id)
    await cri.remove_image(images[1].id)
    assert len(list((cri.daemon.root / "layers").iterdir())) == before - 2
    assert await cri.pull(references[0]) == images[0].id
    assert fake_registry.asked(common.digest) == 1


async def test_tag_that_moves(cri: Cri, registry: Registry) -> None:
    """The image it had stays, without the tag."""
    old, new = small(unique("old")), small(unique("new"))
    reference = registry.push("moving", old)
    assert await cri.pull(reference) == old.id
    registry.push("moving", new)
    assert await cri.pull(reference) == new.id
    found, left = await cri.image(reference), await cri.image(old.id)
    assert found is not None and found.id == new.id
    assert left is not None and (list(left.repo_tags), len(left.repo_digests)) == ([], 1)


async def test_pull_again_changes_nothing(cri: Cri, image: str) -> None:
    async with unchanged(cri.daemon):
        first = await cri.image(image)
        assert first is not None and await cri.pull(image) == first.id
        assert await cri.image(image) == first


# names


async def test_references_belong_together(cri: Cri, registry: Registry) -> None:
    """What PullImage returns is the image's ID, which containers have; their image_ref is the repo digest."""
    image = busybox().with_config(Labels={"mark": unique("x")})
    reference = registry.push("related", image)
    pulled = await cri.pull(reference)
    found = await cri.image(reference)
    assert found is not None and pulled == found.id == image.id == found.spec.image
    pod = await cri.run_pod()
    for name in (reference, pulled, pulled.removeprefix("sha256:"), found.repo_digests[0]):
        container = await cri.create(pod, container_config(name, ["true"]))
        status, (listed,) = await cri.status(container), await cri.containers(id=container)
        assert status.image_id == listed.image_id == pulled
        assert status.image_ref == listed.image_ref == f"{registry.host}/related@{image.manifest.digest}"
        assert status.image.image == listed.image.image == name


@pytest.mark.parametrize("by", ["id", "bare id", "short id", "tag", "digest"])
async def test_removal_takes_all_names(cri: Cri, registry: Registry, by: str) -> None:
    image = small(unique("removed"))
    references = [registry.push("removed", image, tag) for tag in ("a", "b")]
    for reference in references:
        await cri.pull(reference)
    (found,) = [item for item in await cri.image_list() if item.id == image.id]
    assert list(found.repo_tags) == references
    (file,) = (cri.daemon.root / "layers").glob("*/fs/file")
    names = {
        "id": image.id,
        "bare id": image.id.removeprefix("sha256:"),
        "short id": image.id.removeprefix("sha256:")[:12],
        "tag": references[0],
        "digest": f"{registry.host}/removed@{image.manifest.digest}",
    }
    await cri.remove_image(names[by])
    for name in names.values():
        assert await cri.image(name) is None
    assert not file.parents[1].exists(), "the layer is gone from the disk"
    await cri.remove_image(names[by])


async def test_image_that_is_not_here(cri: Cri) -> None:
    for name in ("localhost/never/pulled:v1", "sha256:" + "0" * 64, "0123456789ab"):
        assert await cri.image(name) is None
        await cri.remove_image(name)
    request = pb.ListImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image="localhost/never/pulled:v1")))
    assert list((await cri.images.ListImages(request)).images) == []


async def test_image_in_use_is_not_removed(cri: Cri, registry: Registry) -> None:
    image = busybox().with_config(Labels={"mark": unique("used")})
    reference = registry.push("used", image)
    await cri.pull(reference)
    container = await cri.create(await cri.run_pod(), container_config(reference, ["true"]))
    async with unchanged(cri.daemon):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, reference, container):
            await cri.remove_image(reference)
    assert await cri.image(reference) is not None
    await cri.remove(container)
    await cri.remove_image(reference)
    assert await cri.image(image.id) is None


async def test_list_of_one_image(cri: Cri, image: str) -> None:
    request = pb.ListImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image=image)))
    assert [list(item.repo_tags) for item in (await cri.images.ListImages(request)).images] == [[image]]


async def test_users_of_images(cri: Cri, registry: Registry) -> None:
    for user, uid, name in (("", None, ""), ("12", 12, ""), ("www-data:adm", None, "www-data")):
        image = small(unique("user"), User=user)
        await cri.pull(registry.push("users", image))
        found = await cri.image(image.id)
        assert found is not None and found.username == name
        assert (found.uid.value if found.HasField("uid") else None) == uid


async def test_verbose_status(cri: Cri, image: str) -> None:
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=image), verbose=True)
    info = json.loads((await cri.images.ImageStatus(request)).info["info"])
    assert info["imageSpec"]["config"]["Cmd"] == ["sh"]
    assert info["chainID"] == busybox().layers[0].diff_id


async def test_file_system_info_follows_the_layers(cri: Cri, registry: Registry) -> None:
    async def used() -> tuple[int, int]:
        answer = await cri.images.ImageFsInfo(pb.ImageFsInfoRequest())
        (images,), containers = answer.image_filesystems, answer.container_filesystems
        assert images.fs_id.mountpoint and images.timestamp > 0 and len(containers) == 1
        assert Path(images.fs_id.mountpoint).is_dir()
        return images.used_bytes.value, images.inodes_used.value

    before = await used()
    image = Image((layer([Entry("a", unique("a").encode() * 1000), folder("d"), Entry("d/b", b"b" * 5000)]),))
    await cri.pull(registry.push("sized", image))
    size = (await used())[0] - before[0]
    found = await cri.image(image.id)
    assert found is not None and found.size == size >= 5000 + 3000
    assert (await used())[1] - before[1] >= 3
    await cri.remove_image(image.id)
    assert await used() == before


# registries


async def test_mirror_comes_first_and_the_registry_itself_last(cri: Cri, registry: Registry) -> None:
    image = small(unique("mirrored"))
    registry.push("mirror/of/team/app", image, "v1")
    conf = cri.daemon.registries_conf.read_text()
    cri.daemon.registries_conf.write_text(
        f"""{conf}
[[registry]]
prefix = "mirrored.test/team"
location = "127.0.0.1:1/nobody/listens/here"
insecure = true
[[registry.mirror]]
location = "127.0.0.1:1/nobody"
insecure = true
[[registry.mirror]]
location = "{registry.host}/mirror/of/team"
insecure = true
"""
    )
    assert await cri.pull("mirrored.test/team/app:v1") == image.id
    found = await cri.image(image.id)
    assert found is not None and list(found.repo_tags) == ["mirrored.test/team/app:v1"]
    with refused(grpc.StatusCode.UNKNOWN, "RegistryUnavailable: ", "127.0.0.1:1"):
        await cri.pull("mirrored.test/team/other:v1")


async def test_short_names_use_the_search_registries(cri: Cri, registry: Registry) -> None:
    image = small(unique("short"))
    registry.push("short/name", image)
    conf = cri.daemon.registries_conf.read_text()
    cri.daemon.registries_conf.write_text(f'unqualified-search-registries = ["{registry.host}"]\n{conf}')
    try:
        assert await cri.pull("short/name") == image.id
        found = await cri.image(f"{registry.host}/short/name:latest")
        assert found is not None and found.id == image.id
    finally:
        cri.daemon.registries_conf.write_text(conf)


async def test_blocked_registry(cri: Cri) -> None:
    with cri.daemon.registries_conf.open("a") as conf:
        conf.write('[[registry]]\nlocation = "blocked.test"\nblocked = true\n')
    async with unchanged(cri.daemon):
        with refused(grpc.StatusCode.PERMISSION_DENIED, "blocked.test"):
            await cri.pull("blocked.test/x:v1")


async def test_registry_without_tls_must_be_allowed(cri: Cri, fake_registry: FakeRegistry) -> None:
    reference = fake_registry.put("plain", small())
    async with unchanged(cri.daemon):
        with refused(grpc.StatusCode.UNKNOWN, "RegistryUnavailable: ", fake_registry.host):
            await cri.pull(reference)
    assert fake_registry.seen == [], "nothing was sent in the clear"


async def test_anonymous_token(cri: Cri, fake_registry: FakeRegistry) -> None:
    trust(cri.daemon, fake_registry)
    fake_registry.login = Login("token-for-all")
    image = small(unique("anonymous"))
    assert await cri.pull(fake_registry.put("anonymous", image)) == image.id
    assert fake_registry.asked("/token") == 1
    assert fake_registry.seen[-1].authorization == "Bearer token-for-all"


async def test_token_for_a_password(cri: Cri, fake_registry: FakeRegistry) -> None:
    trust(cri.daemon, fake_registry)
    fake_registry.login = Login("secret-token", "user", "pass:word")
    image = small(unique("password"))
    reference = fake_registry.put("private", image)
    async with unchanged(cri.daemon):
        for auth in (None, pb.AuthConfig(username="user", password="mistaken")):
            with refused(grpc.StatusCode.PERMISSION_DENIED, fake_registry.host):
                await cri.pull(reference, auth)
    assert await cri.pull(reference, pb.AuthConfig(username="user", password="pass:word")) == image.id
    await cri.remove_image(image.id)
    encoded = fake_registry.login.basic.removeprefix("Basic ")
    assert await cri.pull(reference, pb.AuthConfig(auth=encoded)) == image.id
    await cri.remove_image(image.id)
    assert await cri.pull(reference, pb.AuthConfig(registry_token="secret-token")) == image.id
    log = cri.daemon.log()
    assert not any(secret in log for secret in ("pass:word", "secret-token", encoded, "mistaken"))


async def test_credentials_do_not_follow_redirects(cri: Cri, fake_registry: FakeRegistry) -> None:
    """Registries send clients to a storage elsewhere, which must not see the token."""
    trust(cri.daemon, fake_registry)
    fake_registry.login = Login("token")
    image = small(unique("redirected"))
    reference = fake_registry.put("redirected", image)
    blob = image.layers[0]
    with behaviours.serving() as storage:
        storage.blobs[blob.digest] = blob.data
        fake_registry.behaviours[blob.digest] = behaviours.redirected(f"http://{storage.host}/v2/x/blobs/{blob.digest}")
        assert await cri.pull(reference) == image.id
        assert [item.authorization for item in storage.seen] == [""]


async def test_errors_that_pass_are_tried_again(cri: Cri, fake_registry: FakeRegistry) -> None:
    trust(cri.daemon, fake_registry)
    image = small(unique("flaky"))
    reference = fake_registry.put("flaky", image)
    digest = image.layers[0].digest
    failures = 1

    def flaky(handler: behaviours.Handler, data: bytes) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            handler.answer(503, b"{}")
        else:
            handler.answer(200, data)

    fake_registry.behaviours[digest] = flaky
    assert await cri.pull(reference) == image.id
    assert fake_registry.asked(digest) == 2


async def test_registry_speaks_http_for_tests() -> None:
    """The registry in this process does what the tests believe it to do."""
    with behaviours.serving() as fake:
        fake.put("x", small())
        address = f"http://{fake.host}/v2/x/manifests/latest"
        data = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read())
        assert sha256(data) == small().manifest.digest
