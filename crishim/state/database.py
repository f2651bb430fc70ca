"""The daemon's memory on disk: one SQLite file, one writer thread, forward-only migrations.

A corrupt, unreadable or newer file is refused with what to do about it; it is never wiped.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from crishim.errors import StateError

T = TypeVar("T")
_log = logging.getLogger(__name__)

MIGRATIONS = (
    """
    CREATE TABLE sandboxes (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE containers (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE,
        sandbox_id TEXT NOT NULL REFERENCES sandboxes(id), record BLOB NOT NULL) WITHOUT ROWID;
    CREATE INDEX containers_by_sandbox ON containers(sandbox_id);
    CREATE TABLE images (id TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE layers (chain_id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, record BLOB NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
)
"""Version N of the schema is what the first N scripts make; ``PRAGMA user_version`` holds N."""


class Database:
    """Reads at start, then writes: every write is one transaction, committed when the call returns."""

    def __init__(self, path: Path) -> None:
        """Open or create ``path`` and bring it to this version; :class:`StateError` if it cannot be used."""
        self._path = path
        self._lock_fd = _lock(path)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="crishim-db")
        try:
            self._connection = self._writer.submit(_open, path).result()
        except BaseException:
            self.close()
            raise

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in a transaction on the writer thread; it is durable against our death after that."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._writer, self._transact, work)
        return await asyncio.shield(future)

    async def execute(self, *statements: tuple[str, Iterable[object]]) -> None:
        """Run statements as one transaction."""

        def work(connection: sqlite3.Connection) -> None:
            for sql, parameters in statements:
                connection.execute(sql, tuple(parameters))

        await self.write(work)

    def read(self, sql: str, *parameters: str) -> list[tuple[object, ...]]:
        """All rows of a query, for start-up: blocks."""
        return self._writer.submit(lambda: self._connection.execute(sql, parameters).fetchall()).result()

    def close(self) -> None:
        """Finish what was asked and close the file."""
        connection = getattr(self, "_connection", None)
        if connection is not None:
            self._writer.submit(connection.close).result()
        self._writer.shutdown()
        os.close(self._lock_fd)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
        except sqlite3.Error as err:
            _roll_back(connection)
            raise StateError(f"cannot write {self._path}: {err}") from err
        except BaseException:
            _roll_back(connection)
            raise
        return result


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _lock(path: Path) -> int:
    """Hold ``path`` for this process: two daemons on one root would undo each other's work."""
    lock = path.with_suffix(".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise StateError(f"cannot open {lock}: {err.strerror}") from err
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(fd)
        raise StateError(f"another crishim uses {path.parent}: stop it or give this one a root of its own") from err
    except OSError as err:
        os.close(fd)
        raise StateError(f"cannot lock {lock}: {err.strerror}") from err
    return fd


def _open(path: Path) -> sqlite3.Connection:
    try:
        # a file that cannot be written is found now, not at the first pod; its mode is that of the log as well
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _set_up(connection, path)
        except BaseException:
            connection.close()
            raise
        path.chmod(0o600)
        return connection
    except (sqlite3.Error, OSError) as err:
        raise StateError(
            f"cannot use the database {path}: {err}; restore it from a backup, or move it away to start "
            "with nothing known (running containers are then no longer managed)"
        ) from err


def _set_up(connection: sqlite3.Connection, path: Path) -> None:
    problems = connection.execute("PRAGMA quick_check").fetchone()[0]
    if problems != "ok":
        raise sqlite3.DatabaseError(problems)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StateError(
            f"the database {path} has version {version}, this crishim knows up to {len(MIGRATIONS)}: "
            "run the newer crishim that wrote it, or give this one another root"
        )
    connection.execute("PRAGMA journal_mode=WAL")  # from here on the file may change
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    for number in range(version, len(MIGRATIONS)):
        _log.info("migrating the database to version %d", number + 1)
        connection.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version={number + 1}; COMMIT;")
