"""The images of the node: which there are, by what names they are known, and what keeps them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import msgspec

from crishim.errors import FailedPrecondition, InvalidArgument
from crishim.images.reference import Reference, parse
from crishim.layers.store import LayerStore
from crishim.model.records import ImageRecord
from crishim.state.store import Store

_HEX = re.compile(r"[0-9a-f]{2,64}")


class ImageStore:
    """All images. Names are unique: a tag that moves to another image leaves the one it had."""

    def __init__(self, store: Store, layers: LayerStore) -> None:
        self._store = store
        self._layers = layers
        self._images: dict[str, ImageRecord] = {}
        self._by_name: dict[str, str] = {}
        self._changing = asyncio.Lock()
        """Held for every change: one is made from what the one before has left."""
        self.users: Callable[[str], str] = lambda _image_id: ""
        """Names a container that uses an image, or is empty; set by the containers' room."""

    def load(self) -> list[ImageRecord]:
        """Read the images known; those whose layers are gone are returned, to be dropped."""
        lost = []
        for record in self._store.images():
            if all(self._layers.get(chain_id) for chain_id in record.layers):
                self._remember(record)
            else:
                lost.append(record)
        return lost

    async def forget(self, records: list[ImageRecord]) -> None:
        """Drop image rows, and the layers that no image needs any more."""
        await self._store.save_images([], [record.id for record in records])
        for record in records:
            self._forget(record)
        await self.collect()

    def all(self) -> list[ImageRecord]:
        """Every image, oldest first."""
        return list(self._images.values())

    def find(self, text: str) -> ImageRecord | None:
        """The image that ``text`` means: an ID, a unique prefix of one, a tag or a digest; None if none does."""
        if not text:
            raise InvalidArgument("the image has no name")
        image_id = text if text.startswith("sha256:") else f"sha256:{text}"
        if image_id in self._images:
            return self._images[image_id]
        by_name = self._by_reference(text)
        if by_name is not None:
            return by_name
        short = text.removeprefix("sha256:")
        if _HEX.fullmatch(short):
            matching = [record for key, record in self._images.items() if key.startswith(f"sha256:{short}")]
            if len(matching) == 1:
                return matching[0]
        return None

    def _by_reference(self, text: str) -> ImageRecord | None:
        try:
            reference = parse(text)
        except InvalidArgument:
            if _HEX.fullmatch(text.removeprefix("sha256:")):
                return None
            raise
        return self._images.get(self._by_name.get(str(reference), ""))

    async def add(self, record: ImageRecord, reference: Reference, digests: list[str]) -> ImageRecord:
        """Record a pulled image under the names it was pulled by; the result has all its names."""
        async with self._changing:
            return await self._add(record, reference, digests)

    async def _add(self, record: ImageRecord, reference: Reference, digests: list[str]) -> ImageRecord:
        tag = [] if reference.digest else [str(reference)]
        known = self._images.get(record.id)
        merged = msgspec.structs.replace(
            record,
            repo_tags=_union(known.repo_tags if known else [], tag),
            repo_digests=_union(known.repo_digests if known else [], digests),
            pulled_at=known.pulled_at if known else time.time_ns(),
        )
        losers = [
            msgspec.structs.replace(other, repo_tags=[name for name in other.repo_tags if name not in tag])
            for other in self._images.values()
            if other.id != record.id and set(other.repo_tags) & set(tag)
        ]
        await self._store.save_images([merged, *losers], [])
        for changed in (*losers, merged):
            self._remember(changed)
        return merged

    async def remove(self, text: str) -> None:
        """Remove the image with all its names; one that is not here is fine.

        The CRI removes the image, not the tag it was named by; one in use is refused.
        """
        async with self._changing:
            await self._remove(text)
        await self.collect()

    async def _remove(self, text: str) -> None:
        record = self.find(text)
        if record is None:
            return
        user = self.users(record.id)
        if user:
            raise FailedPrecondition(f"image {text} is in use by container {user}")
        self._forget(record)  # first, so that no container is made from it meanwhile
        try:
            await self._store.save_images([], [record.id])
        except BaseException:
            self._remember(record)
            raise

    async def collect(self) -> None:
        """Drop the layers that no image needs."""
        needed = {chain_id for record in self._images.values() for chain_id in record.layers}
        await self._layers.collect(needed)

    def _remember(self, record: ImageRecord) -> None:
        known = self._images.get(record.id)
        for name in (*known.repo_tags, *known.repo_digests) if known else ():
            if self._by_name.get(name) == record.id:
                del self._by_name[name]
        self._images[record.id] = record
        for name in (*record.repo_tags, *record.repo_digests):
            self._by_name[name] = record.id

    def _forget(self, record: ImageRecord) -> None:
        self._images.pop(record.id, None)
        for name in (*record.repo_tags, *record.repo_digests):
            if self._by_name.get(name) == record.id:
                del self._by_name[name]


def _union(known: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys([*known, *more]))
