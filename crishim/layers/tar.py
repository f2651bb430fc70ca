"""Reads a tar stream: headers, PAX records and GNU long names, for the unpack worker.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU (tar(5) of libarchive; the OCI image-spec, layer.md,
allows all three). The standard library's ``tarfile`` costs several times as much for each entry, and the
layer formats need less than it does. Where readers disagree, this one does what Go's ``archive/tar`` does:
other runtimes unpack with it, and an archive must not look different here.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BLOCK = 512
_MAX_META = 1 << 20  # bytes of a PAX header or long name: real ones are a few hundred
_MAX_SECONDS = 1 << 62  # what a file system cannot store it clamps, but the system call takes 64 bits
_SHOWN = 200

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_WITHOUT_CONTENT = frozenset((HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO))
_SPARSE = b"S"
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_XATTR = b"SCHILY.xattr."


class TarError(Exception):
    """The stream is not a well-formed tar archive."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One archive member; the file content follows in the stream."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class Stream:
    """Bytes in order, from chunks of any size, without joining them."""

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        """``next_chunk`` returns the next bytes, empty at the end."""
        self._next = next_chunk
        self._chunk = memoryview(b"")

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes; fewer only at the end of the stream."""
        chunk = self._chunk
        if len(chunk) >= count:
            self._chunk = chunk[count:]
            return bytes(chunk[:count])
        parts = deque[memoryview]()
        while count:
            part = self._up_to(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes as they come; :class:`TarError` if the stream ends before."""
        while count:
            part = self._up_to(count)
            if not part:
                raise TarError("the archive ends in the middle of a file")
            count -= len(part)
            yield part

    def drain(self) -> None:
        """Read to the end: what follows the archive counts for the digest."""
        while self._up_to(1 << 30):
            pass

    def _up_to(self, count: int) -> memoryview:
        if not self._chunk:
            self._chunk = memoryview(self._next())
        part, self._chunk = self._chunk[:count], self._chunk[count:]
        return part


def entries(stream: Stream) -> Iterator[Entry]:
    """The members in order. The caller reads ``size`` bytes and the padding before it asks for the next."""
    pax: dict[bytes, bytes] = {}
    long_name = long_link = b""
    while True:
        block = _header(stream)
        if not block:
            if pax or long_name or long_link:
                raise TarError("the archive ends after an extended header, without its file")
            return
        kind = block[156:157]
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            data = _meta(stream, block)
            if kind == _PAX:
                pax = parse_pax(data)
            elif kind == _LONG_NAME:
                long_name = _text(data)
            elif kind == _LONG_LINK:
                long_link = _text(data)
            continue
        name = long_name or pax.get(b"path") or _name(block)
        link = long_link or pax.get(b"linkpath") or _text(block[157:257])
        try:
            entry = _entry(block, name, link, pax)
        except ValueError as err:
            raise TarError(f"{shown(name)} has a header field that is not a number") from err
        yield entry
        pax, long_name, long_link = {}, b"", b""


def padding(size: int) -> int:
    """Bytes after a member's content up to the next block."""
    return -size % BLOCK


def is_start(block: bytes) -> bool:
    """Whether an archive may begin with ``block``: a header with the right checksum, or zeros."""
    return len(block) == BLOCK and (_is_zero(block) or _sum_is_right(block))


def shown(name: bytes) -> str:
    """A name for a message: on one line and not too long."""
    text = name[:_SHOWN].decode(errors="replace") or "/"
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return line + "..." if len(name) > _SHOWN else line


def _header(stream: Stream) -> bytes:
    """The next header; empty at the end of the archive."""
    block = stream.take(BLOCK)
    if not block:
        return b""  # archives without the two zero blocks exist and are read by everyone
    if len(block) < BLOCK:
        raise TarError("the archive ends in the middle of a header")
    if _is_zero(block):
        if not _is_zero(stream.take(BLOCK)):
            raise TarError("the archive goes on after a single block of zeros")
        return b""
    if not _sum_is_right(block):
        raise TarError("a header has a wrong checksum: not a tar archive, or a damaged one")
    return block


