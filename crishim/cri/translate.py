"""Between protobuf messages and the frozen values of ``crishim.model.cri``, by field name.

The values have the messages' names and fields; a test compares them. So translation needs no code per
message, and nothing can be forgotten on the way.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from crishim.cri.api import api_pb2
from crishim.errors import InvalidArgument
from crishim.model.cri import Value

V = TypeVar("V", bound=Value)
M = TypeVar("M", bound=Message)
Read = Callable[[Any], Any]


def from_proto(message: Message, kind: type[V]) -> V:
    """``message`` as a value; :class:`InvalidArgument` for what no Linux node can have."""
    return _reader(kind)(message)  # type: ignore[no-any-return]


@functools.cache
def _reader(kind: type[Value]) -> Read:
    descriptor = getattr(api_pb2, kind.__name__).DESCRIPTOR
    hints = get_type_hints(kind)
    fields = [(name, _field_reader(descriptor.fields_by_name[name], hints[name])) for name in hints]
    refuses_windows = "windows" in descriptor.fields_by_name and "windows" not in hints

    def read(message: Any) -> Value:
        if refuses_windows and message.HasField("windows"):
            raise InvalidArgument("config.windows is given, but this node runs Linux")
        return kind(**{name: get(message) for name, get in fields})

    return read


def _field_reader(field: FieldDescriptor, hint: Any) -> Read:
    name = field.name
    if get_origin(hint) is dict:
        return lambda message: {_text(name, key): _text(name, value) for key, value in getattr(message, name).items()}
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        if _is_value(inner):
            read = _reader(inner)
            return lambda message: [read(item) for item in getattr(message, name)]
        return lambda message: [_text(name, item) for item in getattr(message, name)]
    if type(None) in get_args(hint):
        return _optional_reader(name, get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return lambda message: _enum(hint, name, getattr(message, name))
    return lambda message: _text(name, getattr(message, name))


def _text(name: str, value: Any) -> Any:
    """``value``; a string that no system call could take is refused here, once for all."""
    if isinstance(value, str) and "\0" in value:
        raise InvalidArgument(f"{name} has a NUL in it")
    return value


def _optional_reader(name: str, inner: Any) -> Read:
    if _is_value(inner):
        read = _reader(inner)
        return lambda message: read(getattr(message, name)) if message.HasField(name) else None
    return lambda message: getattr(message, name).value if message.HasField(name) else None


def _enum(kind: type[enum.IntEnum], name: str, number: int) -> enum.IntEnum:
    try:
        return kind(number)
    except ValueError as err:
        raise InvalidArgument(f"{name} {number} is not a known {kind.__name__}") from err


def _is_value(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Value)


def to_proto(value: Value, kind: type[M]) -> M:
    """``value`` as a message of ``kind``."""
    message = kind()
    _fill(message, value)
    return message


def _fill(message: Any, value: Value) -> None:
    for field in msgspec.structs.fields(type(value)):
        content = getattr(value, field.name)
        if content is None or content in ("", 0, [], {}):
            if isinstance(content, int) and message.DESCRIPTOR.fields_by_name[field.name].message_type is not None:
                getattr(message, field.name).value = content
            continue
        _set(message, field.name, content)


def _set(message: Any, name: str, content: Any) -> None:
    target = getattr(message, name, None)
    if isinstance(content, Value):
        target.SetInParent()  # type: ignore[union-attr]
        _fill(target, content)
    elif isinstance(content, list) and isinstance(content[0], Value):
        for item in content:
            _fill(target.add(), item)  # type: ignore[union-attr]
    elif isinstance(content, list):
        target.extend(content)  # type: ignore[union-attr]
    elif isinstance(content, dict):
        target.update(content)  # type: ignore[union-attr]
    elif message.DESCRIPTOR.fields_by_name[name].message_type is not None:
        target.value = content  # type: ignore[union-attr]
    else:
        setattr(message, name, content)
