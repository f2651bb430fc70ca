"""The SPDY/3.1 codec against a second endpoint of its own and against bytes written by hand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crishim.streaming.spdy import frames
from crishim.streaming.spdy.endpoint import Bounds, Endpoint, LocalError, ProtocolError, Role
from crishim.streaming.spdy.events import (
    DataReceived,
    Event,
    GoneAway,
    HeadersReceived,
    PongReceived,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WindowOpened,
)
from crishim.streaming.spdy.frames import GoAwayStatus, Kind, ResetStatus
from crishim.streaming.spdy.headers import DICTIONARY, MAX_BLOCK, HeaderDecoder, HeaderEncoder, HeaderError
from crishim.streaming.spdy.reader import MAX_CONTROL
from crishim.streaming.spdy.states import FAULTS, TRANSITIONS, Act, Half


class Pair:
    """A client and a server whose bytes go to each other, in pieces of ``step`` bytes (0: whole)."""

    def __init__(self, step: int = 0, bounds: Bounds | None = None) -> None:
        self.client, self.server = Endpoint(Role.CLIENT), Endpoint(Role.SERVER, bounds)
        self.step = step
        self.at_client: list[Event] = []
        self.at_server: list[Event] = []

    def settle(self) -> None:
        """Carry what is to be sent until both are silent."""
        while (ours := self.client.take()) or (theirs := self.server.take()):
            if ours:
                self.to_server(ours)
                continue
            self.to_client(theirs)

    def to_server(self, data: bytes) -> None:
        self.at_server += [keep(event) for piece in pieces(data, self.step) for event in self.server.receive(piece)]

    def to_client(self, data: bytes) -> None:
        self.at_client += [keep(event) for piece in pieces(data, self.step) for event in self.client.receive(piece)]

    def opened(self, headers: dict[str, str] | None = None) -> int:
        """A stream that is open both ways."""
        stream = self.client.open(headers or {"streamtype": "data"})
        self.settle()
        self.server.reply(stream)
        self.settle()
        self.at_client.clear()
        self.at_server.clear()
        return stream

    def client_sends(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        self.to_server(self.client.take() + self.client.data_header(stream, len(data), fin=fin) + data)
        self.settle()

    def server_sends(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        self.to_client(self.server.take() + self.server.data_header(stream, len(data), fin=fin) + data)
        self.settle()


def keep(event: Event) -> Event:
    """Events with data of their own."""
    if isinstance(event, DataReceived):
        return DataReceived(event.stream_id, memoryview(bytes(event.data)), event.fin)
    return event


def pieces(data: bytes, step: int) -> list[bytes]:
    return [data[at : at + step] for at in range(0, len(data), step)] if step else [data]


def received(events: list[Event], stream: int) -> tuple[bytes, bool]:
    """All data of a stream, and whether it ended."""
    parts = [event for event in events if isinstance(event, DataReceived) and event.stream_id == stream]
    assert not [part for part in parts[:-1] if part.fin]
    return b"".join(bytes(part.data) for part in parts), bool(parts and parts[-1].fin)


STEPS = pytest.mark.parametrize("step", [0, 1, 7])


def test_dictionary_is_the_specified_one() -> None:
    """Its checksum is in every zlib header of the protocol: 78 bb e3 c6 a7 c2."""
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)
    assert HeaderEncoder().encode({})[2:6] == bytes.fromhex("e3c6a7c2")


def test_frames_have_the_specified_bytes() -> None:
    """The examples of section 2.2 and 2.6, by hand."""
    assert frames.data_header(3, 5, fin=True) == bytes.fromhex("00000003 01000005")
    assert frames.ping(7) == bytes.fromhex("80030006 00000004 00000007")
    assert frames.two_words(Kind.RST_STREAM, 1, 5) == bytes.fromhex("80030003 00000008 00000001 00000005")
    assert frames.two_words(Kind.GOAWAY, 9, 0) == bytes.fromhex("80030007 00000008 00000009 00000000")
    assert frames.two_words(Kind.WINDOW_UPDATE, 0, 65536) == bytes.fromhex("80030009 00000008 00000000 00010000")
    assert frames.settings({7: 1 << 20}) == bytes.fromhex("80030004 0000000c 00000001 00000007 00100000")
    assert frames.syn_stream(1, b"xy", 1) == bytes.fromhex("80030001 0100000c 00000001 00000000 0000") + b"xy"
    assert frames.with_block(Kind.SYN_REPLY, 1, b"xy") == bytes.fromhex("80030002 00000006 00000001") + b"xy"


@given(st.lists(st.dictionaries(st.text("abc-", min_size=1), st.text(), max_size=8), max_size=8))
def test_headers_round_trip(blocks: list[dict[str, str]]) -> None:
    """Several blocks share one state."""
    encoder, decoder = HeaderEncoder(), HeaderDecoder()
    for headers in blocks:
        assert decoder.decode(encoder.encode(headers)) == headers


def test_names_are_lower_case() -> None:
    """As HTTP's names are compared."""
    assert HeaderDecoder().decode(HeaderEncoder().encode({"StreamType": "Error"})) == {"streamtype": "Error"}


