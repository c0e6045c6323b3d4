"""Peers scripted as bytes: cut anywhere, silent, wrong, greedy. A reader gets its pages from the next connection."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.errors import LazymemError, RemoteProtocolError, ServerRefusedError, ServerUnreachableError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER, FrameType
from lazymem.wire.messages import (
    Cancelled,
    Encoding,
    Error,
    ErrorCode,
    FileData,
    Hello,
    Pages,
    Ping,
    Pong,
    Welcome,
)
from tests.fetch.conftest import Joined, Network
from tests.support.peer import Peer, digests_of

PAGES = PageRange(4, 3)


class Scripted(Peer):
    """Its first connection gets the scripted bytes after the first read, in `pieces`; later ones are honest."""

    def __init__(self, honest: Peer, pieces: Sequence[bytes], then_silent: bool = False) -> None:
        super().__init__(honest.ram, vmstate=honest.vmstate)
        self.pieces = pieces
        self.then_silent = then_silent
        self.scripts = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.scripts += 1
        if self.scripts > 1:
            await super().serve(stream)
            return
        try:
            await stream.receive_some(65536)
            await stream.send_all(self.pieces[0])
            for piece in self.pieces[1:]:
                await trio.testing.wait_all_tasks_blocked()
                await stream.send_all(piece)
            if self.then_silent:
                await trio.sleep_forever()
            await stream.aclose()
        except trio.BrokenResourceError:
            return


def welcome_bytes(peer: Peer) -> bytes:
    return encode(peer.welcome(Hello("")))


def answer_bytes(peer: Peer, request_id: int = 1) -> bytes:
    return b"".join(encode(message) for message in peer.pages(request_id, [PAGES], frame_pages=2))


async def test_cut_in_every_place_of_the_answer(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    answer = answer_bytes(peer)
    places = sorted({*range(60), *range(0, len(answer), 97), *range(len(answer) - 30, len(answer))})
    for place in places:
        network.peer = scripted = Scripted(peer, [welcome_bytes(peer), answer[:place]])
        client = await network.connect()
        fetched = await client.fetch([PAGES])
        assert joined(fetched.runs) == peer.bytes_of(PAGES), place
        assert scripted.scripts == 2
        client.close()


async def test_byte_by_byte_is_as_good_as_whole(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    answer = answer_bytes(peer)
    pieces = [answer[at : at + 1] for at in range(50)] + [answer[50:]]
    network.peer = Scripted(peer, [welcome_bytes(peer), *pieces], then_silent=True)
    client = await network.connect()
    assert joined((await client.fetch([PAGES])).runs) == peer.bytes_of(PAGES)
    assert network.dials == 1


async def test_cut_in_every_place_of_the_welcome(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    welcome = welcome_bytes(peer)
    for place in range(len(welcome)):
        network.peer = Scripted(peer, [welcome[:place]])
        with pytest.raises(ServerUnreachableError, match="before its welcome"):
            await network.connect()


async def test_no_welcome_is_an_error_in_time(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    network.peer = Scripted(peer, [b""], then_silent=True)
    started_at = trio.current_time()
    with pytest.raises(ServerUnreachableError, match="no welcome within 10 s"):
        await network.connect()
    assert trio.current_time() - started_at < 11


def header(length: int, number: int, flags: int = 0, request_id: int = 1) -> bytes:
    return HEADER.pack(length, number, flags, 0, request_id)


GREETINGS: dict[str, tuple[Callable[[Peer], bytes], type[LazymemError]]] = {
    "http": (lambda peer: b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError),
    "ssh": (lambda peer: b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", RemoteProtocolError),
    "zeros": (lambda peer: bytes(64), RemoteProtocolError),
    "pages before a welcome": (answer_bytes, RemoteProtocolError),
    "version": (lambda peer: _with_version(welcome_bytes(peer), 9), RemoteProtocolError),
    "unsupported": (lambda peer: encode(Error(0, ErrorCode.UNSUPPORTED_VERSION, "1 to 2")), ServerRefusedError),
    "no snapshot": (lambda peer: encode(Error(0, ErrorCode.NO_SUCH_SNAPSHOT, "no web")), ServerRefusedError),
    "oversized": (lambda peer: header(1 << 31, FrameType.WELCOME, request_id=0), RemoteProtocolError),
    "ping": (lambda peer: encode(Ping(1)), RemoteProtocolError),
}


def _with_version(welcome: bytes, version: int) -> bytes:
    return welcome[: HEADER.size] + struct.pack("<H", version) + welcome[HEADER.size + 2 :]


@pytest.mark.parametrize("name", GREETINGS)
async def test_wrong_greetings_are_refused_at_once(
    autojump_clock: MockClock, network: Network, peer: Peer, name: str
) -> None:
    script, expected = GREETINGS[name]
    network.peer = Scripted(peer, [script(peer)], then_silent=True)
    with pytest.raises(expected, match=r"ram\.example"):
        await network.connect()
    assert network.dials == 1


def _pages(peer: Peer, pages: PageRange, request_id: int = 1, final: bool = True) -> bytes:
    return encode(peer.frame(request_id, pages, final))


def _raw_pages(pages: PageRange, encoding: Encoding, data: bytes, digests: bytes = b"") -> bytes:
    return encode(Pages(1, pages, encoding, data, digests, True))


NONSENSE: dict[str, Callable[[Peer], bytes]] = {
    "wrong id": lambda peer: answer_bytes(peer, request_id=7),
    "pages not asked for": lambda peer: _pages(peer, PageRange(100, 3)),
    "pages before the asked ones": lambda peer: _pages(peer, PageRange(3, 4)),
    "too many pages": lambda peer: _pages(peer, PageRange(PAGES.start, PAGES.count + 1)),
    "too few pages, marked final": lambda peer: _pages(peer, PageRange(PAGES.start, 2)),
    "all pages, not marked final": lambda peer: _pages(peer, PAGES, final=False),
    "the same page twice": lambda peer: _pages(peer, PageRange(4, 1), final=False) * 2,
    "file data for a fetch": lambda peer: encode(FileData(1, b"x")),
    "cancelled without a cancel": lambda peer: encode(Cancelled(1)),
    "pong without a ping": lambda peer: encode(Pong(1)),
    "a second welcome": welcome_bytes,
    "oversized frame": lambda peer: header(1 << 30, FrameType.PAGES),
    "unknown frame": lambda peer: header(0, 200),
    "unknown flags": lambda peer: header(100, FrameType.PAGES, flags=0x80),
    "a request": lambda peer: header(12, FrameType.FETCH) + struct.pack("<QI", 0, 1),
    "unhashed pages without digests": lambda peer: _raw_pages(PAGES, Encoding.RAW, peer.bytes_of(PAGES)),
    "fatal error": lambda peer: encode(Error(0, ErrorCode.BAD_REQUEST, "no")),
    "fatal error, busy": lambda peer: encode(Error(0, ErrorCode.BUSY, "later")),
    "nothing, closed": lambda peer: b"",
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_costs_the_connection_and_not_the_reader(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined, name: str
) -> None:
    script = NONSENSE[name](peer)
    network.peer = scripted = Scripted(peer, [welcome_bytes(peer), script], then_silent=bool(script))
    client = await network.connect()
    with trio.fail_after(60):
        fetched = await client.fetch([PAGES])
    assert joined(fetched.runs) == peer.bytes_of(PAGES)
    assert scripted.scripts == 2


async def test_silence_in_the_middle_of_a_frame_is_noticed(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    network.peer = Scripted(peer, [welcome_bytes(peer), answer_bytes(peer)[:500]], then_silent=True)
    client = await network.connect()
    with trio.fail_after(15):
        assert joined((await client.fetch([PAGES])).runs) == peer.bytes_of(PAGES)


async def test_compressed_bytes_that_do_not_decode_are_an_error(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    junk = _raw_pages(PAGES, Encoding.ZSTD, b"\x28\xb5\x2f\xfd" + bytes(40), digests_of(peer.bytes_of(PAGES)))
    network.peer = Scripted(peer, [welcome_bytes(peer), junk], then_silent=True)
    client = await network.connect()
    with pytest.raises(RemoteProtocolError, match="zstd"):
        await client.fetch([PAGES])


async def test_server_that_ends_every_connection_is_not_hammered(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    class Ending(Peer):
        async def serve(self, stream: trio.abc.Stream) -> None:
            await stream.receive_some(65536)
            await stream.send_all(welcome_bytes(self))
            await stream.aclose()

    client = await network.connect()
    network.peer = Ending(peer.ram)
    await network.cut()
    with trio.move_on_after(1000):
        await client.fetch([PAGES])
    assert 200 < network.dials < 1000


def test_peers_are_honest_but_for_what_they_script(peer: Peer) -> None:
    """The helper that all of this rests on."""
    assert isinstance(peer.welcome(Hello("")), Welcome)
    assert len(peer.ram) % PAGE_SIZE == 0
    assert sum(message.pages.count for message in peer.pages(1, [PAGES], 2) if isinstance(message, Pages)) == 3
