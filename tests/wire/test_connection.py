"""Both ends of a connection, without sockets: who may say what when, and whose fault it is."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire import limits
from lazymem.wire.codec import encode
from lazymem.wire.connection import (
    CONNECTION_CLOSED,
    NEED_DATA,
    ClientConnection,
    Connection,
    ServerConnection,
    negotiate,
)
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Capability,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    FileStored,
    Goodbye,
    Hello,
    Level,
    Message,
    Packed,
    Pages,
    Ping,
    Pong,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.states import State
from tests.support.wiremessages import CLIENT_MESSAGES, SERVER_MESSAGES, WELCOME

RAW = b"x" * PAGE_SIZE
UNHASHED = replace(WELCOME, hashed=False, manifest=b"")


def carry(sender: Connection, message: Message, receiver: Connection) -> None:
    """`message` is sent and arrives as it is."""
    receiver.receive_data(sender.send(message))
    assert receiver.next_event() == message
    assert receiver.next_event() is NEED_DATA


def opened(welcome: Welcome = WELCOME) -> tuple[ClientConnection, ServerConnection]:
    client, server = ClientConnection(), ServerConnection()
    carry(client, Hello("web"), server)
    carry(server, welcome, client)
    return client, server


def refused(receiver: Connection, message: Message, match: str) -> None:
    """The peer sends `message` although its own connection would not; it is refused, now and ever after."""
    receiver.receive_data(encode(message))
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=match):
            receiver.next_event()
    assert receiver.their_state is State.CLOSED


def not_sent(sender: Connection, message: Message, match: str) -> None:
    with pytest.raises(LocalProtocolError, match=match):
        sender.send(message)


# ---- greeting


def test_greeting() -> None:
    client, server = opened()
    assert client.welcome == server.welcome == WELCOME
    assert client.our_state is client.their_state is server.our_state is server.their_state is State.OPEN


def test_nothing_but_a_hello_starts() -> None:
    not_sent(ClientConnection(), Fetch(1, (PageRange(0, 1),)), "FETCH from a client that is idle")
    not_sent(ServerConnection(), WELCOME, "WELCOME from a server that is idle")
    refused(ServerConnection(), Ping(1), "PING from a client that is idle")
    refused(ClientConnection(), WELCOME, "WELCOME from a server that is idle")


def test_no_second_greeting() -> None:
    client, server = opened()
    not_sent(client, Hello("web"), "HELLO")
    not_sent(server, WELCOME, "WELCOME")
    refused(client, WELCOME, "WELCOME")
    refused(server, Hello("web"), "HELLO")


def test_no_request_before_the_welcome() -> None:
    client, server = ClientConnection(), ServerConnection()
    carry(client, Hello("web"), server)
    not_sent(client, Fetch(1, (PageRange(0, 1),)), "greeted")
    refused(server, Fetch(1, (PageRange(0, 1),)), "greeted")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2"),
        ({"name": "other"}, "'other'"),
        ({"capabilities": Capability.ZSTD}, "capability"),
    ],
)
def test_a_welcome_that_does_not_fit_the_hello(change: dict[str, object], match: str) -> None:
    client = ClientConnection()
    client.send(Hello("web", capabilities=Capability.NONE))
    good = replace(WELCOME, capabilities=Capability.NONE)
    refused(client, replace(good, **change), match)


def test_an_empty_name_takes_any() -> None:
    client = ClientConnection()
    client.send(Hello(""))
    client.receive_data(encode(WELCOME))
    assert client.next_event() == WELCOME


@pytest.mark.parametrize(("low", "high", "expected"), [(1, 1, 1), (1, 9, 1), (2, 9, None)])
def test_negotiation(low: int, high: int, expected: int | None) -> None:
    assert negotiate(Hello("web", low, high)) == expected


def test_a_refusal_before_any_hello_reaches_the_client() -> None:
    """A server that is full says so at once; the client's HELLO crosses it."""
    client, server = ClientConnection(), ServerConnection()
    client.send(Hello("web"))
    carry(server, Error(0, ErrorCode.BUSY, "full"), client)
    assert client.their_state is client.our_state is State.CLOSED
    not_sent(server, Error(0, ErrorCode.BUSY, "again"), "closed")