def _compressed(plain: bytes) -> bytes:
    packer = zlib.compressobj(zdict=DICTIONARY)
    return packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH)


def _pairs(*parts: bytes, count: int | None = None) -> bytes:
    number = len(parts) // 2 if count is None else count
    return struct.pack("!I", number) + b"".join(struct.pack("!I", len(part)) + part for part in parts)


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        _pairs(b"a", b"1", count=2),
        _pairs(b"a", b"1", b"a", b"2"),
        _pairs(b"a", b"1", b"A", b"2"),
        _pairs(b"", b"1"),
        _pairs(b"a", b"\xff"),
        _pairs(b"a", b"1") + b"more",
        struct.pack("!II", 1, 1 << 31) + b"a",
        b"\0" * (MAX_BLOCK + 1),
    ],
)
def test_bad_headers_are_refused(plain: bytes) -> None:
    """Cut short, doubled, empty, endless."""
    with pytest.raises(HeaderError):
        HeaderDecoder().decode(_compressed(plain))


def test_a_bomb_is_not_inflated() -> None:
    """A few bytes that would become a gigabyte."""
    packer = zlib.compressobj(zdict=DICTIONARY)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(16)) + packer.flush()
    assert len(bomb) < MAX_CONTROL * 2
    with pytest.raises(HeaderError, match="more than"):
        HeaderDecoder().decode(bomb)


def test_tables_are_whole() -> None:
    """Every act on every half is either allowed or has its fault."""
    every = {(half, act) for half in Half for act in Act}
    assert TRANSITIONS.keys() | FAULTS.keys() == every
    assert not TRANSITIONS.keys() & FAULTS.keys()


@STEPS
def test_a_stream_from_begin_to_end(step: int) -> None:
    """Open, reply, data both ways, half-close both ways: then nothing is left of it."""
    pair = Pair(step)
    stream = pair.client.open({"streamType": "stdin"})
    pair.settle()
    assert (stream, pair.at_server) == (1, [StreamOpened(1, {"streamtype": "stdin"})])
    pair.server.reply(stream, {"ok": "yes"})
    pair.settle()
    assert pair.at_client == [StreamReplied(1, {"ok": "yes"})]
    pair.client_sends(stream, b"hello", fin=True)
    assert received(pair.at_server, stream) == (b"hello", True)
    pair.server_sends(stream, b"good")
    pair.server_sends(stream, b"bye", fin=True)
    assert received(pair.at_client, stream) == (b"goodbye", True)
    assert (pair.client.streams, pair.server.streams) == (0, 0)


@STEPS
def test_empty_frames(step: int) -> None:
    """A FIN may come alone; an empty frame without it means nothing."""
    pair = Pair(step)
    stream = pair.opened()
    pair.client_sends(stream, b"")
    assert pair.at_server == []
    pair.client_sends(stream, b"", fin=True)
    assert received(pair.at_server, stream) == (b"", True)


