"""The layer store: one directory for each layer, known by chain ID, shared by all images that have it.

A chain ID names a layer together with everything below it (OCI image-spec, config.md). A directory counts
only once its row is in the database; others are leftovers and go at the next start.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from crishim.errors import BadImage, HostFailure
from crishim.host import libc
from crishim.host.files import remove_tree
from crishim.host.threads import in_thread
from crishim.layers.client import Pump, Report, UnpackWorkers
from crishim.model.records import LayerRecord
from crishim.observe.timeline import step
from crishim.state.operations import Operations, to_the_end
from crishim.state.store import Store

_log = logging.getLogger(__name__)
_OPAQUE_XATTR = "trusted.overlay.opaque"


def chain_ids(diff_ids: list[str]) -> list[str]:
    """The chain ID of each layer, lowest first."""
    chain: list[str] = []
    for diff_id in diff_ids:
        digest = hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest() if chain else ""
        chain.append(f"sha256:{digest}" if digest else diff_id)
    return chain


class LayerStore:
    """All layers. Methods that touch the disk do so in threads."""

    def __init__(self, directory: Path, store: Store, workers: UnpackWorkers, operations: Operations) -> None:
        self._directory = directory
        self._store = store
        self._workers = workers
        self._operations = operations
        self._layers: dict[str, LayerRecord] = {}
        self._pins: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        self._committing = asyncio.Lock()

    @property
    def directory(self) -> Path:
        """Where the layers are."""
        return self._directory

    def load(self, *, after_crash_of_host: bool) -> list[LayerRecord]:
        """Read the layers known; blocks.

        After an unclean reboot the layers not yet marked durable are returned, to be dropped: their data
        may not have reached the disk. So are rows whose directory is gone.
        """
        lost = []
        for record in self._store.layers():
            missing = not self.path(record).is_dir()
            if missing or (after_crash_of_host and not record.durable):
                lost.append(record)
            else:
                self._layers[record.chain_id] = record
        known = {str(record.number) for record in self._layers.values()}
        for entry in self._directory.iterdir():
            if entry.name not in known:
                remove_tree(entry)
        highest = max((record.number for record in self._layers.values()), default=0)
        self._numbers = itertools.count(highest + 1)
        return lost

    def get(self, chain_id: str) -> LayerRecord | None:
        """The layer, if it is here."""
        return self._layers.get(chain_id)

    def path(self, record: LayerRecord) -> Path:
        """The layer's content."""
        return self._directory / str(record.number) / "fs"

    def lower_dirs(self, chain: Collection[str]) -> tuple[str, ...]:
        """For an overlay mount: directories relative to :attr:`directory`, topmost first."""
        return tuple(f"{self._layers[chain_id].number}/fs" for chain_id in reversed(list(chain)))

    @contextmanager
    def pinned(self, chain: Collection[str]) -> Iterator[None]:
        """Keep these layers from :meth:`collect` while the body runs."""
        self._pins.update(chain)
        try:
            yield
        finally:
            self._pins.subtract(chain)
            self._pins += Counter()

    async def ingest(self, chain_id: str, diff_id: str, pump: Pump) -> tuple[int, Report]:
        """Unpack a layer into a new directory and verify it; it counts only after :meth:`commit`."""
        number = next(self._numbers)
        target = self._directory / str(number) / "fs"
        try:
            target.mkdir(parents=True)
            with step(f"unpack layer {diff_id[7:19]}"):
                report = await self._workers.unpack(target, pump)
            if report.diff_id != diff_id:
                raise BadImage(f"layer unpacks to {report.diff_id}, the image's config says {diff_id}")
        except BaseException:
            await asyncio.shield(in_thread(lambda: remove_tree(target.parent)))
            raise
        return number, report

    async def commit(self, chain: list[str], diff_id: str, number: int, report: Report) -> None:
        """Make the unpacked directory ``number`` the layer ``chain[-1]``, above the others of ``chain``.

        If somebody else has brought the layer meanwhile, theirs stays. Once begun it is done to the end.
        """
        await to_the_end(self._commit(chain, diff_id, number, report))

    async def _commit(self, chain: list[str], diff_id: str, number: int, report: Report) -> None:
        async with self._committing:
            if chain[-1] in self._layers:
                await self.discard(number)
                return
            record = LayerRecord(chain[-1], diff_id, number, report.size, report.entries)
            below = [self.path(self._layers[chain_id]) for chain_id in reversed(chain[:-1])]
            try:
                await in_thread(lambda: _finish(self.path(record), below, report))
                await self._store.save_layer(record)
            except BaseException:
                await self.discard(number)
                raise
            self._layers[record.chain_id] = record
        if not self._operations.under_way("sync layers"):
            self._operations.spawn("sync layers", self._make_durable)

    async def discard(self, number: int) -> None:
        """Drop a directory that was ingested and never committed."""
        await in_thread(lambda: remove_tree(self._directory / str(number)))

    async def forget(self, records: list[LayerRecord]) -> None:
        """Drop layers: first the rows, then the directories."""
        for record in records:
            self._layers.pop(record.chain_id, None)
        await self._store.drop_layers([record.chain_id for record in records])
        for record in records:
            await self.discard(record.number)

    async def collect(self, needed: Collection[str]) -> None:
        """Drop every layer that is neither in ``needed`` nor pinned."""
        unneeded = [r for r in self._layers.values() if r.chain_id not in needed and not self._pins[r.chain_id]]
        if unneeded:
            await self.forget(unneeded)

    def usage(self) -> tuple[int, int]:
        """Bytes and inodes of all layers, from their records."""
        records = self._layers.values()
        return sum(record.size for record in records), sum(record.entries for record in records)

    async def _make_durable(self) -> None:
        """Write what is committed to the device, then record that it is there."""
        while pending := [record for record in self._layers.values() if not record.durable]:
            await in_thread(lambda: _sync(self._directory))
            for record in pending:
                durable = msgspec.structs.replace(record, durable=True)
                if self._layers.get(record.chain_id) is record:
                    self._layers[record.chain_id] = durable
                    await self._store.save_layer(durable)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc.syncfs(fd)
    finally:
        os.close(fd)