# ---- requests and answers


def test_a_request_is_open_until_its_final_frame() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 2), PageRange(8, 1))), server)
    assert client.open_requests == server.open_requests == 1
    carry(server, Pages(1, PageRange(0, 1), Encoding.RAW, RAW), client)
    carry(server, Pages(1, PageRange(1, 1), Encoding.ZERO), client)
    assert client.is_open(1)
    carry(server, Pages(1, PageRange(8, 1), Encoding.ZERO, final=True), client)
    assert client.open_requests == server.open_requests == 0
    carry(client, Fetch(1, (PageRange(0, 2),)), server)


def test_answers_come_in_any_order_of_requests() -> None:
    client, server = opened()
    for request_id in (1, 2, 3):
        carry(client, Fetch(request_id, (PageRange(request_id, 2),)), server)
    carry(server, Pages(3, PageRange(3, 1), Encoding.ZERO), client)
    carry(server, Pages(1, PageRange(1, 2), Encoding.ZERO, final=True), client)
    carry(server, Pages(3, PageRange(4, 1), Encoding.ZERO, final=True), client)
    carry(server, Error(2, ErrorCode.IO_ERROR, "disk"), client)
    assert client.open_requests == 0


FETCH = Fetch(1, (PageRange(4, 2), PageRange(300, 1)), FetchFlag.WANT_DIGESTS)

WRONG_ANSWERS: list[tuple[Fetch | FetchDigests | ReadFile, list[Message]]] = [
    (FETCH, [Pages(2, PageRange(4, 1), Encoding.ZERO)]),  # another id
    (FETCH, [Pages(1, PageRange(5, 1), Encoding.ZERO)]),  # not from the beginning
    (FETCH, [Pages(1, PageRange(4, 3), Encoding.ZERO)]),  # more than asked for
    (FETCH, [Pages(1, PageRange(4, 1), Encoding.ZERO), Pages(1, PageRange(4, 1), Encoding.ZERO)]),  # twice
    (FETCH, [Pages(1, PageRange(4, 2), Encoding.ZERO, final=True)]),  # final too early
    (FETCH, [Pages(1, PageRange(4, 2), Encoding.ZERO), Pages(1, PageRange(300, 1), Encoding.ZERO)]),  # not final
    (FETCH, [Pages(1, PageRange(4, 1), Encoding.RAW, RAW, bytes(16))]),  # page digests of a hashed one
    (FETCH, [Digests(1, Level.UPPER, 0, bytes(16))]),
    (FETCH, [Digests(1, Level.LEAF, 0, bytes(16), final=True)]),
    (FETCH, [Digests(1, Level.LEAF, 2, bytes(16))]),  # not touched
    (FETCH, [Digests(1, Level.LEAF, 0, bytes(16)), Digests(1, Level.LEAF, 0, bytes(16))]),  # twice
    (FETCH, [Digests(1, Level.LEAF, 1, bytes(16)), Digests(1, Level.LEAF, 0, bytes(16))]),
    (replace(FETCH, flags=FetchFlag.NONE), [Digests(1, Level.LEAF, 0, bytes(16))]),  # not asked for
    (FETCH, [FileData(1, b"")]),
    (FETCH, [Cancelled(1)]),
    (FetchDigests(1, Level.LEAF, 1, 2), [Digests(1, Level.LEAF, 0, bytes(16))]),
    (FetchDigests(1, Level.LEAF, 1, 2), [Digests(1, Level.UPPER, 1, bytes(16))]),
    (FetchDigests(1, Level.LEAF, 1, 2), [Digests(1, Level.LEAF, 1, bytes(16), final=True)]),
    (FetchDigests(1, Level.UPPER, 1, 2), [Digests(1, Level.UPPER, 1, bytes(48), final=True)]),
    (FetchDigests(1, Level.UPPER, 1, 2), [Digests(1, Level.UPPER, 1, bytes(32))]),
    (FetchDigests(1, Level.UPPER, 1, 2), [Pages(1, PageRange(1, 1), Encoding.ZERO)]),
    (ReadFile(1, PublishedFile.VMSTATE, 0, 5), [FileData(1, bytes(6))]),
    (ReadFile(1, PublishedFile.VMSTATE, 0, 5), [Digests(1, Level.UPPER, 1, bytes(32))]),
    (ReadFile(1, PublishedFile.VMSTATE, 0, 5), [FileData(1, bytes(5)), FileData(1, bytes(5))]),
]


