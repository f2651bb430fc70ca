"""The model against the CRI: every struct has the fields of its message, every enum its values."""

from __future__ import annotations

import enum
import inspect
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from crishim.cri.api import api_pb2
from crishim.model import cri, records, signals

SCALARS = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_BYTES: bytes,
    FieldDescriptor.TYPE_INT32: int,
    FieldDescriptor.TYPE_INT64: int,
    FieldDescriptor.TYPE_STRING: str,
    FieldDescriptor.TYPE_UINT32: int,
    FieldDescriptor.TYPE_UINT64: int,
}
WRAPPED = ("Int64Value", "UInt64Value")


def own(kind: type) -> list[Any]:
    """The classes of a kind that the model defines."""
    found = [item for _, item in inspect.getmembers(cri, inspect.isclass)]
    return [item for item in found if issubclass(item, kind) and item.__module__ == cri.__name__]


STRUCTS: list[type[cri.Value]] = [struct for struct in own(cri.Value) if struct is not cri.Value]
ENUMS: list[type[enum.IntEnum]] = own(enum.IntEnum)


def message(name: str) -> Descriptor:
    """The message of that name."""
    return api_pb2.DESCRIPTOR.message_types_by_name[name]


def enum_descriptor(name: str) -> EnumDescriptor:
    """The enum of that name, top-level or in a message."""
    nested = [kind.enum_types_by_name for kind in api_pb2.DESCRIPTOR.message_types_by_name.values()]
    return next(kinds[name] for kinds in [api_pb2.DESCRIPTOR.enum_types_by_name, *nested] if name in kinds)


def fields(name: str) -> list[FieldDescriptor]:
    """The fields of a message; those for Windows are absent from the model on purpose."""
    return [field for field in message(name).fields if field.name != "windows"]


def expected(field: FieldDescriptor) -> str:
    """How the model must write the type of a field."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        parts = [expected(field.message_type.fields_by_name[name]) for name in ("key", "value")]
        return f"dict[{', '.join(parts)}]"
    if field.message_type is not None:
        name = "int" if field.message_type.name in WRAPPED else field.message_type.name
        return f"list[{name}]" if field.is_repeated else f"{name} | None"
    if field.enum_type is not None:
        name = "int" if field.enum_type.name == "Signal" else field.enum_type.name
    else:
        name = SCALARS[field.type].__name__
    return f"list[{name}]" if field.is_repeated else name


def written(kind: Any) -> str:
    """A type as :func:`expected` writes it."""
    if get_origin(kind) in (list, dict):
        return f"{get_origin(kind).__name__}[{', '.join(written(part) for part in get_args(kind))}]"
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(written(part) for part in get_args(kind))
    return "None" if kind is type(None) else str(kind.__name__)


def test_the_model_is_looked_at() -> None:
    """There are structs and enums to compare, among them the two that everything hangs on."""
    assert {"PodSandboxConfig", "ContainerConfig"} <= {struct.__name__ for struct in STRUCTS}
    assert len(STRUCTS) >= 24
    assert len(ENUMS) >= 5


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_structs_have_the_fields_of_their_messages(struct: type[cri.Value]) -> None:
    """No field more or less, in the CRI's spelling."""
    assert sorted(struct.__struct_fields__) == sorted(field.name for field in fields(struct.__name__))


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_fields_have_the_types_of_their_messages(struct: type[cri.Value]) -> None:
    """Scalars, enums, lists and maps as they are; messages and wrapped integers may be absent."""
    hints = get_type_hints(struct)
    assert {field.name: written(hints[field.name]) for field in fields(struct.__name__)} == {
        field.name: expected(field) for field in fields(struct.__name__)
    }


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_defaults_are_those_of_proto3(struct: type[cri.Value]) -> None:
    """A struct made of nothing equals an empty message."""
    empty = struct()
    for field in fields(struct.__name__):
        value = getattr(empty, field.name)
        if field.is_repeated:
            assert len(value) == 0
        elif field.message_type is not None:
            assert value is None
        else:
            assert value == field.default_value


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_enums_have_the_values_of_the_cri(kind: type[enum.IntEnum]) -> None:
    """The same names for the same numbers."""
    assert {item.name: int(item) for item in kind} == {
        value.name: value.number for value in enum_descriptor(kind.__name__).values
    }


def test_windows_is_all_that_is_left_out() -> None:
    """The two messages with a Windows part have it in the CRI, not here."""
    assert [s.__name__ for s in STRUCTS if "windows" in message(s.__name__).fields_by_name] == [
        "ContainerConfig",
        "PodSandboxConfig",
    ]


def test_signals_are_those_of_the_cri() -> None:
    """The names stand at the place of their number."""
    values = {value.number: value.name for value in enum_descriptor("Signal").values}
    assert dict(enumerate(signals.CRI_NAMES)) == values


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_values_do_not_change(struct: type[cri.Value]) -> None:
    """All structs are frozen, whatever they inherit from."""
    empty = struct()
    for name in struct.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(empty, name, getattr(empty, name))


def test_what_is_stored_comes_back() -> None:
    """A container record survives the database's JSON, environment bytes and enums included."""
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata("web", 2),
        image=cri.ImageSpec("sha256:1", {"a": "b"}),
        envs=[cri.KeyValue("A", b"\xff\x00")],
        mounts=[cri.Mount("/a", "/b", propagation=cri.MountPropagation.PROPAGATION_BIDIRECTIONAL)],
        linux=cri.LinuxContainerConfig(
            cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit("2MB", 2**63)], unified={"a": "b"}),
            cri.LinuxContainerSecurityContext(run_as_user=0, run_as_group=None),
        ),
    )
    record = records.ContainerRecord(
        id="1", sandbox_id="2", config=config, handler="runc", state=records.ContainerState.RUNNING, created_at=3,
        boot_id="b", image_id="i", image_ref="r", stop_signal=15, user=cri.LinuxContainerUser(1, 2, [3]),
        process=records.ProcessRecord(7, 8), exit_code=-1,
    )  # fmt: skip
    again = msgspec.json.decode(msgspec.json.encode(record), type=records.ContainerRecord)
    assert again == record
    assert again.config.linux is not None
    assert again.config.linux.security_context is not None
    assert again.config.linux.security_context.run_as_user == 0


def test_image_config_has_the_spelling_of_the_image_specification() -> None:
    """A real ``config`` object is read, with nulls and with keys that we do not know."""
    text = b"""{"User": "www", "ExposedPorts": {"80/tcp": {}}, "Env": ["A=b"], "Entrypoint": ["/e"], "Cmd": null,
        "Volumes": {"/v": {}}, "WorkingDir": "/w", "Labels": {"l": "m"}, "StopSignal": "SIGQUIT"}"""
    assert msgspec.json.decode(text, type=records.ImageConfig) == records.ImageConfig(
        user="www", env=["A=b"], entrypoint=["/e"], cmd=None, working_dir="/w", stop_signal="SIGQUIT",
        volumes={"/v": {}}, labels={"l": "m"},
    )  # fmt: skip


def test_names_tell_objects_apart() -> None:
    """One name for each sandbox of a pod and each container of a sandbox, by attempt."""
    meta = cri.PodSandboxMetadata(name="dns", uid="u-1", namespace="kube-system", attempt=1)
    pod = records.sandbox_name(cri.PodSandboxConfig(metadata=meta))
    assert pod == "dns_kube-system_u-1_1"
    container = cri.ContainerConfig(metadata=cri.ContainerMetadata("web", 3))
    assert records.container_name("s1", container) == "web_s1_3"
    assert records.container_name("s2", container) != records.container_name("s1", container)