def test_opened_with_fin() -> None:
    """The opener sends nothing, the other side does."""
    pair = Pair()
    stream = pair.client.open({}, fin=True)
    pair.settle()
    assert pair.at_server == [StreamOpened(stream, {}, fin=True)]
    pair.server.reply(stream)
    pair.settle()
    pair.server_sends(stream, b"x", fin=True)
    assert received(pair.at_client, stream) == (b"x", True)
    with pytest.raises(LocalError):
        pair.client.data_header(stream, 1)


def test_unidirectional_streams() -> None:
    """Nothing can be answered on them."""
    pair = Pair()
    block = HeaderEncoder().encode({})
    pair.to_server(frames.syn_stream(1, block, frames.FLAG_UNIDIRECTIONAL))
    assert pair.at_server == [StreamOpened(1, {}, one_way=True)]
    with pytest.raises(LocalError):
        pair.server.reply(1)
    pair.to_server(frames.data_header(1, 2, fin=True) + b"ab")
    assert received(pair.at_server, 1) == (b"ab", True)
    assert pair.server.streams == 0


@STEPS
def test_more_headers(step: int) -> None:
    """HEADERS, both ways."""
    pair = Pair(step)
    stream = pair.opened()
    pair.client.send_headers(stream, {"a": "1"}, fin=True)
    pair.server.send_headers(stream, {"b": "2"})
    pair.settle()
    assert pair.at_server == [HeadersReceived(stream, {"a": "1"}, fin=True)]
    assert pair.at_client == [HeadersReceived(stream, {"b": "2"})]


@STEPS
def test_pings(step: int) -> None:
    """Each side answers the other's."""
    pair = Pair(step)
    assert (pair.client.ping(), pair.client.ping(), pair.server.ping()) == (1, 3, 2)
    pair.settle()
    assert pair.at_client == [PongReceived(1), PongReceived(3)]
    assert pair.at_server == [PongReceived(2)]


@STEPS
def test_reset(step: int) -> None:
    """What is under way meanwhile is ignored, and does not disturb others."""
    pair = Pair(step)
    stream, other = pair.opened(), pair.opened()
    pair.server.reset(stream)
    pair.server.reset(stream)
    late = pair.client.data_header(stream, 5, fin=True) + b"later"
    pair.to_server(late + pair.client.data_header(other, 2) + b"ok")
    pair.settle()
    assert pair.at_client == [StreamReset(stream, ResetStatus.CANCEL)]
    assert received(pair.at_server, stream) == (b"", False)
    assert received(pair.at_server, other) == (b"ok", False)


@pytest.mark.parametrize(
    ("act", "status"),
    [
        (lambda pair, stream: pair.client.data_header(stream, 1) + b"x", ResetStatus.STREAM_ALREADY_CLOSED),
        (lambda pair, stream: frames.with_block(Kind.HEADERS, stream, b""), ResetStatus.STREAM_ALREADY_CLOSED),
        (lambda pair, stream: frames.with_block(Kind.SYN_REPLY, stream, b""), ResetStatus.STREAM_IN_USE),
    ],
)
def test_breaking_a_stream_resets_it(act: Callable[[Pair, int], bytes], status: ResetStatus) -> None:
    """Not the session."""
    pair = Pair()
    stream, other = pair.opened(), pair.opened()
    encoder = pair.client._encoder
    pair.to_server(frames.data_header(stream, 0, fin=True))
    pair.at_server.clear()
    data = act(pair, stream)
    if data[:2] == b"\x80\x03":
        kind = Kind(data[3])
        data = frames.with_block(kind, stream, encoder.encode({}))
    pair.to_server(data)
    assert pair.at_server == [StreamReset(stream, status)]
    pair.settle()
    assert pair.at_client == [StreamReset(stream, status)]
    pair.client_sends(other, b"fine")
    assert received(pair.at_server, other) == (b"fine", False)


def test_data_before_the_reply() -> None:
    """The side that has not accepted a stream cannot send on it."""
    pair = Pair()
    stream = pair.client.open({})
    pair.to_client(frames.data_header(stream, 1) + b"x")
    assert pair.at_client == [StreamReset(stream, ResetStatus.PROTOCOL_ERROR)]