@pytest.mark.parametrize(("request_", "answers"), WRONG_ANSWERS)
def test_wrong_answers_are_neither_sent_nor_taken(
    request_: Fetch | FetchDigests | ReadFile, answers: list[Message]
) -> None:
    client, server = opened()
    carry(client, request_, server)
    for answer in answers[:-1]:
        carry(server, answer, client)
    not_sent(server, answers[-1], "refused to send")
    refused(client, answers[-1], "the peer sent")


def test_unhashed_pages_need_their_digests() -> None:
    client, server = opened(UNHASHED)
    carry(client, Fetch(1, (PageRange(0, 3),)), server)
    carry(server, Pages(1, PageRange(0, 1), Encoding.RAW, RAW, bytes(16)), client)
    carry(server, Pages(1, PageRange(1, 1), Encoding.ZERO), client)
    not_sent(server, Pages(1, PageRange(2, 1), Encoding.RAW, RAW, final=True), "without their digests")
    refused(client, Pages(1, PageRange(2, 1), Encoding.RAW, RAW, final=True), "without their digests")


TOO_MUCH = [
    (Fetch(1, (PageRange(1020, 5),)), "page 1025 of 1024"),
    (Fetch(1, (PageRange(0, 513),)), "513 pages"),
    (Fetch(1, tuple(PageRange(2 * at, 1) for at in range(9))), "9 ranges"),
    (FetchDigests(1, Level.LEAF, 3, 2), "4 leaves"),
    (FetchDigests(1, Level.UPPER, 0, 5), "4 leaves"),
]


@pytest.mark.parametrize(("message", "match"), TOO_MUCH)
def test_the_servers_limits_hold_for_both_ends(message: Message, match: str) -> None:
    client, server = opened()
    not_sent(client, message, match)
    refused(server, message, match)


PACKS = replace(WELCOME, capabilities=Capability.ZSTD | Capability.PACKED)
PACKED_FETCH = Fetch(1, (PageRange(2, 2), PageRange(7, 1), PageRange(9, 3)), FetchFlag.PACKED)


def test_packed_answers_go_over_the_ends_of_ranges() -> None:
    client, server = opened(PACKS)
    carry(client, PACKED_FETCH, server)
    carry(server, Packed(1, 2, 1, Encoding.RAW, RAW), client)
    not_sent(server, Packed(1, 4, 1, Encoding.RAW, RAW), "not where the answer stands")
    carry(server, Packed(1, 3, 3, Encoding.RAW, RAW * 3), client)  # 3, 7 and 9
    not_sent(server, Packed(1, 10, 3, Encoding.RAW, RAW * 3, final=True), "more than were asked for")
    not_sent(server, Packed(1, 10, 2, Encoding.RAW, RAW * 2), "final mark")
    carry(server, Pages(1, PageRange(10, 1), Encoding.ZERO), client)
    carry(server, Packed(1, 11, 1, Encoding.RAW, RAW, final=True), client)
    assert not client.open_requests
    assert not server.open_requests
    not_sent(server, Packed(1, 11, 1, Encoding.RAW, RAW, final=True), "not open")


def test_a_packed_answer_to_who_does_not_allow_it() -> None:
    client, server = opened(PACKS)
    carry(client, replace(PACKED_FETCH, flags=FetchFlag.NONE), server)
    packed = Packed(1, 2, 1, Encoding.RAW, RAW)
    not_sent(server, packed, "does not allow it")
    refused(client, packed, "does not allow it")