def _finish(layer: Path, below: list[Path], report: Report) -> None:
    """What the worker may not do: mark opaque directories, and give unnamed ones the looks of those below."""
    for path in (bytes.fromhex(path) for path in report.implicit):
        _look_like_below(layer, below, path)
    for path in (bytes.fromhex(path) for path in report.opaque):
        fd = _open_directory(layer, path)
        if fd is not None:
            try:
                os.setxattr(f"/proc/self/fd/{fd}", _OPAQUE_XATTR, b"y")
            except OSError as err:
                raise HostFailure(f"cannot mark an opaque directory: {err.strerror}") from err
            finally:
                os.close(fd)


def _look_like_below(layer: Path, below: list[Path], path: bytes) -> None:
    """Copy mode, owner and times from the nearest layer below that has the directory."""
    for lower in below:
        source = _open_directory(lower, path)
        if source is None:
            continue
        try:
            found = os.fstat(source)
            target = _open_directory(layer, path)
            if target is not None:
                try:
                    os.chown(f"/proc/self/fd/{target}", found.st_uid, found.st_gid)
                    os.chmod(f"/proc/self/fd/{target}", stat.S_IMODE(found.st_mode))
                    os.utime(f"/proc/self/fd/{target}", ns=(found.st_atime_ns, found.st_mtime_ns))
                finally:
                    os.close(target)
            return
        finally:
            os.close(source)


def _open_directory(root: Path, path: bytes) -> int | None:
    """A descriptor of ``path`` as a process chrooted to ``root`` would resolve it, if it is a directory."""
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return libc.openat2(root_fd, path or b".", os.O_RDONLY | os.O_DIRECTORY, resolve=libc.RESOLVE_IN_ROOT)
    except OSError:
        return None
    finally:
        os.close(root_fd)