def test_data_for_streams_that_never_were() -> None:
    """INVALID_STREAM; the data is skipped."""
    pair = Pair()
    other = pair.opened()
    pair.to_server(frames.data_header(77, 3) + b"abc" + frames.data_header(other, 2) + b"ok")
    assert pair.server.take() == frames.two_words(Kind.RST_STREAM, 77, ResetStatus.INVALID_STREAM)
    assert received(pair.at_server, other) == (b"ok", False)


def test_events_come_as_they_become_true() -> None:
    """A stream that is opened and reset by the same bytes can be replied to in between."""
    server = Endpoint(Role.SERVER)
    data = frames.syn_stream(1, HeaderEncoder().encode({})) + frames.two_words(Kind.RST_STREAM, 1, 5)
    seen = []
    for event in server.receive(data):
        seen.append(event)
        if isinstance(event, StreamOpened):
            server.reply(1)
            server.data_header(1, 5)
    assert seen == [StreamOpened(1, {}), StreamReset(1, ResetStatus.CANCEL)]


def test_streams_are_bounded() -> None:
    """One more is refused, and a place becomes free again."""
    pair = Pair(bounds=Bounds(streams=2))
    pair.opened()
    second = pair.opened()
    third = pair.client.open({"a": "b"})
    pair.settle()
    assert pair.at_server == []
    assert pair.at_client == [StreamReset(third, ResetStatus.REFUSED_STREAM)]
    pair.client.reset(second)
    pair.settle()
    pair.client.open({"c": "d"})
    pair.settle()
    assert StreamOpened(7, {"c": "d"}) in pair.at_server


def test_stream_ids_may_be_swapped_but_not_reused() -> None:
    """Concurrent opens of Go clients reach us out of order."""
    server, encoder = Endpoint(Role.SERVER), HeaderEncoder()
    events = [e for n in (5, 1, 9, 7, 3) for e in server.receive(frames.syn_stream(n, encoder.encode({})))]
    assert [event.stream_id for event in events if isinstance(event, StreamOpened)] == [5, 1, 9, 7, 3]
    with pytest.raises(ProtocolError, match="stream 5"):
        list(server.receive(frames.syn_stream(5, encoder.encode({}))))


def test_skipped_ids_are_bounded() -> None:
    """A peer that jumps costs nothing."""
    server, encoder = Endpoint(Role.SERVER), HeaderEncoder()
    for number in range(1, 1 << 30, 1 << 22):
        list(server.receive(frames.syn_stream(number, encoder.encode({}))))
    assert len(server._skipped) <= 256


@pytest.mark.parametrize("number", [0, 2])
def test_ids_of_the_wrong_side(number: int) -> None:
    """A client has odd ones."""
    with pytest.raises(ProtocolError):
        list(Endpoint(Role.SERVER).receive(frames.syn_stream(number, HeaderEncoder().encode({}))))


@STEPS
def test_go_away(step: int) -> None:
    """Streams that are open go on, new ones are not taken."""
    pair = Pair(step)
    stream = pair.opened()
    pair.server.go_away()
    pair.server.go_away()
    pair.settle()
    assert pair.at_client == [GoneAway(stream, GoAwayStatus.OK)]
    with pytest.raises(LocalError):
        pair.client.open({})
    pair.client_sends(stream, b"still")
    assert received(pair.at_server, stream) == (b"still", False)
    pair.to_server(frames.syn_stream(9, pair.client._encoder.encode({})))
    assert not [event for event in pair.at_server if isinstance(event, StreamOpened)]