@pytest.mark.parametrize("welcome", [WELCOME, replace(PACKS, hashed=False, manifest=b"")])
def test_packed_answers_are_asked_only_of_a_server_that_gives_them(welcome: Welcome) -> None:
    client, server = opened(welcome)
    not_sent(client, PACKED_FETCH, "where none are given")
    refused(server, PACKED_FETCH, "where none are given")


STORE = StoreFile(7, PublishedFile.WORKING_SET, 0, 3, b"set")


def test_a_working_set_goes_to_a_server_that_takes_one() -> None:
    client, server = opened(replace(WELCOME, capabilities=Capability.ZSTD | Capability.LEARN))
    carry(client, STORE, server)
    not_sent(server, FileData(7, b"x"), "FileData for a STORE_FILE")
    carry(server, FileStored(7), client)
    assert not client.open_requests
    assert not server.open_requests
    carry(client, STORE, server)
    carry(server, Error(7, ErrorCode.NOT_WANTED, "somebody was first"), client)
    not_sent(server, FileStored(7), "not open")


def test_no_working_set_for_a_server_that_takes_none() -> None:
    client, server = opened()
    not_sent(client, STORE, "none is taken")
    refused(server, STORE, "none is taken")


def test_a_server_learns_only_from_clients_that_know_of_it() -> None:
    server = ServerConnection()
    known = Capability.ZSTD | Capability.LEARN
    assert server.capabilities(known) == Capability.ZSTD
    assert server.capabilities(known, learns=True) == known
    assert server.capabilities(Capability.ZSTD, learns=True) == Capability.ZSTD


def test_too_many_open_requests() -> None:
    client, server = opened()
    for request_id in range(1, 5):
        carry(client, Fetch(request_id, (PageRange(0, 1),)), server)
    not_sent(client, Fetch(5, (PageRange(0, 1),)), "more than the 4")
    carry(server, Pages(2, PageRange(0, 1), Encoding.ZERO, final=True), client)
    carry(client, Fetch(5, (PageRange(0, 1),)), server)
    refused(server, Fetch(6, (PageRange(0, 1),)), "more than the 4")


def test_an_id_in_use() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    not_sent(client, ReadFile(1, PublishedFile.VMSTATE, 0, 1), "id 1, which is open")
    refused(server, ReadFile(1, PublishedFile.VMSTATE, 0, 1), "id 1, which is open")


def test_no_digests_of_an_unhashed_snapshot() -> None:
    client, server = opened(UNHASHED)
    not_sent(client, FetchDigests(1, Level.UPPER, 0, 1), "does not have")
    refused(server, FetchDigests(1, Level.UPPER, 0, 1), "does not have")


@pytest.mark.parametrize("digests", [bytes(DIGEST_BYTES), bytes(DIGEST_BYTES * LEAF_PAGES)])
def test_leaves_of_an_unhashed_snapshot_whose_server_tells_them(digests: bytes) -> None:
    client, server = opened(replace(UNHASHED, capabilities=Capability.VOUCH))
    carry(client, FetchDigests(1, Level.LEAF, 0, 1), server)
    carry(server, Digests(1, Level.LEAF, 0, digests, final=True), client)
    not_sent(client, FetchDigests(2, Level.UPPER, 0, 1), "does not have")
    refused(server, FetchDigests(2, Level.UPPER, 0, 1), "does not have")


def test_a_hashed_snapshots_server_says_nothing_of_vouching() -> None:
    server = ServerConnection()
    every = Capability.ZSTD | Capability.PACKED | Capability.LEARN | Capability.VOUCH
    assert Capability.VOUCH not in server.capabilities(every)
    assert Capability.VOUCH in server.capabilities(every, vouches=True)
    assert Capability.VOUCH not in server.capabilities(Capability.ZSTD, vouches=True)


# ---- cancel


def test_cancel() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 3),)), server)
    crossing = server.send(Pages(1, PageRange(0, 1), Encoding.ZERO))
    carry(client, Cancel(1), server)
    client.receive_data(crossing)
    assert isinstance(client.next_event(), Pages)
    carry(server, Cancelled(1), client)
    assert client.open_requests == server.open_requests == 0
    not_sent(server, Pages(1, PageRange(1, 1), Encoding.ZERO), "not open")


