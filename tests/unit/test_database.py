"""The database: what it holds it keeps, and what it cannot use it leaves alone."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from crishim.errors import AlreadyExists, Code, CrishimError, NotFound, StateError
from crishim.host import libc
from crishim.host.threads import run_in_own_thread
from crishim.model.cri import (
    ContainerConfig,
    ContainerMetadata,
    KeyValue,
    LinuxContainerUser,
    PodSandboxConfig,
    PodSandboxMetadata,
)
from crishim.model.records import (
    ContainerRecord,
    ContainerState,
    ImageConfig,
    ImageRecord,
    LayerRecord,
    SandboxRecord,
    SandboxState,
)
from crishim.state import database
from crishim.state.database import Database
from crishim.state.store import Store

SANDBOX = SandboxRecord(
    id="s1", config=PodSandboxConfig(PodSandboxMetadata("dns", "uid", "kube-system", 0)), handler="runc",
    state=SandboxState.READY, created_at=1, boot_id="b", cgroup_parent="/p",
)  # fmt: skip
CONTAINER = ContainerRecord(
    id="c1", sandbox_id="s1", handler="runc", state=ContainerState.CREATED, created_at=1, boot_id="b",
    config=ContainerConfig(ContainerMetadata("web"), envs=[KeyValue("A", b"\xff")]),
    image_id="i", image_ref="r", stop_signal=15, user=LinuxContainerUser(1, 2, [3]),
)  # fmt: skip
IMAGE = ImageRecord("sha256:1", "", [], 5, ImageConfig(cmd=["x"]), repo_tags=["a:1"])
LAYER = LayerRecord("sha256:c", "sha256:d", 1, 2, 3)
LATER_SCRIPT = "CREATE TABLE later (id TEXT PRIMARY KEY);"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the database is."""
    return tmp_path / "crishim.db"


@contextmanager
def opened(path: Path) -> Iterator[tuple[Database, Store]]:
    """The database, open."""
    with closing(Database(path)) as db:
        yield db, Store(db)


def refusal(path: Path) -> CrishimError:
    """The error on opening ``path``; whatever is there has the same bytes afterwards."""
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StateError) as caught:
        Database(path)
    assert (path.read_bytes() if path.is_file() else None) == before, "the file was changed"
    assert caught.value.code is Code.INTERNAL
    return caught.value


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[Database, Store]]:
    """The database, open, for tests with a loop, which is free meanwhile."""
    db = await asyncio.to_thread(Database, path)
    try:
        yield db, Store(db)
    finally:
        await asyncio.to_thread(db.close)


def fill(path: Path) -> None:
    """Put something in that must not get lost."""

    async def write() -> None:
        async with serving(path) as (_, store):
            await store.add_sandbox(SANDBOX)
            for number in range(100):
                await store.save_layer(LayerRecord(f"sha256:{number:064}", "d" * 64, number, 0, 0))

    asyncio.run(write())


def sql(path: Path, *statements: str) -> None:
    """Change the file behind the daemon's back."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def version(path: Path) -> int:
    """The version in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def renamed(name: str) -> SandboxRecord:
    """Another sandbox."""
    config = PodSandboxConfig(PodSandboxMetadata(name, "uid", "kube-system", 0))
    return msgspec.structs.replace(SANDBOX, id=name, config=config)


def test_new_file(path: Path) -> None:
    """Empty, of the newest version, and only for root."""
    with opened(path) as (_, store):
        assert not any((store.sandboxes(), store.containers(), store.images(), store.layers()))
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert version(path) == len(database.MIGRATIONS)


async def test_reopening(path: Path) -> None:
    """Everything is as it was written."""
    async with serving(path) as (_, store):
        await store.add_sandbox(SANDBOX)
        await store.add_container(CONTAINER)
        await store.save_images([IMAGE], [])
        await store.save_layer(LAYER)
    async with serving(path) as (_, store):
        assert store.sandboxes() == [SANDBOX]
        assert store.containers() == [CONTAINER]
        assert store.images() == [IMAGE]
        assert store.layers() == [LAYER]