@pytest.mark.parametrize(
    "data",
    [
        frames.data_header(0, 4) + b"data",
        b"\x80\x02\0\x01" + bytes(4),
        frames.control(Kind.PING, b"123"),
        frames.control(Kind.PING, b""),
        frames.control(Kind.RST_STREAM, b"1234567"),
        frames.control(Kind.SYN_STREAM, b"123"),
        frames.control(Kind.SYN_REPLY, b"123"),
        frames.control(Kind.SETTINGS, b"12"),
        frames.control(Kind.SETTINGS, struct.pack("!I", 1 << 31)),
        frames.control(Kind.HEADERS, b"\0\0\0\1garbage"),
        frames.syn_stream(1, b"garbage"),
        frames.control(Kind.SYN_STREAM, bytes(MAX_CONTROL + 1)),
        frames.two_words(Kind.WINDOW_UPDATE, 0, 0),
        frames.two_words(Kind.WINDOW_UPDATE, 0, (1 << 31) - 1),
        frames.settings({7: 1 << 31}),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(16 << 20),
    ],
)
@STEPS
def test_breaking_the_session(data: bytes, step: int) -> None:
    """GOAWAY with the reason, and nothing is understood from then on."""
    server = Endpoint(Role.SERVER)
    list(server.receive(frames.ping(1)))
    server.take()
    if len(data) > 1 << 20:
        data = b"\x80" + data[1:] if step else data  # as data, ASCII is a stream that never was
    broken = False
    try:
        for piece in pieces(data[: 1 << 16], step):
            list(server.receive(piece))
    except ProtocolError:
        broken = True
    sent = server.take()
    if broken:
        assert sent.endswith(struct.pack("!III", 0x80030007, 8, 0) + struct.pack("!I", GoAwayStatus.PROTOCOL_ERROR))
        with pytest.raises(ProtocolError):
            list(server.receive(b""))
    else:
        assert data[:1] == b"G"


def test_unknown_control_frames_are_ignored() -> None:
    """Section 2.2.1."""
    server = Endpoint(Role.SERVER)
    assert list(server.receive(frames.control(200, b"whatever"))) == []
    assert list(server.receive(frames.control(201, b""))) == []
    assert server.take() == b""


def test_giant_data_frames_are_passed_on_in_pieces() -> None:
    """Nothing of a frame is kept until it is whole."""
    pair = Pair()
    stream = pair.opened()
    pair.to_server(frames.data_header(stream, frames.MAX_LENGTH, fin=True))
    pair.to_server(bytes(1000))
    assert received(pair.at_server, stream) == (bytes(1000), False)
    pair.to_server(bytes(frames.MAX_LENGTH - 1001))
    assert received(pair.at_server, stream)[1] is False
    pair.to_server(b"z")
    assert received(pair.at_server, stream) == (bytes(frames.MAX_LENGTH - 1) + b"z", True)


def test_windows_do_not_bind_towards_peers_without_flow_control() -> None:
    """Go's spdystream never opens one: waiting for it would be for ever."""
    pair = Pair()
    stream = pair.opened()
    assert not pair.server.flow_controlled
    for _ in range(8):
        pair.server_sends(stream, bytes(60_000))
    assert len(received(pair.at_client, stream)[0]) == 480_000


def test_windows_bind_once_the_peer_uses_them() -> None:
    """What was sent before counts; a window of the stream and one of the session."""
    pair = Pair()
    stream = pair.opened()
    pair.server_sends(stream, bytes(10_000))
    pair.client.update_settings({7: 20_000})
    pair.settle()
    assert pair.at_server == [WindowOpened(0)]
    assert pair.server.allowance(stream) == 10_000
    with pytest.raises(LocalError, match="window"):
        pair.server.data_header(stream, 10_001)
    pair.server_sends(stream, bytes(10_000))
    assert pair.server.allowance(stream) == 0
    pair.to_server(frames.two_words(Kind.WINDOW_UPDATE, stream, 1_000_000))
    assert pair.server.allowance(stream) == frames.INITIAL_WINDOW - 20_000
    pair.to_server(frames.two_words(Kind.WINDOW_UPDATE, 0, 5_000))
    assert pair.server.allowance(stream) == frames.INITIAL_WINDOW - 15_000
    assert pair.at_server[1:] == [WindowOpened(stream), WindowOpened(0)]


def test_consumed_data_opens_windows() -> None:
    """In steps of half a window, for the stream and for the session; a stream that has ended needs none."""
    pair = Pair()
    stream = pair.opened()
    pair.client_sends(stream, bytes(40_000))
    pair.server.consumed(stream, 20_000)
    assert pair.server.take() == b""
    pair.server.consumed(stream, 20_000)
    assert pair.server.take() == frames.two_words(Kind.WINDOW_UPDATE, 0, 40_000) + frames.two_words(
        Kind.WINDOW_UPDATE, stream, 40_000
    )
    pair.client_sends(stream, bytes(40_000), fin=True)
    pair.server.consumed(stream, 40_000)
    assert pair.server.take() == frames.two_words(Kind.WINDOW_UPDATE, 0, 40_000)