def test_cancel_that_crosses_the_last_answer() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    last = server.send(Pages(1, PageRange(0, 1), Encoding.ZERO, final=True))
    carry(client, Cancel(1), server)
    client.receive_data(last)
    assert isinstance(client.next_event(), Pages)
    assert client.open_requests == 0
    not_sent(server, Cancelled(1), "not open")


def test_cancel_of_what_is_not_open_or_twice() -> None:
    client, server = opened()
    not_sent(client, Cancel(1), "not open")
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    carry(client, Cancel(1), server)
    not_sent(client, Cancel(1), "cancelled already")


def test_a_full_answer_may_still_follow_a_cancel() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    carry(client, Cancel(1), server)
    carry(server, Pages(1, PageRange(0, 1), Encoding.ZERO, final=True), client)
    assert client.open_requests == 0


# ---- pings, goodbye, end


def test_pings_in_both_directions() -> None:
    client, server = opened()
    carry(client, Ping(7), server)
    carry(server, Ping(7), client)
    carry(server, Pong(7), client)
    carry(client, Pong(7), server)
    not_sent(client, Pong(7), "PONG without a PING")
    refused(server, Pong(7), "PONG without a PING")


def test_pings_are_bounded() -> None:
    client, server = opened()
    for number in range(1, limits.MAX_PINGS + 1):
        carry(client, Ping(number), server)
    not_sent(client, Ping(99), "unanswered")
    refused(server, Ping(99), "unanswered")


def test_goodbye_of_the_client() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 2),)), server)
    carry(client, Goodbye("done"), server)
    not_sent(client, Fetch(2, (PageRange(0, 2),)), "leaving")
    carry(server, Pages(1, PageRange(0, 1), Encoding.ZERO), client)
    carry(client, Cancel(1), server)
    carry(server, Cancelled(1), client)
    refused(server, Fetch(2, (PageRange(0, 2),)), "leaving")


def test_goodbye_of_the_server_lets_crossing_requests_be_answered() -> None:
    client, server = opened()
    goodbye = server.send(Goodbye("maintenance"))
    carry(client, Fetch(1, (PageRange(0, 2),)), server)
    client.receive_data(goodbye)
    assert client.next_event() == Goodbye("maintenance")
    carry(server, Error(1, ErrorCode.SHUTTING_DOWN, "maintenance"), client)
    not_sent(server, Goodbye(""), "leaving")


def test_goodbyes_that_cross() -> None:
    client, server = opened()
    ours, theirs = client.send(Goodbye("a")), server.send(Goodbye("b"))
    server.receive_data(ours)
    client.receive_data(theirs)
    assert (server.next_event(), client.next_event()) == (Goodbye("a"), Goodbye("b"))
    carry(client, Ping(1), server)


def test_a_fatal_error_ends_both_directions() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 2),)), server)
    carry(server, Error(0, ErrorCode.BAD_REQUEST, "nonsense"), client)
    not_sent(client, Ping(1), "closed")
    not_sent(server, Pages(1, PageRange(0, 2), Encoding.ZERO, final=True), "closed")


def test_end_of_stream() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    client.receive_data(server.send(Pages(1, PageRange(0, 1), Encoding.ZERO, final=True)))
    client.receive_data(b"")
    assert isinstance(client.next_event(), Pages)
    for _ in range(2):
        assert client.next_event() is CONNECTION_CLOSED
    assert not client.cut_off
    with pytest.raises(LocalProtocolError, match="after the end"):
        client.receive_data(b"x")


def test_end_of_stream_in_the_middle_of_a_frame() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 1),)), server)
    client.receive_data(server.send(Pages(1, PageRange(0, 1), Encoding.RAW, RAW, final=True))[:-1])
    assert client.next_event() is NEED_DATA
    client.receive_data(b"")
    assert client.next_event() is CONNECTION_CLOSED
    assert client.cut_off


def test_a_refused_send_changes_nothing() -> None:
    client, server = opened()
    carry(client, Fetch(1, (PageRange(0, 2),)), server)
    not_sent(server, Pages(1, PageRange(0, 2), Encoding.ZERO, final=False), "final mark")
    carry(server, Pages(1, PageRange(0, 2), Encoding.ZERO, final=True), client)


