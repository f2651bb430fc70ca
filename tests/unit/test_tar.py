"""The tar parser: every feature of the formats, whatever the chunks, and every fault with its message."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import corpus
import pytest
from corpus import (
    GNU,
    V7,
    Member,
    archive,
    base256,
    file,
    folder,
    gnu_long,
    hard_link,
    header,
    meta,
    pax_header,
    symlink,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from crishim.layers import tar

CHUNKS = (1, 511, 512, 513, 1 << 20)


def stream_of(data: bytes, chunk: int) -> tar.Stream:
    """``data`` in pieces of ``chunk`` bytes."""
    pieces = iter([data[i : i + chunk] for i in range(0, len(data), chunk)])
    return tar.Stream(lambda: next(pieces, b""))


def parse(data: bytes, chunk: int = 1 << 20) -> list[tuple[tar.Entry, bytes]]:
    """All members with their content."""
    stream = stream_of(data, chunk)
    found = []
    for entry in tar.entries(stream):
        content = b"".join(bytes(piece) for piece in stream.pieces(entry.size))
        stream.take(tar.padding(entry.size))
        found.append((entry, content))
    return found


def only(data: bytes) -> tar.Entry:
    """The single member."""
    ((entry, _),) = parse(data)
    return entry


LONG = "d/" + "n" * 250
FEATURES: dict[str, tuple[bytes, list[tuple[tar.Entry, bytes]]]] = {
    "nothing": (b"", []),
    "only the end": (corpus.END, []),
    "one zero block": (bytes(512), []),
    "one zero block and a part": (bytes(700), []),
    "file": (
        archive(file("a", b"hello", 0o4755, uid=1, gid=2, mtime=3)),
        [(tar.Entry(b"a", b"0", 0o4755, 1, 2, 5, 3_000_000_000), b"hello")],
    ),
    "no end": (archive(file("a", b"x"), end=b""), [(tar.Entry(b"a", b"0", 0o644, 0, 0, 1, 0), b"x")]),
    "no padding at the end": (
        archive(file("a", b"x"), end=b"")[:513],
        [(tar.Entry(b"a", b"0", 0o644, 0, 0, 1, 0), b"x")],
    ),
    "content of whole blocks": (
        archive(file("a", bytes(range(256)) * 4), file("b", b"y" * 513)),
        [
            (tar.Entry(b"a", b"0", 0o644, 0, 0, 1024, 0), bytes(range(256)) * 4),
            (tar.Entry(b"b", b"0", 0o644, 0, 0, 513, 0), b"y" * 513),
        ],
    ),
    "what follows the end": (
        archive(file("a")) + archive(file("b")),
        [(tar.Entry(b"a", b"0", 0o644, 0, 0, 0, 0), b"")],
    ),
    "ustar prefix": (
        archive(file("b", raw={"prefix": b"some/where"})),
        [(tar.Entry(b"some/where/b", b"0", 0o644, 0, 0, 0, 0), b"")],
    ),
    "GNU has no prefix": (
        archive(file("b", raw={"prefix": b"1234", "magic": GNU})),
        [(tar.Entry(b"b", b"0", 0o644, 0, 0, 0, 0), b"")],
    ),
    "fields without a NUL": (
        archive(file("n" * 100, raw={"size": b"000000000001", "link": b"l" * 100}), end=b"x" + corpus.END),
        [(tar.Entry(b"n" * 100, b"0", 0o644, 0, 0, 1, 0, b"l" * 100), b"x")],
    ),
    "GNU long name and link": (
        archive(gnu_long(symlink(LONG, LONG * 2, raw={"magic": GNU})), file("a")),
        [
            (tar.Entry(LONG.encode(), b"2", 0o777, 0, 0, 0, 0, LONG.encode() * 2), b""),
            (tar.Entry(b"a", b"0", 0o644, 0, 0, 0, 0), b""),
        ],
    ),
    "GNU long name goes before a PAX one": (
        archive(pax_header({"path": "pax", "linkpath": "p"}), gnu_long(symlink("gnu", "g"))),
        [(tar.Entry(b"gnu", b"2", 0o777, 0, 0, 0, 0, b"g"), b"")],
    ),
    "PAX": (
        archive(
            file(
                "a", b"x", pax={"path": LONG, "uid": "70000000", "gid": "4294967294", "mtime": "1.25", "comment": "="}
            ),
            file("b"),
        ),
        [
            (tar.Entry(LONG.encode(), b"0", 0o644, 70000000, 0xFFFFFFFE, 1, 1_250_000_000), b"x"),
            (tar.Entry(b"b", b"0", 0o644, 0, 0, 0, 0), b""),
        ],
    ),
    "PAX size": (
        archive(file("a", b"xyz", raw={"size": b"0"}, pax={"size": "3"})),
        [(tar.Entry(b"a", b"0", 0o644, 0, 0, 3, 0), b"xyz")],
    ),
    "empty PAX values count for nothing": (
        archive(file("a", b"x", mtime=7, uid=1, pax={"path": "", "size": "", "mtime": "", "uid": ""})),
        [(tar.Entry(b"a", b"0", 0o644, 1, 0, 1, 7_000_000_000), b"x")],
    ),
    "the last PAX header and record count": (
        archive(
            pax_header({"path": "first", "mtime": "1"}),
            meta(b"x", corpus.pax_record("path", "2nd") + corpus.pax_record("path", "3rd")),
            file("a"),
        ),
        [(tar.Entry(b"3rd", b"0", 0o644, 0, 0, 0, 0), b"")],
    ),
    "global PAX headers are ignored": (
        archive(pax_header({"path": "all", "comment": "0" * 40}, kind=b"g"), file("a")),
        [(tar.Entry(b"a", b"0", 0o644, 0, 0, 0, 0), b"")],
    ),
    "extended attributes": (
        archive(
            file("a", pax={"SCHILY.xattr.user.x": b"\0\n=\xff", "SCHILY.xattr.user.e": b"", "LIBARCHIVE.xattr.y": "z"})
        ),
        [(tar.Entry(b"a", b"0", 0o644, 0, 0, 0, 0, xattrs={b"user.x": b"\0\n=\xff", b"user.e": b""}), b"")],
    ),
    "content of links and folders is none": (
        archive(*(Member("a", kind, raw={"size": b"777"}, link="t") for kind in (b"1", b"2", b"5", b"6"))),
        [
            (tar.Entry(b"a", kind, 0o644, 0, 0, 0, 0, b"t"), b"")
            for kind in (tar.HARD_LINK, tar.SYMLINK, tar.DIRECTORY, tar.FIFO)
        ],
    ),
    "content of unknown kinds is skipped": (
        archive(Member("a", b"V", b"label"), file("b")),
        [
            (tar.Entry(b"a", b"V", 0o644, 0, 0, 5, 0), b"label"),
            (tar.Entry(b"b", b"0", 0o644, 0, 0, 0, 0), b""),
        ],
    ),
    "old files and folders": (
        archive(
            Member("f", b"\0", b"x", raw={"magic": V7}), Member("d/", b"\0", raw={"magic": V7}), Member("c", b"7", b"y")
        ),
        [
            (tar.Entry(b"f", b"0", 0o644, 0, 0, 1, 0), b"x"),
            (tar.Entry(b"d/", b"5", 0o644, 0, 0, 0, 0), b""),
            (tar.Entry(b"c", b"0", 0o644, 0, 0, 1, 0), b"y"),
        ],
    ),
    "devices": (
        archive(corpus.char("c", 1, 3), corpus.block("b", 4095, 1048575)),
        [
            (tar.Entry(b"c", b"3", 0o644, 0, 0, 0, 0, major=1, minor=3), b""),
            (tar.Entry(b"b", b"4", 0o644, 0, 0, 0, 0, major=4095, minor=1048575), b""),
        ],
    ),
    "names as they are": (
        archive(file("/abs"), file("../up"), file(b"\xff\xfe"), folder("./"), hard_link("./a//b", "/etc/../x")),
        [
            (tar.Entry(b"/abs", b"0", 0o644, 0, 0, 0, 0), b""),
            (tar.Entry(b"../up", b"0", 0o644, 0, 0, 0, 0), b""),
            (tar.Entry(b"\xff\xfe", b"0", 0o644, 0, 0, 0, 0), b""),
            (tar.Entry(b"./", b"5", 0o755, 0, 0, 0, 0), b""),
            (tar.Entry(b"./a//b", b"1", 0o644, 0, 0, 0, 0, b"/etc/../x"), b""),
        ],
    ),
    "numbers of all kinds": (
        archive(
            file(
                "a", raw={"uid": base256(1 << 31, 8), "gid": b"  17 \0", "mode": b"100644 ", "mtime": base256(-5, 12)}
            ),
            file("b", raw={"uid": b"", "gid": b"12\0garb", "size": b" " * 12, "mtime": b"17777777777"}),
        ),
        [
            (tar.Entry(b"a", b"0", 0o644, 1 << 31, 15, 0, -5_000_000_000), b""),
            (tar.Entry(b"b", b"0", 0o644, 0, 10, 0, (8**10 * 2 - 1) * 1_000_000_000), b""),
        ],
    ),
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, chunk: int) -> None:
    """Each is read as declared, in chunks of any size."""
    data, expected = FEATURES[name]
    assert parse(data, chunk) == expected


def with_signed_sum(member: Member) -> bytes:
    """The checksum as those computed it whose bytes were signed."""
    plain = bytearray(member.encode())
    plain[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in plain[:512])
    return replace(member, raw={"checksum": b"%06o\0 " % signed}).encode()


def test_signed_checksum() -> None:
    """Old writers added signed bytes."""
    assert only(with_signed_sum(file(b"caf\xe9"))).name == b"caf\xe9"


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("1.", 1_000_000_000),
        ("1.000000001", 1_000_000_001),
        ("1.0000000019", 1_000_000_001),
        ("-1", -1_000_000_000),
        ("-1.5", -1_500_000_000),
        ("-0.25", -250_000_000),
        ("100000000000000000.5", 10**26 + 500_000_000),
    ],
)
def test_pax_times(text: str, nanoseconds: int) -> None:
    """To the nanosecond, before 1970 too."""
    assert only(archive(file("a", pax={"mtime": text}))).mtime_ns == nanoseconds


def bad(**raw: bytes) -> bytes:
    """An archive of one file with broken fields."""
    return archive(file("the/file", raw=raw))


def bad_pax(record: bytes) -> bytes:
    """An archive of one file with a PAX header of these bytes."""
    return archive(meta(b"x", record), file("the/file"))


def bad_device(kind: bytes, device: tuple[int, int]) -> bytes:
    """An archive of one device."""
    return archive(Member("dev/x", kind, device=device))


WRONG_SUM = "a header has a wrong checksum: not a tar archive, or a damaged one"
FAULTS: dict[str, tuple[bytes, str]] = {
    "checksum": (bad(checksum=b"000123\0 "), WRONG_SUM),
    "checksum not octal": (bad(checksum=b"zzzzzzzz"), WRONG_SUM),
    "checksum empty": (bad(checksum=b""), WRONG_SUM),
    "not tar": (b"PK\3\4" + bytes(1000), WRONG_SUM),
    "second header": (archive(file("a"), file("b", raw={"checksum": b"1"})), WRONG_SUM),
    "a header cut": (archive(file("a"), end=b"")[:-1], "the archive ends in the middle of a header"),
    "content cut": (archive(file("a", b"x" * 600), end=b"")[:1100], "the archive ends in the middle of a file"),
    "content missing": (archive(file("a", raw={"size": b"1"}), end=b""), "the archive ends in the middle of a file"),
    "single zero block": (
        archive(file("a"), bytes(512), file("b")),
        "the archive goes on after a single block of zeros",
    ),
    "meta cut": (meta(b"x", b"x" * 600)[:-513], "the archive ends in an extended header"),
    "meta padding cut": (meta(b"L", b"x" * 600)[:-1], "the archive ends in an extended header"),
    "meta without file": (
        archive(pax_header({"path": "a"})),
        "the archive ends after an extended header, without its file",
    ),
    "long name without file": (
        meta(b"L", b"name"),
        "the archive ends after an extended header, without its file",
    ),
    "meta too large": (
        meta(b"x", b"", size=(1 << 20) + 1),
        "an extended header of 1048577 bytes is too large",
    ),
    "meta negative": (
        header({"size": base256(-1, 12), "kind": b"L"}),
        "an extended header of -1 bytes is too large",
    ),
    "meta size": (
        header({"size": b"many", "kind": b"K"}),
        "an extended header has a size that is not a number",
    ),
    "mode": (bad(mode=b"rwxr-xr"), "the/file has a header field that is not a number"),
    "size": (bad(size=b"12 34"), "the/file has a header field that is not a number"),
    "size with a sign": (bad(size=b"-1"), "the/file has a header field that is not a number"),
    "size with an underscore": (bad(size=b"1_0"), "the/file has a header field that is not a number"),
    "octal with a nine": (bad(uid=b"9"), "the/file has a header field that is not a number"),
    "negative size": (bad(size=base256(-1, 12)), "the/file has a size, owner or group out of range"),
    "negative owner": (bad(uid=base256(-1, 8)), "the/file has a size, owner or group out of range"),
    "owner -1": (bad(uid=base256(0xFFFFFFFF, 8)), "the/file has a size, owner or group out of range"),
    "huge group": (bad(gid=base256(1 << 40, 8)), "the/file has a size, owner or group out of range"),
    "huge time": (bad(mtime=base256(1 << 70, 12)), "the/file has a time out of range"),
    "time long ago": (bad(mtime=base256(-(1 << 70), 12)), "the/file has a time out of range"),
    "major": (bad_device(b"3", (4096, 0)), "dev/x has a device number out of range"),
    "minor": (bad_device(b"4", (0, 1 << 20)), "dev/x has a device number out of range"),
    "major not a number": (
        archive(corpus.char("dev/x", 0, 0, raw={"major": b"tty"})),
        "dev/x has a header field that is not a number",
    ),
    "GNU sparse": (
        archive(Member("s", b"S", raw={"magic": GNU})),
        "s is a sparse file, which this unpacker does not know",
    ),
    "PAX sparse": (
        archive(file("s", pax={"GNU.sparse.major": "1"})),
        "s is a sparse file, which this unpacker does not know",
    ),
    "PAX NUL in path": (
        archive(file("a", pax={"path": b"x\0y"})),
        "x\N{REPLACEMENT CHARACTER}y or what it links to has a NUL in its name",
    ),
    "PAX NUL in link": (
        archive(symlink("a", "b", pax={"linkpath": b"x\0y"})),
        "a or what it links to has a NUL in its name",
    ),
    "PAX without length": (bad_pax(b"path=x\n"), "a PAX record has no length"),
    "PAX zeros": (bad_pax(bytes(20)), "a PAX record has no length"),
    "PAX length with a sign": (bad_pax(b"-9 path=x\n"), "a PAX record has no length"),
    "PAX length too long": (bad_pax(b"1" * 30 + b" path=x\n"), "a PAX record has no length"),
    "PAX length beyond": (bad_pax(b"11 path=x\n"), "a PAX record is broken"),
    "PAX length zero": (bad_pax(b"0 path=x\n"), "a PAX record is broken"),
    "PAX length short": (bad_pax(b"8 path=x\n"), "a PAX record is broken"),
    "PAX without =": (bad_pax(b"9 path-x\n"), "a PAX record is broken"),
    "PAX without key": (bad_pax(b"5 =x\n"), "a PAX record is broken"),
    "PAX key with NUL": (bad_pax(b"10 p\0th=x\n"), "a PAX record is broken"),
    "PAX size": (archive(file("a", pax={"size": "-1"})), "PAX size is not a number"),
    "PAX size long": (archive(file("a", pax={"size": "9" * 20})), "PAX size is not a number"),
    "PAX size huge": (archive(file("a", pax={"size": "9" * 19})), "the archive ends in the middle of a file"),
    "PAX uid": (archive(file("a", pax={"uid": "root"})), "PAX uid is not a number"),
    "PAX gid large": (archive(file("a", pax={"gid": "4294967295"})), "a has a size, owner or group out of range"),
    "PAX mtime": (archive(file("a", pax={"mtime": "1e9"})), "PAX mtime is not a time"),
    "PAX mtime sign": (archive(file("a", pax={"mtime": "-"})), "PAX mtime is not a time"),
    "PAX mtime point": (archive(file("a", pax={"mtime": ".5"})), "PAX mtime is not a time"),
    "PAX mtime fraction": (archive(file("a", pax={"mtime": "1.-5"})), "PAX mtime is not a time"),
    "PAX mtime long": (archive(file("a", pax={"mtime": "1" * 19})), "PAX mtime is not a time"),
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, chunk: int) -> None:
    """Each is refused with a sentence that says what is wrong, in chunks of any size."""
    data, message = FAULTS[name]
    with pytest.raises(tar.TarError) as caught:
        parse(data, chunk)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a/b c", "a/b c"),
        (b"", "/"),
        (b"a\nb\x1b[0m", "a\ufffdb\ufffd[0m"),
        (b"\xff", "\ufffd"),
        (b"x" * 300, "x" * 200 + "..."),
        ("é".encode(), "é"),
    ],
)
def test_names_in_messages(name: bytes, shown: str) -> None:
    """On one line, and not too long."""
    assert tar.shown(name) == shown


def test_start_of_an_archive() -> None:
    """A header of any format or zeros; not what is too short or has no right checksum."""
    for start in (archive(file("a")), archive(file("a", raw={"magic": V7})), bytes(512)):
        assert tar.is_start(start[:512])
    assert not tar.is_start(archive(file("a"))[:511])
    assert not tar.is_start(b"a" * 512)
    assert not tar.is_start(b"")


def test_drain_reads_everything() -> None:
    """What follows the archive counts for the digest."""
    left = [b"abc", b"def", b""]
    stream = tar.Stream(lambda: left.pop(0))
    assert stream.take(1) == b"a"
    stream.drain()
    assert left == []


NAMES = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60),
    min_size=1,
    max_size=5,
).map("/".join)
SMALL = st.integers(0, 8**7 - 1)
FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "GNU": tarfile.GNU_FORMAT,
    "PAX": tarfile.PAX_FORMAT,
}
KINDS = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)


def infos(kind: str) -> st.SearchStrategy[tuple[tarfile.TarInfo, bytes]]:
    """A member that the standard library can write in this format, and its content."""
    short = NAMES.filter(lambda name: len(name.encode()) <= 100)
    names = short if kind == "ustar" else NAMES
    seconds: dict[str, st.SearchStrategy[float]] = {
        "ustar": st.integers(0, 8**11 - 1),
        "GNU": st.integers(-(2**40), 2**40),
        "PAX": st.integers(-(2**34), 2**34).map(lambda quarters: quarters / 4),
    }
    owners = SMALL if kind == "ustar" else st.integers(0, 0xFFFFFFFE)
    return st.builds(
        make_info,
        names,
        st.sampled_from(KINDS),
        st.integers(0, 0o7777),
        owners,
        seconds[kind],
        short,
        st.binary(max_size=1100),
    )


def make_info(
    name: str, kind: bytes, mode: int, owner: int, mtime: float, link: str, content: bytes
) -> tuple[tarfile.TarInfo, bytes]:
    """As the standard library's."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner // 2, mtime
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = link
    if kind == tarfile.CHRTYPE:
        info.devmajor, info.devminor = mode % 4096, owner % 0x1FFFF
    content = content if kind == tarfile.REGTYPE else b""
    info.size = len(content)
    return info, content


