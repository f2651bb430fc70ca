"""Calls that answer with a stream: container events, and lists in parts that no message limit can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from crishim.cri import container_verbs, image_verbs, messages, sandbox_verbs, stats_verbs
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, StreamVerb, Verb
from crishim.errors import ResourceExhausted
from crishim.state.events import Event, EventKind

M = TypeVar("M", bound=Message)

PART_BYTES = 1 << 20
"""About how large a part of a list gets: far below every limit, large enough to be quick."""

_KINDS = {
    EventKind.CREATED: pb.CONTAINER_CREATED_EVENT,
    EventKind.STARTED: pb.CONTAINER_STARTED_EVENT,
    EventKind.STOPPED: pb.CONTAINER_STOPPED_EVENT,
    EventKind.DELETED: pb.CONTAINER_DELETED_EVENT,
}

EVENT_BACKLOG = 10_000
"""Events kept for a client that is slow to read; one that falls behind further is cut off and lists anew."""


def parts(items: list[M]) -> Iterator[list[M]]:
    """``items`` in order, in parts of about :data:`PART_BYTES`."""
    part: list[M] = []
    size = 0
    for item in items:
        part.append(item)
        size += item.ByteSize()
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


@dataclass(frozen=True)
class _Listing:
    """A unary list and the stream that says the same: their messages, and where these have their items."""

    verb: Verb
    request: type[Message]
    items: str
    part: type[Message]
    field: str

    async def stream(self, node: Node, request: Any) -> AsyncIterator[Message]:
        """The list in parts."""
        found = await self.verb(node, self.request(filter=request.filter))
        for part in parts(list(getattr(found, self.items))):
            yield self.part(**{self.field: part})


_LISTINGS = {
    "StreamPodSandboxes": _Listing(
        sandbox_verbs.list_pod_sandbox,
        pb.ListPodSandboxRequest,
        "items",
        pb.StreamPodSandboxesResponse,
        "pod_sandboxes",
    ),
    "StreamContainers": _Listing(
        container_verbs.list_containers,
        pb.ListContainersRequest,
        "containers",
        pb.StreamContainersResponse,
        "containers",
    ),
    "StreamImages": _Listing(
        image_verbs.list_images, pb.ListImagesRequest, "images", pb.StreamImagesResponse, "images"
    ),
    "StreamContainerStats": _Listing(
        stats_verbs.list_container_stats,
        pb.ListContainerStatsRequest,
        "stats",
        pb.StreamContainerStatsResponse,
        "container_stats",
    ),
    "StreamPodSandboxStats": _Listing(
        stats_verbs.list_pod_sandbox_stats,
        pb.ListPodSandboxStatsRequest,
        "stats",
        pb.StreamPodSandboxStatsResponse,
        "pod_sandbox_stats",
    ),
}


async def get_container_events(node: Node, _request: pb.GetEventsRequest) -> AsyncIterator[pb.ContainerEventResponse]:
    """Every event from now on, with the state of its pod at that moment."""
    backlog: asyncio.Queue[pb.ContainerEventResponse | None] = asyncio.Queue()

    def on_event(event: Event) -> None:
        if backlog.qsize() < EVENT_BACKLOG:
            backlog.put_nowait(_message(node, event))
        elif backlog.qsize() == EVENT_BACKLOG:
            backlog.put_nowait(None)

    end = node.containers.events.listen(on_event)
    try:
        while (message := await backlog.get()) is not None:
            yield message
        raise ResourceExhausted(f"the client is more than {EVENT_BACKLOG} events behind")
    finally:
        end()


def _message(node: Node, event: Event) -> pb.ContainerEventResponse:
    sandbox = node.pods.table.find(event.sandbox_id)
    containers = node.containers.table.of_sandbox(event.sandbox_id)
    response = pb.ContainerEventResponse(
        container_id=event.container_id,
        container_event_type=_KINDS[event.kind],
        created_at=event.at,
        containers_statuses=[container_verbs.status_of(node, item.record) for item in containers if item.shown],
    )
    if sandbox is not None:
        response.pod_sandbox_status.CopyFrom(messages.sandbox_status(sandbox.record))
    return response


STREAM_VERBS: dict[str, StreamVerb] = {
    **{name: listing.stream for name, listing in _LISTINGS.items()},
    "GetContainerEvents": get_container_events,
}