def drain(end: Connection) -> None:
    """Take all events; a peer's mistake ends them."""
    with contextlib.suppress(RemoteProtocolError):
        while end.next_event() not in (NEED_DATA, CONNECTION_CLOSED):
            pass


@given(messages=st.lists(st.one_of(CLIENT_MESSAGES, SERVER_MESSAGES), max_size=6), after_greeting=st.booleans())
def test_any_messages_in_any_order_raise_protocol_errors_only(messages: list[Message], after_greeting: bool) -> None:
    client, server = opened() if after_greeting else (ClientConnection(), ServerConnection())
    for message in messages:
        for end in (client, server):
            end.receive_data(encode(message))
            drain(end)
            with contextlib.suppress(LocalProtocolError):
                end.send(message)


@given(data=st.binary(max_size=200))
def test_random_bytes_after_the_greeting(data: bytes) -> None:
    for end in opened():
        end.receive_data(data)
        drain(end)


def lone(page: int = 3, count: int = 1, request_id: int = 5) -> bytes:
    return encode(Fetch(request_id, (PageRange(page, count),)))


def test_a_lone_fetch_is_told_and_not_noted() -> None:
    _, server = opened()
    for _ in range(2):
        assert server.lone_fetch(lone()) == (5, 0, 3, 1)
    assert server.open_requests == 0
    server.receive_data(lone())
    assert isinstance(server.next_event(), Fetch)
    assert server.lone_fetch(lone(request_id=6)) == (6, 0, 3, 1)


def test_what_the_common_way_refuses_is_no_lone_fetch() -> None:
    last = WELCOME.ram_bytes // PAGE_SIZE - 1
    _, server = opened()
    assert server.lone_fetch(lone(last)) == (5, 0, last, 1)
    assert server.lone_fetch(lone(last + 1)) is None
    assert server.lone_fetch(lone(last, 2)) is None
    assert server.lone_fetch(lone((1 << 34) - 1)) is None
    assert server.lone_fetch(lone(0, WELCOME.limits.max_request_pages + 1)) is None
    server.receive_data(lone(request_id=5))
    assert server.lone_fetch(lone(request_id=6)) is None, "something was received before it"
    server.next_event()
    assert server.lone_fetch(lone(request_id=5)) is None, "the id is in use"
    for number in range(100, 99 + WELCOME.limits.max_requests):
        server.receive_data(lone(request_id=number))
        assert isinstance(server.next_event(), Fetch)
    assert server.lone_fetch(lone(request_id=6)) is None, "too many are open"


def test_no_lone_fetch_before_the_welcome_or_after_a_goodbye() -> None:
    assert ServerConnection().lone_fetch(lone()) is None
    client, server = opened()
    carry(client, Goodbye("x"), server)
    assert server.lone_fetch(lone()) is None
    _, server = opened()
    server.send(Goodbye("x"))
    assert server.lone_fetch(lone()) is None
    _, server = opened()
    server.receive_data(b"\xff" * 100)
    with pytest.raises(RemoteProtocolError):
        server.next_event()
    assert server.lone_fetch(lone()) is None


def test_a_lone_answer_comes_before_anything_else_of_its_request() -> None:
    """Digests that came before it go with it, and it would be refused without them."""
    for digests_first in (False, True):
        client, server = opened()
        fetch = Fetch(5, (PageRange(3, 1),), FetchFlag.WANT_DIGESTS)
        data = client.send_lone(fetch)
        assert data is not None
        server.receive_data(data)
        assert server.next_event() == fetch
        if digests_first:
            carry(server, Digests(5, Level.LEAF, 0, bytes(LEAF_PAGES * DIGEST_BYTES)), client)
        answer = server.send(Pages(5, PageRange(3, 1), Encoding.RAW, RAW, final=True))
        assert client.lone_answer(answer) == (None if digests_first else (5, 3, 1, RAW))
        assert client.open_requests == digests_first
        assert client.lone_answer(answer) is None
