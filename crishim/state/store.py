"""Typed rows: records in and out of the database."""

from __future__ import annotations

import sqlite3
from typing import TypeVar

import msgspec

from crishim.errors import AlreadyExists, NotFound, StateError
from crishim.model.records import (
    ContainerRecord,
    ImageRecord,
    LayerRecord,
    SandboxRecord,
    container_name,
    sandbox_name,
)
from crishim.state.database import Database

R = TypeVar("R", SandboxRecord, ContainerRecord, ImageRecord, LayerRecord)
_encode = msgspec.json.Encoder().encode


class Store:
    """The records of all kinds; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def _load(self, table: str, kind: type[R]) -> list[R]:
        decoder = msgspec.json.Decoder(kind)
        try:
            return [decoder.decode(row[0]) for row in self._db.read(f"SELECT record FROM {table}")]  # type: ignore[arg-type]
        except msgspec.MsgspecError as err:
            raise StateError(f"the database holds a record of {table} that cannot be read: {err}") from err

    def sandboxes(self) -> list[SandboxRecord]:
        """All sandboxes, at start."""
        return self._load("sandboxes", SandboxRecord)

    def containers(self) -> list[ContainerRecord]:
        """All containers, at start."""
        return self._load("containers", ContainerRecord)

    def images(self) -> list[ImageRecord]:
        """All images, at start."""
        return self._load("images", ImageRecord)

    def layers(self) -> list[LayerRecord]:
        """All layers, at start."""
        return self._load("layers", LayerRecord)

    async def add_sandbox(self, record: SandboxRecord) -> None:
        """Insert; :class:`AlreadyExists` if the name is taken."""
        name = sandbox_name(record.config)

        def work(db: sqlite3.Connection) -> None:
            try:
                db.execute("INSERT INTO sandboxes VALUES (?, ?, ?)", (record.id, name, _encode(record)))
            except sqlite3.IntegrityError as err:
                raise AlreadyExists(f"pod sandbox {name} exists already") from err

        await self._db.write(work)

    async def save_sandbox(self, record: SandboxRecord) -> None:
        """Update."""
        await self._db.execute(("UPDATE sandboxes SET record=? WHERE id=?", (_encode(record), record.id)))

    async def linger_sandbox(self, record: SandboxRecord) -> None:
        """Update, and free the name."""
        await self._db.execute(("UPDATE sandboxes SET name=id, record=? WHERE id=?", (_encode(record), record.id)))

    async def drop_sandbox(self, sandbox_id: str) -> None:
        """Delete: frees the name."""
        await self._db.execute(("DELETE FROM sandboxes WHERE id=?", (sandbox_id,)))

    async def add_container(self, record: ContainerRecord) -> None:
        """Insert; :class:`AlreadyExists` if the name is taken, :class:`NotFound` without its sandbox."""
        name = container_name(record.sandbox_id, record.config)

        def work(db: sqlite3.Connection) -> None:
            try:
                db.execute(
                    "INSERT INTO containers VALUES (?, ?, ?, ?)",
                    (record.id, name, record.sandbox_id, _encode(record)),
                )
            except sqlite3.IntegrityError as err:
                if err.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
                    raise NotFound(f"pod sandbox {record.sandbox_id} does not exist") from err
                raise AlreadyExists(f"container {name} exists already") from err

        await self._db.write(work)

    async def save_container(self, record: ContainerRecord) -> None:
        """Update."""
        await self._db.execute(("UPDATE containers SET record=? WHERE id=?", (_encode(record), record.id)))

    async def drop_container(self, container_id: str) -> None:
        """Delete: frees the name."""
        await self._db.execute(("DELETE FROM containers WHERE id=?", (container_id,)))

    async def save_images(self, changed: list[ImageRecord], dropped: list[str]) -> None:
        """Insert, update and delete images in one transaction: names move between images atomically."""
        await self._db.execute(
            *(("DELETE FROM images WHERE id=?", (image_id,)) for image_id in dropped),
            *(("INSERT OR REPLACE INTO images VALUES (?, ?)", (i.id, _encode(i))) for i in changed),
        )

    async def save_layer(self, record: LayerRecord) -> None:
        """Insert or update."""
        await self._db.execute(
            (
                "INSERT INTO layers VALUES (?, ?, ?) ON CONFLICT(chain_id) DO UPDATE"
                " SET number=excluded.number, record=excluded.record",
                (record.chain_id, record.number, _encode(record)),
            )
        )

    async def drop_layers(self, chain_ids: list[str]) -> None:
        """Delete."""
        await self._db.execute(*(("DELETE FROM layers WHERE chain_id=?", (c,)) for c in chain_ids))

    def fact(self, name: str) -> str | None:
        """A remembered fact about the node, at start."""
        rows = self._db.read("SELECT value FROM facts WHERE name=?", name)
        return str(rows[0][0]) if rows else None

    async def set_fact(self, name: str, value: str) -> None:
        """Remember a fact."""
        await self._db.execute(("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value)))
