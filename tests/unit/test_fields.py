"""``docs/fields.md`` must name every field that the kubelet can set on a pod or a container."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor

from crishim.cri.api import api_pb2 as pb

_TABLE = Path(__file__).parents[2] / "docs" / "fields.md"
_ROW = re.compile(r"^\| `(\w+\.\w+)` \| (.+) \|$", re.MULTILINE)
_LEFT_OUT = ("Windows", "Int64Value")


def _fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    if message.name in seen or message.name.startswith(_LEFT_OUT) or message.GetOptions().map_entry:
        return
    seen.add(message.name)
    for field in message.fields:
        yield f"{message.name}.{field.name}"
        if field.message_type is not None:
            yield from _fields(field.message_type, seen)


def _expected() -> set[str]:
    seen = set[str]()
    return {*_fields(pb.PodSandboxConfig.DESCRIPTOR, seen), *_fields(pb.ContainerConfig.DESCRIPTOR, seen)}


def test_every_field_has_a_row() -> None:
    """A field that the CRI gains must be decided about."""
    rows = dict(_ROW.findall(_TABLE.read_text()))
    assert set(rows) == _expected()
    assert all(text.strip() for text in rows.values())
