"""Files written whole or not at all, files read in foreign roots, and trees removed."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
from pathlib import Path

import pytest

from crishim.host.files import read_in_root, remove_empty_dirs, remove_tree, write_atomically

DEEP = 3000


def mode_of(path: Path) -> int:
    """The permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def open_fds() -> set[str]:
    """What this process has open."""
    return set(os.listdir("/proc/self/fd"))


def test_write_creates_with_mode(tmp_path: Path) -> None:
    """A new file has the mode asked for, whatever the umask, and nothing else is left."""
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "a", b"one", 0o644)
        write_atomically(tmp_path / "b", b"two")
    finally:
        os.umask(before)
    assert ((tmp_path / "a").read_bytes(), mode_of(tmp_path / "a")) == (b"one", 0o644)
    assert ((tmp_path / "b").read_bytes(), mode_of(tmp_path / "b")) == (b"two", 0o600)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_write_replaces_the_file_not_its_content(tmp_path: Path) -> None:
    """Who has the old file open goes on reading the old content; a symlink is replaced, not followed."""
    target, other = tmp_path / "a", tmp_path / "other"
    target.write_bytes(b"old")
    other.write_bytes(b"other")
    with target.open("rb") as old:
        write_atomically(target, b"new")
        assert old.read() == b"old"
    (tmp_path / "link").symlink_to(other)
    write_atomically(tmp_path / "link", b"new")
    assert (target.read_bytes(), other.read_bytes()) == (b"new", b"other")
    assert not (tmp_path / "link").is_symlink()


def test_write_after_a_crash(tmp_path: Path) -> None:
    """A temporary file left behind is used up: neither its content nor its mode survives."""
    (tmp_path / ".a.new").write_bytes(b"much longer than the new content")
    (tmp_path / ".a.new").chmod(0o666)
    write_atomically(tmp_path / "a", b"secret")
    assert ((tmp_path / "a").read_bytes(), mode_of(tmp_path / "a")) == (b"secret", 0o600)
    assert os.listdir(tmp_path) == ["a"]


def test_write_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    """The temporary name may not lead elsewhere."""
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / ".a.new").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"kept"
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """The error comes out, and no temporary file stays."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    before = open_fds()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "a", b"new")
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["old"]
    assert open_fds() == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a secret beside it, which nothing in the root may lead to."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_bytes(b"root:x:0:0")
    (root / "secret").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return root


@pytest.mark.parametrize("path", ["etc/passwd", "/etc/passwd", "//etc//./passwd", "/../etc/../etc/passwd"])
def test_read_in_root(root: Path, path: str) -> None:
    """Absolute or not, paths begin at the root, and ``..`` stops there."""
    assert read_in_root(root, path) == b"root:x:0:0"


@pytest.mark.parametrize("target", ["/secret", "../../../../secret", "../../secret", "/etc/../../secret", "/up/secret"])
def test_read_resolves_links_in_the_root(root: Path, target: str) -> None:
    """As a chrooted process would: the file outside is never seen."""
    (root / "up").symlink_to("..")
    (root / "etc/link").symlink_to(target)
    assert read_in_root(root, "/etc/link") == b"inside"


def test_read_does_not_leave_the_root(root: Path, tmp_path: Path) -> None:
    """Not by an absolute link to the real path, through a linked folder, or by procfs' magic links."""
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    (root / "self").symlink_to("/proc/self/root")
    for path in ("absolute", "folder/secret", "loop", "self/etc/passwd"):
        assert read_in_root(root, path) is None


def test_read_of_what_is_no_file(root: Path) -> None:
    """Missing files, folders, pipes and sockets are None, at once, and nothing stays open."""
    os.mkfifo(root / "pipe")
    before = open_fds()
    for path in ("missing", "etc", "", "/", "pipe", "etc/passwd/x", "n" * 5000):
        assert read_in_root(root, path) is None
    assert read_in_root(root / "missing", "etc/passwd") is None
    assert open_fds() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_read_opens_no_device(root: Path) -> None:
    """A node that an image has made is not touched: /dev/full could be read."""
    os.mknod(root / "device", stat.S_IFCHR | 0o666, os.makedev(1, 7))
    assert read_in_root(root, "device") is None