def like_ours(info: tarfile.TarInfo, content: bytes) -> tuple[object, ...]:
    """What both readers know of a member."""
    nanoseconds = int(info.mtime * 4) * 250_000_000
    name, link = info.name.rstrip("/"), info.linkname
    return name, info.type, info.mode, info.uid, info.gid, nanoseconds, link, info.devmajor, info.devminor, content


def like_theirs(entry: tar.Entry, content: bytes) -> tuple[object, ...]:
    """The same of one that we have read."""
    name, link = (text.decode(errors="surrogateescape") for text in (entry.name.rstrip(b"/"), entry.link))
    device = (entry.major, entry.minor)
    return name, entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns, link, *device, content


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reads_what_the_standard_library_reads(kind: str, data: st.DataObject) -> None:
    """Random archives in each format; both readers agree on every member."""
    members = data.draw(st.lists(infos(kind), max_size=5))
    chunk = data.draw(st.sampled_from([100, 512, 5000]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind], encoding="utf-8") as archived:
        for info, content in members:
            archived.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archived:
        theirs = [like_ours(info, read(archived, info)) for info in archived.getmembers()]
    assert [like_theirs(*found) for found in parse(buffer.getvalue(), chunk)] == theirs


def read(archived: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The content of a regular file; links have none of their own."""
    opened = archived.extractfile(info) if info.isreg() else None
    return opened.read() if opened else b""


@settings(max_examples=200, deadline=None)
@given(damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4), cut=st.integers(0, 5000))
def test_damage_is_an_error_or_harmless(damage: list[tuple[int, int]], cut: int) -> None:
    """Whatever the bytes: members or a TarError, nothing else."""
    data = bytearray(archive(gnu_long(symlink(LONG, "x")), file("a", b"x" * 700, pax={"mtime": "1.5"}), folder("d")))
    for place, value in damage:
        data[place % len(data)] = value
    try:
        parse(bytes(data[:cut]))
    except tar.TarError as err:
        assert str(err)
