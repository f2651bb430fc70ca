"""Header blocks: name and value pairs, compressed by one zlib stream for each direction (2.6.10)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

MAX_BLOCK = 64 << 10
"""Most bytes that the headers of one frame may inflate to."""

_NAMES = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status|200 OK|version|HTTP/1.1|url public set-cookie "
    "keep-alive origin"
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
_WORD = struct.Struct("!I")


def _dictionary() -> bytes:
    """What both compressors have seen beforehand: frequent names with their lengths, then frequent text."""
    words: list[str] = []
    for part in _NAMES.split("|"):
        words += [part] if part in ("200 OK", "HTTP/1.1") else part.split()
    return b"".join(_WORD.pack(len(word)) + word.encode() for word in words) + _TAIL.encode()


DICTIONARY = _dictionary()

_WINDOW_BITS, _MEMORY_LEVEL = 11, 4
"""A small compressor, 24 KiB instead of 256: what we send are empty replies."""


class HeaderError(Exception):
    """A header block is broken; the compression state is lost with it, so the session must end."""


class HeaderEncoder:
    """Compresses what we send."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(
            zlib.Z_BEST_SPEED, zlib.DEFLATED, _WINDOW_BITS, _MEMORY_LEVEL, zlib.Z_DEFAULT_STRATEGY, DICTIONARY
        )

    def encode(self, headers: Mapping[str, str]) -> bytes:
        """The block of ``headers``; names are made lower case."""
        plain = [_WORD.pack(len(headers))]
        for name, value in headers.items():
            for part in (name.lower().encode(), value.encode()):
                plain += (_WORD.pack(len(part)), part)
        return self._zlib.compress(b"".join(plain)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecoder:
    """Inflates what we receive."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def decode(self, block: bytes) -> dict[str, str]:
        """The headers by lower-case name; several values of one name are joined by NUL, as they came."""
        try:
            plain = self._zlib.decompress(block, MAX_BLOCK)
        except zlib.error as err:
            raise HeaderError(f"headers do not inflate: {err}") from err
        if self._zlib.unconsumed_tail:
            raise HeaderError(f"headers inflate to more than {MAX_BLOCK} bytes")
        try:
            return _parse(plain)
        except (struct.error, UnicodeDecodeError) as err:
            raise HeaderError("headers are cut short or not UTF-8") from err


def _parse(plain: bytes) -> dict[str, str]:
    count, at = _WORD.unpack_from(plain)[0], _WORD.size
    headers: dict[str, str] = {}
    for _ in range(count):
        name, at = _string(plain, at)
        value, at = _string(plain, at)
        if not name or name.lower() in headers:
            raise HeaderError(f"header {name!r} is empty or there twice")
        headers[name.lower()] = value
    if at != len(plain):
        raise HeaderError(f"{len(plain) - at} bytes follow the headers")
    return headers


def _string(plain: bytes, at: int) -> tuple[str, int]:
    size = _WORD.unpack_from(plain, at)[0]
    begin = at + _WORD.size
    if begin + size > len(plain):
        raise struct.error
    return plain[begin : begin + size].decode(), begin + size