def test_read_stops_at_the_limit(root: Path) -> None:
    """An image's file may be of any size."""
    assert read_in_root(root, "etc/passwd", 4) == b"root"
    assert read_in_root(root, "etc/passwd", 100) == b"root:x:0:0"


def make_deep(top: Path, depth: int) -> None:
    """Folders in each other, each with a file, deeper than a path can be long."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_remove_deep_tree(tmp_path: Path) -> None:
    """Depth costs neither stack nor descriptors."""
    top = tmp_path / "top"
    top.mkdir()
    make_deep(top, DEEP)
    before = open_fds()
    remove_tree(top)
    assert not os.path.lexists(top)
    assert open_fds() == before


def test_remove_wide_tree(tmp_path: Path) -> None:
    """Folders of equal names from different places do not get in each other's way."""
    for path in ("a/x/y", "b/x/y", "c/x/y/z", "d"):
        (tmp_path / "top" / path).mkdir(parents=True)
        (tmp_path / "top" / path / "file").write_bytes(b"")
    (tmp_path / "top" / os.fsdecode(b"\xff\n")).mkdir()
    remove_tree(tmp_path / "top")
    assert os.listdir(tmp_path) == []


def test_remove_does_not_follow_links(tmp_path: Path) -> None:
    """Neither in the tree nor at its top."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    top = tmp_path / "top"
    (top / "sub").mkdir(parents=True)
    for name in ("link", "sub/link"):
        (top / name).symlink_to(kept)
    (top / "dangling").symlink_to("nowhere")
    remove_tree(top)
    (tmp_path / "link").symlink_to(kept)
    remove_tree(tmp_path / "link")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(kept) == ["file"]


def test_remove_what_is_no_folder(tmp_path: Path) -> None:
    """A file, a link that leads nowhere, and nothing at all."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "missing"):
        remove_tree(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_remove_with_names_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names for moved folders cannot be foreseen: an image that has them beforehand would keep its tree."""
    drawn = []
    token_hex = secrets.token_hex

    def draw(count: int) -> str:
        drawn.append(count)
        return token_hex(count)

    monkeypatch.setattr(secrets, "token_hex", draw)
    for number in range(20):
        (tmp_path / "top" / f".removing-{os.getpid()}-{number}" / "a" / "b").mkdir(parents=True)
    remove_tree(tmp_path / "top")
    assert os.listdir(tmp_path) == []
    assert min(drawn) >= 16


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("place", ["top", "top/a", "top/a/b"])
def test_remove_spares_what_is_mounted(tmp_path: Path, place: str) -> None:
    """A volume that is still mounted below a container's files is not emptied, on whatever level."""
    volume, top = tmp_path / "volume", tmp_path / "top"
    volume.mkdir()
    (volume / "data").touch()
    (volume / "sub").mkdir()
    (top / "a/b").mkdir(parents=True)
    subprocess.run(["mount", "--bind", volume, tmp_path / place], check=True)
    try:
        with pytest.raises(OSError, match=r"mounted on it|Device or resource busy"):
            remove_tree(top)
    finally:
        unmount(tmp_path)
    assert sorted(os.listdir(volume)) == ["data", "sub"]
    remove_tree(top)
    assert os.listdir(tmp_path) == ["volume"]


def unmount(below: Path) -> None:
    """Everything that is mounted below a folder."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted = line.split()[4]
        if mounted.startswith(f"{below}/"):
            subprocess.run(["umount", mounted], check=True)


def test_remove_empty_dirs(tmp_path: Path) -> None:
    """From the inside out, up to the first that has something in it; never ``stop`` itself."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    remove_empty_dirs(tmp_path / "a/b/c", tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    remove_empty_dirs(tmp_path / "a/b/c", tmp_path)
    assert os.listdir(tmp_path / "a") == ["file"]


def test_remove_empty_dirs_that_are_gone(tmp_path: Path) -> None:
    """What is gone already is passed over; a file is left alone."""
    (tmp_path / "a").mkdir()
    remove_empty_dirs(tmp_path / "a/b/c", tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    remove_empty_dirs(tmp_path / "file", tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_remove_empty_dirs_elsewhere(tmp_path: Path) -> None:
    """A path that is not below ``stop`` is not touched."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a", tmp_path / "b", tmp_path):
        remove_empty_dirs(path, tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