async def test_updates_and_deletions(path: Path) -> None:
    """The latest state is what is read; what is deleted frees its name."""
    async with serving(path) as (_, store):
        await store.add_sandbox(SANDBOX)
        await store.add_container(CONTAINER)
        await store.save_sandbox(msgspec.structs.replace(SANDBOX, state=SandboxState.NOTREADY))
        await store.save_container(msgspec.structs.replace(CONTAINER, exit_code=3))
        await store.save_images([IMAGE, msgspec.structs.replace(IMAGE, id="sha256:2")], [])
        await store.save_images([msgspec.structs.replace(IMAGE, repo_tags=["b:1"])], ["sha256:2"])
        await store.save_layer(LAYER)
        await store.save_layer(msgspec.structs.replace(LAYER, durable=True))
        assert [record.state for record in store.sandboxes()] == [SandboxState.NOTREADY]
        assert [record.exit_code for record in store.containers()] == [3]
        assert [(record.id, record.repo_tags) for record in store.images()] == [("sha256:1", ["b:1"])]
        assert [record.durable for record in store.layers()] == [True]
        await store.drop_container("c1")
        await store.drop_sandbox("s1")
        await store.drop_layers(["sha256:c"])
        await store.add_sandbox(msgspec.structs.replace(SANDBOX, id="s2"))
        assert (len(store.containers()), len(store.layers())) == (0, 0)


async def test_names_are_taken_once(path: Path) -> None:
    """A second sandbox or container of the same name is refused by that name."""
    async with serving(path) as (_, store):
        await store.add_sandbox(SANDBOX)
        with pytest.raises(AlreadyExists, match="pod sandbox dns_kube-system_uid_0 exists already"):
            await store.add_sandbox(msgspec.structs.replace(SANDBOX, id="s2"))
        await store.add_container(CONTAINER)
        with pytest.raises(AlreadyExists, match="container web_s1_0 exists already"):
            await store.add_container(msgspec.structs.replace(CONTAINER, id="c2"))
        assert (len(store.sandboxes()), len(store.containers())) == (1, 1)


async def test_containers_need_their_sandbox(path: Path) -> None:
    """Foreign keys hold, in both directions, and after reopening."""
    async with serving(path):
        pass
    async with serving(path) as (_, store):
        with pytest.raises(NotFound, match="pod sandbox s1 does not exist"):
            await store.add_container(CONTAINER)
        await store.add_sandbox(SANDBOX)
        await store.add_container(CONTAINER)
        with pytest.raises(StateError, match="FOREIGN KEY"):
            await store.drop_sandbox("s1")
        assert (len(store.sandboxes()), len(store.containers())) == (1, 1)


async def test_layer_numbers_are_used_once(path: Path) -> None:
    """A layer that takes another one's directory must not push it out of the database."""
    async with serving(path) as (_, store):
        await store.save_layer(LAYER)
        with pytest.raises(StateError, match="UNIQUE"):
            await store.save_layer(msgspec.structs.replace(LAYER, chain_id="sha256:other"))
        assert store.layers() == [LAYER]


async def test_transactions_are_whole(path: Path) -> None:
    """A failing statement undoes those before it; the next one works."""
    async with serving(path) as (db, store):
        with pytest.raises(StateError, match="cannot write") as caught:
            await db.execute(
                ("INSERT INTO facts VALUES (?, ?)", ("a", "1")), ("INSERT INTO facts VALUES (?, ?)", ("a", "2"))
            )
        assert str(path) in str(caught.value)

        def fail(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO facts VALUES ('b', '1')")
            raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError):
            await db.write(fail)
        assert db.read("SELECT * FROM facts") == []
        await store.add_sandbox(SANDBOX)
        assert store.sandboxes() == [SANDBOX]