def _name(block: bytes) -> bytes:
    name = _text(block[0:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _entry(block: bytes, name: bytes, link: bytes, pax: dict[bytes, bytes]) -> Entry:
    """:class:`ValueError` if a field is no number."""
    kind = block[156:157]
    if kind in (b"\0", b"7"):
        kind = DIRECTORY if name.endswith(b"/") else REGULAR
    size = _number(block[124:136])
    uid, gid = _number(block[108:116]), _number(block[116:124])
    mtime_ns = _number(block[136:148]) * 1_000_000_000
    xattrs: dict[bytes, bytes] = {}
    if pax:
        size, uid, gid = (_pax_int(pax, key, now) for key, now in ((b"size", size), (b"uid", uid), (b"gid", gid)))
        mtime_ns = _pax_time(pax, mtime_ns)
        xattrs = {key[len(_XATTR) :]: value for key, value in pax.items() if key.startswith(_XATTR)}
    if kind == _SPARSE or (pax and any(key.startswith(b"GNU.sparse.") for key in pax)):
        raise TarError(f"{shown(name)} is a sparse file, which this unpacker does not know")
    if size < 0 or not (0 <= uid <= 0xFFFFFFFE and 0 <= gid <= 0xFFFFFFFE):
        raise TarError(f"{shown(name)} has a size, owner or group out of range")
    if not -_MAX_SECONDS < mtime_ns // 1_000_000_000 < _MAX_SECONDS:
        raise TarError(f"{shown(name)} has a time out of range")
    if b"\0" in name or b"\0" in link:
        raise TarError(f"{shown(name)} or what it links to has a NUL in its name")
    if kind in _WITHOUT_CONTENT:
        size = 0
    major, minor = _device(block, name) if kind in (CHAR, BLOCK_DEVICE) else (0, 0)
    mode = _number(block[100:108]) & 0o7777
    return Entry(name, kind, mode, uid, gid, size, mtime_ns, link, major, minor, xattrs)


def _device(block: bytes, name: bytes) -> tuple[int, int]:
    major, minor = _number(block[329:337]), _number(block[337:345])
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise TarError(f"{shown(name)} has a device number out of range")
    return major, minor


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """``LENGTH KEY=VALUE\\n`` records (POSIX pax, extended header)."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        digits = data[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise TarError("a PAX record has no length")
        end = position + int(digits)
        record = data[space + 1 : end]
        key, found, value = record[:-1].partition(b"=")
        if end > len(data) or end <= space + 1 or record[-1:] != b"\n" or not found or not key or b"\0" in key:
            raise TarError("a PAX record is broken")
        records[key] = value
        position = end
    return records


def _meta(stream: Stream, block: bytes) -> bytes:
    try:
        size = _number(block[124:136])
    except ValueError as err:
        raise TarError("an extended header has a size that is not a number") from err
    if not 0 <= size <= _MAX_META:
        raise TarError(f"an extended header of {size} bytes is too large")
    data = stream.take(size)
    if len(data) < size or len(stream.take(padding(size))) < padding(size):
        raise TarError("the archive ends in an extended header")
    return data


def _is_zero(block: bytes) -> bool:
    return block.count(0) == len(block)


def _sum_is_right(block: bytes) -> bool:
    """The bytes' sum, the checksum's own taken as spaces; some old writers took the bytes as signed."""
    field = block[148:156]
    try:
        given = _number(field)
    except ValueError:
        return False
    unsigned = _sum(block[:256]) + _sum(block[256:]) - _sum(field) + 8 * 32
    if given == unsigned:
        return True
    return given == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _sum(data: bytes) -> int:
    """Of at most 256 bytes: Adler-32's low half is their sum modulo 65521, and much faster than :func:`sum`."""
    return zlib.adler32(data, 0) & 0xFFFF


def _text(raw: bytes) -> bytes:
    end = raw.find(0)
    return raw if end < 0 else raw[:end]


def _number(raw: bytes) -> int:
    """Octal text up to a NUL, or GNU's base-256 where the first bit is set; else :class:`ValueError`."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big", signed=False)
        if raw[0] & 0x40:
            return value - (1 << (8 * len(raw)))
        return value & ((1 << (8 * len(raw) - 1)) - 1)
    text = raw.strip(b" \0")
    if not text.isdigit():
        text = _text(text).rstrip(b" ")
        if not text:
            return 0
        if not text.isdigit():
            raise ValueError(raw)
    return int(text, 8)


def _pax_int(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    value = pax.get(key)
    if not value:
        return default  # an empty value takes the record back
    if not value.isdigit() or len(value) > 19:
        raise TarError(f"PAX {key.decode()} is not a number")
    return int(value)


def _pax_time(pax: dict[bytes, bytes], default: int) -> int:
    value = pax.get(b"mtime")
    if not value:
        return default
    whole, _, fraction = value.partition(b".")
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 18 or (fraction and not fraction.isdigit()):
        raise TarError("PAX mtime is not a time")
    nanoseconds = int(digits) * 1_000_000_000 + int((fraction[:9] or b"0").ljust(9, b"0"))
    return -nanoseconds if whole.startswith(b"-") else nanoseconds
