"""The errors of every room, each with the gRPC status its caller relies on.

A message is one lowercase sentence without a full stop that names the thing and the cause. Only the
interceptor of the gRPC door turns these into statuses; no other module knows gRPC's codes.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Code(enum.Enum):
    """The names of the gRPC status codes this daemon answers with."""

    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"


_LONGEST = 2000
"""Characters of a message: gRPC carries it in a header, and gives up the status for one that is too long."""


class CrishimError(Exception):
    """Base of all errors that a caller is meant to see."""

    code: ClassVar[Code] = Code.UNKNOWN

    @property
    def message(self) -> str:
        """The sentence for the caller, with what failed while cleaning up after it."""
        notes = getattr(self, "__notes__", [])
        text = " ".join("; ".join([str(self), *notes]).split("\n"))
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class InvalidArgument(CrishimError):
    """The request itself is wrong, whatever the state of the node."""

    code = Code.INVALID_ARGUMENT


class NotFound(CrishimError):
    """The object that the request names does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(CrishimError):
    """A living object already has the requested name."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(CrishimError):
    """The object exists but its state does not allow the request."""

    code = Code.FAILED_PRECONDITION


class Unimplemented(CrishimError):
    """The CRI defines it and this version does not do it."""

    code = Code.UNIMPLEMENTED


class Unavailable(CrishimError):
    """The node cannot do it now; trying again later may help."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(CrishimError):
    """The work was given up because its time ran out."""

    code = Code.DEADLINE_EXCEEDED


class ResourceExhausted(CrishimError):
    """A configured bound was reached."""

    code = Code.RESOURCE_EXHAUSTED


class PermissionDenied(CrishimError):
    """A policy or the registry forbids it."""

    code = Code.PERMISSION_DENIED


class HostFailure(CrishimError):
    """A system call or a program of the node failed for a reason that is not the request's."""

    code = Code.INTERNAL


class RegistryUnavailable(CrishimError):
    """The registry cannot be reached; the kubelet recognises the prefix (k8s.io/cri-api errors)."""

    code = Code.UNKNOWN

    def __str__(self) -> str:
        return f"RegistryUnavailable: {super().__str__()}"


class SignatureValidationFailed(CrishimError):
    """The trust policy refuses the image; the kubelet recognises the prefix (k8s.io/cri-api errors)."""

    code = Code.UNKNOWN

    def __str__(self) -> str:
        return f"SignatureValidationFailed: {super().__str__()}"


class ConfigError(CrishimError):
    """The daemon's own configuration is wrong."""

    code = Code.INVALID_ARGUMENT


class StateError(CrishimError):
    """The database cannot be used; it is never wiped to get past this."""

    code = Code.INTERNAL


class BadImage(CrishimError):
    """What a registry delivered is not what it should be: wrong digest, broken layer, foreign format."""

    code = Code.FAILED_PRECONDITION