async def test_a_caller_that_goes_away(path: Path) -> None:
    """Does not undo what was asked, nor stop what others ask."""
    async with serving(path) as (db, _):
        begun, go_on = threading.Event(), threading.Event()

        def slow(connection: sqlite3.Connection) -> None:
            begun.set()
            go_on.wait(5)
            connection.execute("INSERT INTO facts VALUES ('slow', '')")

        first = asyncio.create_task(db.write(slow))
        second = asyncio.create_task(db.execute(("INSERT INTO facts VALUES ('next', '')", ())))
        await asyncio.to_thread(begun.wait, 5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go_on.set()
        await second
        assert db.read("SELECT name FROM facts ORDER BY name") == [("next",), ("slow",)]


async def test_closing_finishes_what_was_asked(path: Path) -> None:
    """The daemon's last words are written."""
    db = Database(path)
    task = asyncio.create_task(db.execute(("INSERT INTO facts VALUES ('a', '')", ())))
    await asyncio.sleep(0)
    db.close()
    await task
    async with serving(path) as (db, _):
        assert db.read("SELECT name FROM facts") == [("a",)]


def test_what_was_written_survives_our_death(path: Path) -> None:
    """A killed daemon never gets to close the file."""
    code = """if True:
        import asyncio, os, sys, pathlib
        from crishim.state.database import Database
        db = Database(pathlib.Path(sys.argv[1]))
        asyncio.run(db.execute(("INSERT INTO facts VALUES ('a', '1')", ())))
        os.kill(os.getpid(), 9)
    """
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert result.returncode == -9
    with opened(path) as (db, _):
        assert db.read("SELECT value FROM facts WHERE name=?", "a") == [("1",)]


def test_writes_do_not_wait_for_the_disk(path: Path) -> None:
    """A write-ahead log, synchronised at checkpoints: safe against our death, and against power failure whole."""
    with opened(path) as (db, _):
        assert db.read("PRAGMA journal_mode") == [("wal",)]
        assert db.read("PRAGMA synchronous") == [(1,)]


async def test_facts(path: Path) -> None:
    """The last value of a name; nothing is known at first."""
    async with serving(path) as (_, store):
        assert store.fact("boot") is None
        await store.set_fact("boot", "1")
        await store.set_fact("other", "x")
        await store.set_fact("boot", "2")
    async with serving(path) as (_, store):
        assert (store.fact("boot"), store.fact("other")) == ("2", "x")


async def test_second_daemon(path: Path) -> None:
    """Is refused while the first one runs, and welcome afterwards."""
    async with serving(path) as (_, store):
        fds = len(list(Path("/proc/self/fd").iterdir()))
        error = refusal(path)
        assert len(list(Path("/proc/self/fd").iterdir())) == fds
        assert "another crishim" in str(error)
        assert str(path.parent) in str(error)
        await store.add_sandbox(SANDBOX)
    async with serving(path) as (_, store):
        assert store.sandboxes() == [SANDBOX]


def test_a_refused_database_is_let_go(path: Path) -> None:
    """No lock, no descriptor and no thread stay behind: the administrator can put a good one in place."""
    path.write_bytes(b"nonsense" * 1000)
    refusal(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = threading.active_count()
    for _ in range(3):
        refusal(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert threading.active_count() == threads
    path.unlink()
    with opened(path):
        pass


def test_not_a_database(path: Path) -> None:
    """Refused, with what to do about it."""
    path.write_bytes(b"this is no database, but it is somebody's\n" * 100)
    error = refusal(path)
    assert str(path) in str(error)
    assert "restore it from a backup" in str(error)


@pytest.mark.parametrize("wal", [True, False])
def test_damaged_page(path: Path, wal: bool) -> None:
    """Found at start, not when the page is needed; a copy without a write-ahead log stays without."""
    fill(path)
    if not wal:
        sql(path, "PRAGMA journal_mode=DELETE")
    good = path.read_bytes()
    assert len(good) > 10 * 4096
    for start in range(4096, len(good), 4096):
        path.write_bytes(good[:start] + b"\xa5" * 64 + good[start + 64 :])
        assert "restore it from a backup" in str(refusal(path))


def test_truncated_file(path: Path) -> None:
    """The end is missing: refused."""
    fill(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 8192 * 4096])
    assert "restore it from a backup" in str(refusal(path))


@pytest.mark.parametrize("wal", [True, False])
def test_newer_version(path: Path, wal: bool) -> None:
    """Of a newer crishim: refused, both versions named, not one bit changed."""
    fill(path)
    sql(path, "PRAGMA user_version=99", *([] if wal else ["PRAGMA journal_mode=DELETE"]))
    error = refusal(path)
    assert "version 99" in str(error)
    assert f"up to {len(database.MIGRATIONS)}" in str(error)


def as_nobody(work: Callable[[], object]) -> None:
    """Run without any capability, so that file modes count for root too."""

    def body() -> None:
        libc.set_capabilities(0)
        work()

    run_in_own_thread(body)


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_file_that_cannot_be_used(path: Path, mode: int) -> None:
    """Unreadable or read-only: refused at start, not at the first write."""
    fill(path)
    before = path.read_bytes()
    path.chmod(mode)
    with pytest.raises(StateError, match="cannot use the database"):
        as_nobody(lambda: Database(path).close())
    assert path.stat().st_mode & 0o777 == mode
    path.chmod(0o600)
    assert path.read_bytes() == before
    with opened(path) as (_, store):
        assert store.sandboxes() == [SANDBOX]


def test_folder_that_cannot_be_used(path: Path) -> None:
    """Missing, read-only, or no folder: a sentence, not a traceback."""
    assert "no such file" in str(refusal(path / "deeper" / "x.db")).lower()
    path.write_text("")
    assert "not a directory" in str(refusal(path / "x.db")).lower()
    folder = path.parent / "folder"
    folder.mkdir(mode=0o500)
    with pytest.raises(StateError, match="Permission denied"):
        as_nobody(lambda: Database(folder / "x.db"))


def test_folder_in_place_of_the_file(path: Path) -> None:
    """Refused."""
    path.mkdir()
    assert "cannot use the database" in str(refusal(path))


def test_migration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older file gets what it lacks and keeps what it has."""
    fill(path)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, LATER_SCRIPT))
    for _ in range(2):
        with opened(path) as (db, store):
            assert db.read("SELECT * FROM later") == []
            assert store.sandboxes() == [SANDBOX]
    assert version(path) == len(database.MIGRATIONS)


def test_failed_migration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the version before it, whole: the older crishim can go on with the file."""
    fill(path)
    known = database.MIGRATIONS
    broken = "CREATE TABLE half (id TEXT); DELETE FROM sandboxes; INSERT INTO nowhere VALUES (1);"
    monkeypatch.setattr(database, "MIGRATIONS", (*known, LATER_SCRIPT, broken))
    with pytest.raises(StateError, match="nowhere"):
        Database(path)
    assert version(path) == len(known) + 1
    monkeypatch.setattr(database, "MIGRATIONS", (*known, LATER_SCRIPT))
    with opened(path) as (db, store):
        assert store.sandboxes() == [SANDBOX]
        assert db.read("SELECT name FROM sqlite_master WHERE name IN ('half', 'later')") == [("later",)]


def test_unreadable_record(path: Path) -> None:
    """Refused with the table's name; the record stays for whoever can read it."""
    fill(path)
    sql(path, "UPDATE sandboxes SET record='{\"id\": 5}'")
    with opened(path) as (_, store):
        with pytest.raises(StateError, match="a record of sandboxes"):
            store.sandboxes()
        assert len(store.layers()) == 100


async def test_many_writers(path: Path) -> None:
    """Concurrent writes are all done, one after the other."""
    async with serving(path) as (_, store):
        await asyncio.gather(*(store.add_sandbox(renamed(f"pod{number}")) for number in range(50)))
        assert len(store.sandboxes()) == 50
