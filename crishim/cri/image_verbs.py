"""Calls about images."""

from __future__ import annotations

import time

import msgspec

from crishim.cri import messages
from crishim.cri.api import api_pb2 as pb
from crishim.cri.node import Node, Verb
from crishim.errors import InvalidArgument
from crishim.images.auth import AuthConfig
from crishim.model.records import ImageRecord


async def pull_image(node: Node, request: pb.PullImageRequest) -> pb.PullImageResponse:
    """Pull; the result is the image's ID."""
    given = request.auth
    auth = AuthConfig(
        username=given.username,
        password=given.password,
        auth=given.auth,
        server_address=given.server_address,
        identity_token=given.identity_token,
        registry_token=given.registry_token,
    )
    record = await node.puller.pull(_name(request.image), auth)
    return pb.PullImageResponse(image_ref=record.id)


async def list_images(node: Node, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
    """All images, or the one that the filter names."""
    wanted = request.filter.image.image
    if not wanted:
        return pb.ListImagesResponse(images=[messages.image_of(record) for record in node.containers.images.all()])
    found = node.containers.images.find(wanted)
    return pb.ListImagesResponse(images=[messages.image_of(found)] if found else [])


async def image_status(node: Node, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
    """One image; none if it is not here, which is no error."""
    record = node.containers.images.find(_name(request.image))
    if record is None:
        return pb.ImageStatusResponse()
    return pb.ImageStatusResponse(image=messages.image_of(record), info=_info(record) if request.verbose else {})


async def remove_image(node: Node, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
    """Remove the image with all its names; one that is not here is fine."""
    await node.containers.images.remove(_name(request.image))
    return pb.RemoveImageResponse()


async def image_fs_info(node: Node, _request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
    """What images use, from their records: nothing is walked."""
    size, entries = node.containers.layers.usage()
    usage = pb.FilesystemUsage(
        timestamp=time.time_ns(),
        fs_id=pb.FilesystemIdentifier(mountpoint=node.config.root),
        used_bytes=pb.UInt64Value(value=size),
        inodes_used=pb.UInt64Value(value=entries),
    )
    return pb.ImageFsInfoResponse(image_filesystems=[usage], container_filesystems=[usage])


def _name(spec: pb.ImageSpec) -> str:
    if not spec.image:
        raise InvalidArgument("image.image is empty")
    return spec.image


def _info(record: ImageRecord) -> dict[str, str]:
    """What ``crictl inspecti`` shows."""
    info = {
        "chainID": record.chain_id,
        "layers": record.layers,
        "imageSpec": {"config": msgspec.to_builtins(record.config)},
        "pulledAt": record.pulled_at,
    }
    return {"info": msgspec.json.encode(info).decode()}


VERBS: dict[str, Verb] = {
    "PullImage": pull_image,
    "ListImages": list_images,
    "ImageStatus": image_status,
    "RemoveImage": remove_image,
    "ImageFsInfo": image_fs_info,
}
