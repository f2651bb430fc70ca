"""The one thing we ask of an ELF program: which dynamic loader it names (elf(5))."""

from __future__ import annotations

import struct
from pathlib import Path

from crishim.errors import HostFailure

_PT_INTERP = 3
_HEADER = 1 << 16  # the program headers follow the ELF header, and the loader's name follows them

_LAYOUT = {
    1: ("I", 0x1C, 0x2A, 4, 0x10),
    2: ("Q", 0x20, 0x36, 8, 0x20),
}
"""By class (32 or 64 bits): a word, where ``e_phoff`` and ``e_phentsize`` are, and ``p_offset`` and ``p_filesz``."""


def interpreter(program: Path) -> str:
    """The loader's path, empty for a static program; :class:`HostFailure` if ``program`` is no ELF file."""
    try:
        with program.open("rb") as file:
            head = file.read(_HEADER)
    except OSError as err:
        raise HostFailure(f"cannot read {program}: {(err.strerror or str(err)).lower()}") from err
    try:
        return _interpreter(head)
    except (struct.error, KeyError, IndexError) as err:
        raise HostFailure(f"{program} is not an ELF program") from err


def _interpreter(head: bytes) -> str:
    if head[:4] != b"\x7fELF":
        raise KeyError
    order = "<" if head[5] == 1 else ">"
    word, table_at, size_at, offset_at, length_at = _LAYOUT[head[4]]
    (table,) = struct.unpack_from(order + word, head, table_at)
    size, count = struct.unpack_from(order + "HH", head, size_at)
    for position in range(table, table + size * count, size):
        if struct.unpack_from(order + "I", head, position)[0] == _PT_INTERP:
            (offset,) = struct.unpack_from(order + word, head, position + offset_at)
            (length,) = struct.unpack_from(order + word, head, position + length_at)
            return head[offset : offset + length].rstrip(b"\0").decode()
    return ""