def test_data_that_nobody_gets_opens_the_session_window() -> None:
    """Or streams that were reset would use it up."""
    pair = Pair()
    stream = pair.opened()
    pair.server.reset(stream)
    pair.server.take()
    pair.to_server(frames.data_header(stream, 40_000) + bytes(40_000))
    assert pair.server.take() == frames.two_words(Kind.WINDOW_UPDATE, 0, 40_000)


def test_wider_windows_are_announced() -> None:
    """At the beginning, and with each stream."""
    pair = Pair(bounds=Bounds(window=100_000, session_window=300_000))
    stream = pair.client.open({})
    pair.settle()
    pair.server.reply(stream)
    pair.settle()
    assert pair.client.flow_controlled
    assert pair.client.allowance(stream) == 100_000


@given(st.binary(max_size=400), st.integers(1, 64))
def test_garbage(data: bytes, step: int) -> None:
    """Any bytes are either understood or a protocol error."""
    server = Endpoint(Role.SERVER)
    list(server.receive(frames.syn_stream(1, HeaderEncoder().encode({}))))
    try:
        for piece in pieces(data, step):
            list(server.receive(piece))
    except ProtocolError:
        pass
    server.take()


_FRAMES = st.one_of(
    st.builds(
        lambda n, b, fin: frames.data_header(n, len(b), fin=fin) + b, st.integers(1, 9), st.binary(), st.booleans()
    ),
    st.builds(
        frames.two_words,
        st.sampled_from([Kind.RST_STREAM, Kind.GOAWAY, Kind.WINDOW_UPDATE]),
        st.integers(0, 9),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(frames.ping, st.integers(0, 2**32 - 1)),
    st.builds(lambda size: frames.settings({7: size}), st.integers(0, 2**32 - 1)),
    st.builds(frames.control, st.integers(0, 12), st.binary(max_size=30), st.integers(0, 255)),
)


@given(st.lists(_FRAMES, max_size=30), st.lists(st.integers(0, 4), max_size=8))
def test_frames_in_any_order(given_frames: list[bytes], opens: list[int]) -> None:
    """Whole frames, sensible or not, between streams that are opened; counts and windows stay sound."""
    server, encoder = Endpoint(Role.SERVER), HeaderEncoder()
    number = 1
    try:
        for at, frame in enumerate(given_frames):
            if at in opens:
                list(server.receive(frames.syn_stream(number, encoder.encode({"n": str(number)}))))
                server.reply(number)
                number += 2
            list(server.receive(frame))
            for stream in range(1, number, 2):
                assert 0 <= server.allowance(stream) <= frames.MAX_LENGTH
    except (ProtocolError, LocalError):
        pass
    assert server.streams <= number // 2 + 1


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.binary(max_size=200), st.booleans()), max_size=40),
    st.integers(0, 50),
)
def test_conversations(acts: list[tuple[bool, int, bytes, bool]], step: int) -> None:
    """Both sides talk on three streams as they like: each gets all that the other sent, in order."""
    pair = Pair(step)
    ids = [pair.opened({"n": str(n)}) for n in range(3)]
    sent: dict[tuple[bool, int], bytes] = {}
    ended: set[tuple[bool, int]] = set()
    for by_client, which, data, fin in acts:
        key = (by_client, ids[which])
        if key in ended:
            continue
        (pair.client_sends if by_client else pair.server_sends)(ids[which], data, fin=fin)
        sent[key] = sent.get(key, b"") + data
        if fin:
            ended.add(key)
    for (by_client, stream), data in sent.items():
        events = pair.at_server if by_client else pair.at_client
        assert received(events, stream)[0] == data
        assert received(events, stream)[1] is ((by_client, stream) in ended) or not data
    open_streams = [stream for stream in ids if not {(True, stream), (False, stream)} <= ended]
    assert (pair.client.streams, pair.server.streams) == (len(open_streams), len(open_streams))
