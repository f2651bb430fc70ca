"""Pulls an image: finds its manifest, unpacks the layers it lacks in parallel, records it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crishim.config.settings import ImageSettings
from crishim.errors import CrishimError, NotFound, PermissionDenied, RegistryUnavailable
from crishim.host.threads import in_thread
from crishim.images import auth, manifest
from crishim.images.auth import ANONYMOUS, AuthConfig, Credentials
from crishim.images.manifest import ConfigFile, Descriptor, Manifest
from crishim.images.policy import Policy
from crishim.images.reference import DEFAULT_DOMAIN, Reference, is_short
from crishim.images.registries import Endpoint, Registries
from crishim.images.registry import Repository
from crishim.images.store import ImageStore
from crishim.layers.store import LayerStore, chain_ids
from crishim.model.records import ImageConfig, ImageRecord
from crishim.observe.timeline import step
from crishim.state.operations import Operations

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """An image as a registry has it, verified down to its config."""

    reference: Reference
    repository: Repository
    digests: list[str]
    manifest: Manifest
    config: ConfigFile
    budget: asyncio.Semaphore
    """Layers of this image that are brought at the same time: a slow registry holds up its own images only."""

    def layer_key(self, chain: list[str]) -> tuple[str, str, str, str]:
        """The operation that brings layer ``chain[-1]``, shared with pulls of the same blob from the same host.

        Another registry may name the same layer and never deliver it: that must not hold up this pull.
        """
        blob = self.manifest.layers[len(chain) - 1].digest
        return ("layer", chain[-1], self.repository.endpoint.host, blob)


class Puller:
    """Pulls images; concurrent pulls of the same image or layer share the work."""

    def __init__(self, settings: ImageSettings, images: ImageStore, layers: LayerStore, operations: Operations) -> None:
        self._settings = settings
        self._images = images
        self._layers = layers
        self._operations = operations
        self._registries = Registries(Path(settings.registries_conf))
        self._policy = Policy(settings)

    async def pull(self, text: str, given: AuthConfig) -> ImageRecord:
        """Pull ``text``; the result is the image's record."""
        candidates = self._registries.candidates(text)
        failure: CrishimError | None = None
        for reference in candidates:
            self._policy.check(reference)
            key = ("pull", str(reference), given)
            try:
                return await self._operations.join(key, partial(self._pull, text, reference, given), patient=True)
            except (NotFound, RegistryUnavailable, PermissionDenied) as err:
                failure = failure or err
        assert failure is not None
        raise failure

    async def _pull(self, text: str, reference: Reference, given: AuthConfig) -> ImageRecord:
        with step(f"resolve {reference}"):
            found = await self._resolve(reference, self._meant_for(text, reference, given))
        try:
            diff_ids = found.config.rootfs.diff_ids
            chain = chain_ids(diff_ids)
            with self._layers.pinned(chain):
                try:
                    await self._fetch_layers(found, chain)
                    return await self._record(found, chain)
                finally:
                    found.repository.close()
        finally:
            await self._images.collect()

    async def _record(self, found: Resolved, chain: list[str]) -> ImageRecord:
        layers = [self._layers.get(chain_id) for chain_id in chain]
        record = ImageRecord(
            id=found.manifest.config.digest,
            chain_id=chain[-1] if chain else "",
            layers=chain,
            size=sum(layer.size for layer in layers if layer),
            config=found.config.config or ImageConfig(),
        )
        _log.info("pulled %s as %s", found.reference, record.id)
        return await self._images.add(record, found.reference, found.digests)

    async def _resolve(self, reference: Reference, given: AuthConfig) -> Resolved:
        """Try the endpoints in order; the last one's error counts, since it is the registry itself."""
        failure: CrishimError | None = None
        for endpoint in self._registries.endpoints(reference):
            repository = Repository(
                endpoint,
                self._credentials(reference, endpoint, given),
                Path(self._settings.certs_dir),
                self._settings.stall_seconds,
            )
            try:
                budget = asyncio.Semaphore(self._settings.parallel_layers)
                return await in_thread(partial(_resolve, repository, reference, budget))
            except CrishimError as err:
                _log.info("%s at %s: %s", reference, endpoint.host, err)
                repository.close()
                failure = err
        assert failure is not None
        raise failure

    def _meant_for(self, text: str, reference: Reference, given: AuthConfig) -> AuthConfig:
        """Credentials of a short name are Docker's, unless they say whose they are: not any search registry's."""
        if is_short(text) and not given.server_address and reference.domain != DEFAULT_DOMAIN:
            return AuthConfig()
        return given

    def _credentials(self, reference: Reference, endpoint: Endpoint, given: AuthConfig) -> Credentials:
        """What the caller gives is for the registry itself; a mirror only gets what the file has for it."""
        found = None if endpoint.mirror else given.credentials(reference)
        if found is None and self._settings.auth_file:
            name = f"{endpoint.host}/{endpoint.repository}" if endpoint.mirror else reference.name
            found = auth.from_file(Path(self._settings.auth_file), name)
        return found or ANONYMOUS

    async def _fetch_layers(self, found: Resolved, chain: list[str]) -> None:
        """Bring every missing layer; the first failure stops the others."""
        try:
            async with asyncio.TaskGroup() as group:
                for position, layer in enumerate(found.manifest.layers):
                    if self._layers.get(chain[position]) is None:
                        group.create_task(self._layer(found, chain[: position + 1], layer))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    async def _layer(self, found: Resolved, chain: list[str], descriptor: Descriptor) -> None:
        key = found.layer_key(chain)
        await self._operations.join(key, lambda: self._fetch_layer(found, chain, descriptor), abandon=True)

    async def _fetch_layer(self, found: Resolved, chain: list[str], descriptor: Descriptor) -> None:
        diff_id = found.config.rootfs.diff_ids[len(chain) - 1]
        with self._layers.pinned(chain):
            if self._layers.get(chain[-1]) is not None:
                return
            async with found.budget:
                number, report = await self._layers.ingest(
                    chain[-1], diff_id, lambda fd: found.repository.blob(descriptor, fd)
                )
            try:
                await self._below(found, chain)
            except BaseException:
                await self._layers.discard(number)
                raise
            await self._layers.commit(chain, diff_id, number, report)

    async def _below(self, found: Resolved, chain: list[str]) -> None:
        """Wait until the layer below is committed."""
        if len(chain) > 1 and self._layers.get(chain[-2]) is None:

            async def gone() -> None:
                if self._layers.get(chain[-2]) is None:
                    raise RegistryUnavailable(f"layer {chain[-2]} below could not be pulled")

            await self._operations.join(found.layer_key(chain[:-1]), gone)


def _resolve(repository: Repository, reference: Reference, budget: asyncio.Semaphore) -> Resolved:
    """Blocking: manifest, the platform's manifest where it is an index, config."""
    top = repository.manifest(reference.target)
    digests = [reference.with_digest(top.digest)]
    document = top
    if manifest.is_index(document):
        chosen = manifest.choose(document)
        document = repository.manifest(chosen.digest)
        if manifest.is_index(document):
            raise NotFound(f"image {reference} is an index of indexes, which no platform can be chosen from")
        digests.append(reference.with_digest(document.digest))
    parsed = manifest.read_manifest(document)
    config = manifest.read_config(repository.document(parsed.config, "config"), parsed)
    return Resolved(reference, repository, digests, parsed, config, budget)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure that is not just another's consequence."""
    flat = [err for err in group.exceptions if not isinstance(err, BaseExceptionGroup)]
    nested = [_first(err) for err in group.exceptions if isinstance(err, BaseExceptionGroup)]
    return [*flat, *nested][0]
