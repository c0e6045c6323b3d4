"""The pipe between a socket and its bytes: nothing lost, nothing left inside, whatever the socket takes at once."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import TlsError
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import make_context
from lazymem.tls.failures import Side
from lazymem.tls.pipe import SEAL_BYTES, TlsPipe
from tests.support.certificates import Pki


def new_pair(client: TlsSettings, server: TlsSettings) -> tuple[TlsPipe, TlsPipe]:
    return (
        TlsPipe(make_context(client, Side.CLIENT), Side.CLIENT, "ram.example"),
        TlsPipe(make_context(server, Side.SERVER), Side.SERVER),
    )


def shake_hands(client: TlsPipe, server: TlsPipe, feed: Callable[[TlsPipe, bytes], None] = TlsPipe.feed) -> None:
    done = [False, False]
    for _ in range(10):
        for index, (mine, other) in enumerate(((client, server), (server, client))):
            done[index] = done[index] or mine.handshake()
            feed(other, mine.outgoing)
        if all(done):
            return
    raise AssertionError("the handshake does not end")


@pytest.fixture
def pair(pki: Pki) -> tuple[TlsPipe, TlsPipe]:
    client, server = new_pair(pki.client(), pki.server())
    shake_hands(client, server)
    assert client.take() == server.take() == b""
    return client, server


def test_a_handshake_that_comes_byte_by_byte(pki: Pki) -> None:
    client, server = new_pair(pki.client(), pki.server())

    def feed_slowly(pipe: TlsPipe, data: bytes) -> None:
        for position in range(len(data)):
            pipe.feed(data[position : position + 1])

    shake_hands(client, server, feed_slowly)
    server.feed(client.sealed(b"hello"))
    assert server.take() == b"hello"
    assert ("commonName", "host-b") in [pair for group in server.peer_certificate()["subject"] for pair in group]  # type: ignore[attr-defined]


def test_all_that_came_is_taken_at_once(pair: tuple[TlsPipe, TlsPipe]) -> None:
    """Nobody looks again before the socket has something new: many records, and the begin of another."""
    client, server = pair
    data = random.Random(1).randbytes(200_000)
    ciphertext = b"".join(client.sealed(data[at : at + 1000]) for at in range(0, len(data), 1000))
    last = client.sealed(b"last")
    server.feed(ciphertext + last[:-1])
    assert server.take() == data
    assert server.take() == b""
    server.feed(last[-1:])
    assert server.take() == b"last"
    assert not server.ended


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 2 * SEAL_BYTES), min_size=1, max_size=6),
    takes=st.lists(st.integers(0, 70_000), min_size=1, max_size=12),
    cut=st.integers(300, 40_000),
)
def test_what_is_offered_arrives_whole_and_in_order(pki: Pki, sizes: list[int], takes: list[int], cut: int) -> None:
    """Against a socket that takes what it likes, and a peer that reads as it likes. "Taken" means handed over: once
    nothing is left to be offered, nothing is left inside."""
    client, server = new_pair(pki.client(), pki.server())
    shake_hands(client, server)
    wire, turns = bytearray(), [*takes, 1 << 20]

    def send(ciphertext: bytes | memoryview) -> int:
        count = min(len(ciphertext), turns[0])
        turns.append(turns.pop(0))
        wire.extend(ciphertext[:count])
        return count

    sent = random.Random(2).randbytes(sum(sizes))
    waiting = memoryview(sent)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    while waiting:
        done = len(sent) - len(waiting)
        pieces = [sent[max(done, end - size) : end] for size, end in zip(sizes, ends, strict=True) if end > done]
        waiting = waiting[client.offer(pieces, send) :]
    received = bytearray()
    while wire:
        server.feed(bytes(wire[:cut]))
        received += server.take()
        del wire[:cut]
    assert received == sent


def test_a_socket_without_room_is_offered_the_same_again(pair: tuple[TlsPipe, TlsPipe]) -> None:
    client, server = pair
    wire = bytearray()

    def all_but(kept: int) -> Callable[[bytes | memoryview], int]:
        room = [1]

        def send(ciphertext: bytes | memoryview) -> int:
            count = max(0, len(ciphertext) - kept) * room[0]
            room[0] = 0
            wire.extend(ciphertext[:count])
            return count

        return send

    assert client.offer((b"abc",), all_but(5)) == 2
    assert client.offer((b"c",), all_but(3)) == 0, "what was encrypted has not left"

    def takes_all(ciphertext: bytes | memoryview) -> int:
        wire.extend(ciphertext)
        return len(ciphertext)

    assert client.offer((b"c", b"def"), takes_all) == 4
    server.feed(bytes(wire))
    assert server.take() == b"abcdef"


def test_last_words_follow_what_was_kept(pair: tuple[TlsPipe, TlsPipe]) -> None:
    client, server = pair
    wire = bytearray()

    def send(ciphertext: bytes | memoryview) -> int:
        count = 7 if not wire else 0
        wire.extend(ciphertext[:count])
        return count

    assert client.offer((b"cut off",), send) == 6
    server.feed(bytes(wire) + client.sealed(b", and why"))
    assert server.take() == b"cut off, and why"


@pytest.mark.parametrize("garbage", [b"\0" * 200, b"\x17\x03\x03\x00\x20" + bytes(32), b"GET / HTTP/1.1\r\n\r\n"])
def test_garbage_is_an_error_and_never_bytes(pair: tuple[TlsPipe, TlsPipe], garbage: bytes) -> None:
    _, server = pair
    server.feed(garbage)
    with pytest.raises(TlsError, match="client"):
        server.take()


def test_a_bit_that_flips_on_the_way_is_an_error(pair: tuple[TlsPipe, TlsPipe]) -> None:
    client, server = pair
    ciphertext = bytearray(client.sealed(b"a page" * 100))
    ciphertext[50] ^= 1
    server.feed(bytes(ciphertext))
    with pytest.raises(TlsError):
        server.take()


def test_the_peers_goodbye_is_an_end(pki: Pki) -> None:
    client, server = new_pair(pki.client(), pki.server())
    shake_hands(client, server)
    with pytest.raises(ssl.SSLWantReadError):  # it would hear the answer
        client._object.unwrap()
    server.feed(client.outgoing)
    assert server.take() == b""
    assert server.ended
