"""Builds layer archives out of declared members, wrong ones as well as right ones, without any tar library."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field

BLOCK = 512
END = bytes(2 * BLOCK)

FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "uid": (108, 116),
    "gid": (116, 124),
    "size": (124, 136),
    "mtime": (136, 148),
    "checksum": (148, 156),
    "kind": (156, 157),
    "link": (157, 257),
    "magic": (257, 265),
    "major": (329, 337),
    "minor": (337, 345),
    "prefix": (345, 500),
}
"""Where the fields of a header are: from, to."""

USTAR = b"ustar\x0000"
GNU = b"ustar  \0"
V7 = bytes(8)


@dataclass(frozen=True)
class Member:
    """One member. ``raw`` overrides header fields byte by byte, the checksum included."""

    name: bytes | str
    kind: bytes = b"0"
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    link: bytes | str = b""
    device: tuple[int, int] = (0, 0)
    pax: Mapping[str, bytes | str] = field(default_factory=dict)
    raw: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Header, with extended ones before it where the fields do not fit, and content."""
        name, link = to_bytes(self.name), to_bytes(self.link)
        pax = dict(self.pax)
        if len(name) > 100:
            pax.setdefault("path", name)
        if len(link) > 100:
            pax.setdefault("linkpath", link)
        before = pax_header(pax) if pax else b""
        fields = {
            "name": name[:100],
            "mode": number(self.mode, 8),
            "uid": number(self.uid, 8),
            "gid": number(self.gid, 8),
            "size": number(len(self.content), 12),
            "mtime": number(self.mtime, 12),
            "kind": self.kind,
            "link": link[:100],
            "magic": USTAR,
            "major": number(self.device[0], 8),
            "minor": number(self.device[1], 8),
            **self.raw,
        }
        return before + header(fields) + padded(self.content)


def header(fields: Mapping[str, bytes]) -> bytes:
    """One header block with the right checksum, unless ``fields`` has another."""
    block = bytearray(BLOCK)
    for name, value in {"checksum": b" " * 8, **fields}.items():
        start, end = FIELDS[name]
        assert len(value) <= end - start, (name, value)
        block[start : start + len(value)] = value
    if "checksum" not in fields:
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int, width: int) -> bytes:
    """Octal if it fits, base-256 otherwise."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return base256(value, width)


def base256(value: int, width: int) -> bytes:
    """GNU's binary numbers."""
    return bytes([0x80 if value >= 0 else 0xFF]) + value.to_bytes(width - 1, "big", signed=value < 0)


def padded(content: bytes) -> bytes:
    """Content up to the next block."""
    return content + bytes(-len(content) % BLOCK)


def to_bytes(text: bytes | str) -> bytes:
    """Text as it is in an archive."""
    return text.encode() if isinstance(text, str) else text


def pax_record(key: str, value: bytes | str) -> bytes:
    """``LENGTH KEY=VALUE\\n``, where the length counts itself."""
    rest = b" " + key.encode() + b"=" + to_bytes(value) + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def meta(kind: bytes, data: bytes, *, size: int | None = None) -> bytes:
    """An extended header with ``data``."""
    length = number(len(data) if size is None else size, 12)
    return header({"name": b"././@meta", "size": length, "kind": kind, "magic": USTAR}) + padded(data)


def pax_header(records: Mapping[str, bytes | str], *, kind: bytes = b"x") -> bytes:
    """A PAX extended header; of kind ``g`` a global one."""
    return meta(kind, b"".join(pax_record(key, value) for key, value in records.items()))


def gnu_long(member: Member) -> bytes:
    """The member with GNU's long name and long link in front of it."""
    name, link = to_bytes(member.name), to_bytes(member.link)
    before = meta(b"L", name + b"\0") + (meta(b"K", link + b"\0") if link else b"")
    short = Member(**{**vars(member), "name": name[:100], "link": link[:100]})
    return before + short.encode()


def archive(*parts: Member | bytes, end: bytes = END) -> bytes:
    """An archive of members and of bytes already encoded."""
    return b"".join(part if isinstance(part, bytes) else part.encode() for part in parts) + end


def gzipped(data: bytes, *, member_size: int = 0) -> bytes:
    """Compressed, in members of ``member_size`` bytes if it is given."""
    step = member_size or max(1, len(data))
    return b"".join(gzip.compress(data[i : i + step], 6, mtime=0) for i in range(0, max(1, len(data)), step))


def file(name: bytes | str, content: bytes = b"", mode: int = 0o644, **more: object) -> Member:
    """A regular file."""
    return _member(name, b"0", content=content, mode=mode, **more)


def folder(name: bytes | str, mode: int = 0o755, **more: object) -> Member:
    """A directory."""
    return _member(name, b"5", mode=mode, **more)


def symlink(name: bytes | str, target: bytes | str, **more: object) -> Member:
    """A symbolic link."""
    return _member(name, b"2", link=target, mode=0o777, **more)


def hard_link(name: bytes | str, target: bytes | str, **more: object) -> Member:
    """Another name of a member before it."""
    return _member(name, b"1", link=target, **more)


def char(name: bytes | str, major: int, minor: int, **more: object) -> Member:
    """A character device node."""
    return _member(name, b"3", device=(major, minor), **more)


def block(name: bytes | str, major: int, minor: int, **more: object) -> Member:
    """A block device node."""
    return _member(name, b"4", device=(major, minor), **more)


def fifo(name: bytes | str, **more: object) -> Member:
    """A named pipe."""
    return _member(name, b"6", **more)


def whiteout(name: str) -> Member:
    """What hides ``name`` of lower layers."""
    parent, slash, base = name.rpartition("/")
    return file(f"{parent}{slash}.wh.{base}")


def opaque(name: str) -> Member:
    """What hides everything that lower layers have in ``name``."""
    return file(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def _member(name: bytes | str, kind: bytes, **more: object) -> Member:
    return Member(name, kind, **more)  # type: ignore[arg-type]
