"""Records as messages of the CRI."""

from __future__ import annotations

from pathlib import Path

from crishim.containers.table import shown_state
from crishim.cri.api import api_pb2 as pb
from crishim.cri.translate import to_proto
from crishim.model import signals
from crishim.model.records import ContainerRecord, ContainerState, ImageRecord, SandboxRecord, SandboxState

CONTAINER_STATES = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
}


def _image(record: ContainerRecord) -> pb.ImageSpec:
    assert record.config.image is not None
    return to_proto(record.config.image, pb.ImageSpec)


def container_item(record: ContainerRecord) -> pb.Container:
    """A container in a list."""
    assert record.config.metadata is not None
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=to_proto(record.config.metadata, pb.ContainerMetadata),
        image=_image(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=CONTAINER_STATES[shown_state(record)],
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
    )


def container_status(record: ContainerRecord, log: Path | None) -> pb.ContainerStatus:
    """The status message of a container that logs to ``log``."""
    assert record.config.metadata is not None
    linux = record.config.linux
    status = pb.ContainerStatus(
        id=record.id,
        metadata=to_proto(record.config.metadata, pb.ContainerMetadata),
        state=CONTAINER_STATES[shown_state(record)],
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=_image(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=record.reason,
        message=record.message,
        labels=record.config.labels,
        annotations=record.config.annotations,
        mounts=[to_proto(mount, pb.Mount) for mount in record.mounts],
        log_path=str(log or ""),
        user=pb.ContainerUser(linux=to_proto(record.user, pb.LinuxContainerUser)),
        stop_signal=signals.to_cri(record.stop_signal),  # type: ignore[arg-type]
    )
    if linux is not None and linux.resources is not None:
        status.resources.linux.CopyFrom(to_proto(linux.resources, pb.LinuxContainerResources))
    return status


def _state(record: SandboxRecord) -> pb.PodSandboxState.ValueType:
    return pb.SANDBOX_READY if record.state is SandboxState.READY else pb.SANDBOX_NOTREADY


def sandbox_item(record: SandboxRecord) -> pb.PodSandbox:
    """A sandbox in a list."""
    return pb.PodSandbox(
        id=record.id,
        metadata=to_proto(record.metadata, pb.PodSandboxMetadata),
        state=_state(record),
        created_at=record.created_at,
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.handler,
    )


def sandbox_status(record: SandboxRecord) -> pb.PodSandboxStatus:
    """The status message of a sandbox."""
    ips = record.network.ips if record.network else []
    return pb.PodSandboxStatus(
        id=record.id,
        metadata=to_proto(record.metadata, pb.PodSandboxMetadata),
        state=_state(record),
        created_at=record.created_at,
        network=pb.PodSandboxNetworkStatus(
            ip=ips[0] if ips else "", additional_ips=[pb.PodIP(ip=address) for address in ips[1:]]
        ),
        linux=pb.LinuxPodSandboxStatus(
            namespaces=pb.Namespace(options=to_proto(record.namespaces, pb.NamespaceOption))
        ),
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.handler,
    )


def image_of(record: ImageRecord) -> pb.Image:
    """The message for an image."""
    user = record.config.user.partition(":")[0]
    image = pb.Image(
        id=record.id,
        repo_tags=record.repo_tags,
        repo_digests=record.repo_digests,
        size=record.size,
        spec=pb.ImageSpec(image=record.id),
    )
    if user.isascii() and user.isdecimal() and int(user[:11]) < 2**32 - 1 and len(user) <= 10:
        image.uid.value = int(user)
    elif user:
        image.username = user
    return image
