"""The direct way of a fault: asked and answered while nothing else runs, over real sockets to the real server. What it
leaves undone until later is done in the end, and whatever comes in between finds the fault on the common way."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, serve

from lazymem.errors import LazymemError
from lazymem.pages import PAGE_SIZE
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stacks import Stack, stack

PAGES = 600
PATIENCE_SECONDS = 60.0


@pytest.fixture(params=[True, False], ids=["hashed", "unhashed"])
def hashed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", PAGES)


@pytest.fixture
async def serving(snapshot: BuiltSnapshot, nursery: trio.Nursery) -> Serving:
    found: Serving = await nursery.start(
        partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=ServerLimits(goodbye_seconds=0))
    )
    return found


@pytest.fixture
async def whole(snapshot: BuiltSnapshot, serving: Serving, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(snapshot, serving.addresses[0], tmp_path / "cache") as found:
        await found.ram.read(data_pages(snapshot)[-1] * PAGE_SIZE, PAGE_SIZE)
        await found.ram.read(data_pages(snapshot)[0] * PAGE_SIZE, PAGE_SIZE)  # the leaf of the tests' pages is here
        await found.scheduler.wait_kept()
        yield found


def data_pages(snapshot: BuiltSnapshot) -> list[int]:
    """Those that are not zero: of a zero page nobody asks for the bytes."""
    return [page for page in range(PAGES) if any(bytes_of(snapshot, page))]


def bytes_of(snapshot: BuiltSnapshot, page: int) -> bytes:
    return snapshot.ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


class Fault:
    """A READ of one page as the channel makes it, watched from the start."""

    def __init__(self, whole: Stack, page: int) -> None:
        self.whole = whole
        self.answers: list[bytes | LazymemError | None] = []
        self.entered_pages = self.open_requests = -1
        self.arrived = trio.Event()
        whole.scheduler.watch()
        self.begun = whole.ram.read_soon(page * PAGE_SIZE, PAGE_SIZE, self._done)

    def _done(self, answer: bytes | memoryview | LazymemError | None) -> None:
        self.entered_pages = len(self.whole.scheduler._table)
        self.open_requests = self.whole.client.statistics().open_requests
        self.answers.append(bytes(answer) if isinstance(answer, memoryview) else answer)
        self.arrived.set()

    def look(self) -> None:
        """On the processor, until the answer is here."""
        scheduler = self.whole.scheduler
        while not self.answers:
            assert select.select([scheduler.fileno()], [], [], PATIENCE_SECONDS)[0]
            scheduler.receive_nowait()


async def assert_right_in_the_end(whole: Stack, snapshot: BuiltSnapshot, fault: Fault, page: int) -> None:
    """The reader of `page` has its bytes, on whichever way."""
    with trio.fail_after(PATIENCE_SECONDS):
        if fault.begun is True:
            await fault.arrived.wait()
            assert fault.answers == [bytes_of(snapshot, page)]
        else:
            assert await whole.ram.read(page * PAGE_SIZE, PAGE_SIZE) == bytes_of(snapshot, page)


async def test_an_answer_is_given_before_anything_is_entered(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page = data_pages(snapshot)[1]
    before = whole.scheduler.statistics()
    fault = Fault(whole, page)
    fault.look()
    assert fault.begun is True
    assert fault.answers == [bytes_of(snapshot, page)]
    assert (fault.entered_pages, fault.open_requests) == (0, 0)
    whole.scheduler.unwatch()
    after = whole.scheduler.statistics()
    assert (after.demand_faults, after.demand_pages) == (before.demand_faults + 1, before.demand_pages + 1)
    assert after.unkept_pages == 1
    assert after.link is not None
    assert before.link is not None
    assert after.link.wire_received_bytes > before.link.wire_received_bytes + PAGE_SIZE
    assert sum(count for _, count in after.wait_octaves) == after.demand_faults
    await whole.scheduler.wait_kept()
    assert whole.ram.is_at_hand(page * PAGE_SIZE, PAGE_SIZE)
    assert whole.ram.read_soon(page * PAGE_SIZE, PAGE_SIZE, fault._done) == bytes_of(snapshot, page)


async def test_faults_in_a_row_are_all_kept(whole: Stack, snapshot: BuiltSnapshot) -> None:
    pages = data_pages(snapshot)[1:40]
    for page in pages:
        fault = Fault(whole, page)
        fault.look()
        assert fault.answers == [bytes_of(snapshot, page)]
    whole.scheduler.unwatch()
    await whole.scheduler.wait_kept()
    assert all(whole.ram.is_at_hand(page * PAGE_SIZE, PAGE_SIZE) for page in pages)
    assert not len(whole.scheduler._table)
    assert not whole.scheduler.demands_wait


async def test_a_page_that_was_just_given_is_not_asked_for_again(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page = data_pages(snapshot)[1]
    fault = Fault(whole, page)
    fault.look()
    asked = whole.scheduler.statistics().demand_pages
    again = Fault(whole, page)
    assert again.begun is False
    whole.scheduler.unwatch()
    assert await whole.ram.read(page * PAGE_SIZE, PAGE_SIZE) == bytes_of(snapshot, page)
    assert whole.scheduler.statistics().demand_pages == asked + 1, "counted when it was entered, and only once"


async def test_a_fault_that_others_come_before_is_answered_on_the_common_way(
    whole: Stack, snapshot: BuiltSnapshot
) -> None:
    page, other = data_pages(snapshot)[1:3]
    fault = Fault(whole, page)
    second = Fault(whole, other)  # as a second thread of the guest would
    assert second.begun is True
    second.look()
    while not fault.answers:
        fault.look()
    assert fault.answers + second.answers == [bytes_of(snapshot, page), bytes_of(snapshot, other)]
    whole.scheduler.unwatch()
    await whole.scheduler.wait_kept()
    assert not len(whole.scheduler._table)


async def test_readers_join_a_fault_that_is_not_answered_yet(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page = data_pages(snapshot)[1]
    before = whole.scheduler.statistics().demand_pages
    fault = Fault(whole, page)
    whole.scheduler.unwatch()
    with trio.fail_after(PATIENCE_SECONDS):
        assert await whole.ram.read(page * PAGE_SIZE, PAGE_SIZE) == bytes_of(snapshot, page)
        await fault.arrived.wait()
    assert fault.answers == [bytes_of(snapshot, page)]
    assert whole.scheduler.statistics().demand_pages == before + 1


async def test_a_write_that_ends_before_the_answer_counts(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page = data_pages(snapshot)[1]
    fault = Fault(whole, page)
    whole.scheduler.unwatch()
    await whole.ram.write(page * PAGE_SIZE, b"w" * PAGE_SIZE)
    with trio.fail_after(PATIENCE_SECONDS):
        await fault.arrived.wait()
    assert fault.answers[0] is None or fault.answers[0] == bytes_of(snapshot, page)
    assert await whole.ram.read(page * PAGE_SIZE, PAGE_SIZE) == b"w" * PAGE_SIZE


async def test_a_connection_lost_under_a_fault_costs_time_only(
    whole: Stack, serving: Serving, snapshot: BuiltSnapshot
) -> None:
    pages = data_pages(snapshot)[1:30]
    for page in pages:
        fault = Fault(whole, page)
        for session in serving._sessions:
            session.cut()
        if page % 2:
            whole.scheduler.receive_nowait()
        whole.scheduler.unwatch()
        await assert_right_in_the_end(whole, snapshot, fault, page)
    await whole.scheduler.wait_kept()
    assert not len(whole.scheduler._table)


@pytest.mark.parametrize("at", [0, 5, 20, 24, 2000, 4000])
async def test_wrong_bytes_are_never_given(
    whole: Stack, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A flipped bit in the frame's head or in the page: the common way refuses it, and asks again."""
    page = data_pages(snapshot)[1]
    session = whole.client._demand._session
    assert session is not None
    transport = session._transport
    honest, flips = transport.receive_nowait, [at]

    def flipped() -> bytes | None:
        data = honest()
        if data is None or not flips:
            return data
        where = flips.pop()
        return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]

    monkeypatch.setattr(transport, "receive_nowait", flipped, raising=True)
    fault = Fault(whole, page)
    while flips:
        assert select.select([whole.scheduler.fileno()], [], [], PATIENCE_SECONDS)[0]
        whole.scheduler.receive_nowait()
    assert fault.answers == []
    whole.scheduler.unwatch()
    with trio.fail_after(PATIENCE_SECONDS):
        await fault.arrived.wait()
    assert fault.answers == [bytes_of(snapshot, page)]


@pytest.mark.parametrize("cuts", [[1], [24], [4000], [0], [0, 24, 100], [4119]], ids=str)
async def test_an_answer_in_pieces_is_put_together_on_the_common_way(
    whole: Stack, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch, cuts: list[int]
) -> None:
    """As TCP may cut it, or TLS, where what came may be a part of a record, that is, nothing yet."""
    page, other = data_pages(snapshot)[1:3]
    session = whole.client._demand._session
    assert session is not None
    honest = session._transport.receive_nowait
    pieces: list[bytes | None] = []

    def cut() -> bytes | None:
        if cuts:
            data = honest()
            assert data is not None
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                pieces.append(data[start:end] or None)
            cuts.clear()
        return pieces.pop(0) if pieces else honest()

    monkeypatch.setattr(session._transport, "receive_nowait", cut)
    fault = Fault(whole, page)
    assert select.select([whole.scheduler.fileno()], [], [], PATIENCE_SECONDS)[0]
    while not fault.answers:
        whole.scheduler.receive_nowait()
    assert fault.answers == [bytes_of(snapshot, page)]
    second = Fault(whole, other)
    second.look()
    assert (second.answers, second.entered_pages) == ([bytes_of(snapshot, other)], 1), "the first one only is entered"
    whole.scheduler.unwatch()
    await whole.scheduler.wait_kept()
    assert whole.client.statistics().reconnects == 0


async def test_two_answers_at_once_are_told_apart(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page, other = data_pages(snapshot)[1:3]
    session = whole.client._demand._session
    assert session is not None
    received = session._received_bytes
    fault, second = Fault(whole, page), Fault(whole, other)
    sock = session._transport._socket  # type: ignore[attr-defined]
    both = 2 * (PAGE_SIZE + len(session._asked_head))
    assert select.select([sock], [], [], PATIENCE_SECONDS)[0]
    while len(sock.recv(2 * both, socket.MSG_PEEK)) < both:
        os.sched_yield()
    while not (fault.answers and second.answers):
        whole.scheduler.receive_nowait()
    assert fault.answers + second.answers == [bytes_of(snapshot, page), bytes_of(snapshot, other)]
    assert session._received_bytes == received + both
    whole.scheduler.unwatch()
    await whole.scheduler.wait_kept()
    assert not len(whole.scheduler._table)


async def test_a_goodbye_under_a_fault_costs_time_only(whole: Stack, serving: Serving, snapshot: BuiltSnapshot) -> None:
    for page in data_pages(snapshot)[1:12]:
        fault = Fault(whole, page)
        for session in list(serving._sessions):
            session.stop("for the test")
        if page % 2 and fault.begun is True and whole.scheduler.fileno() >= 0:
            assert select.select([whole.scheduler.fileno()], [], [], PATIENCE_SECONDS)[0]
            whole.scheduler.receive_nowait()
        whole.scheduler.unwatch()
        await assert_right_in_the_end(whole, snapshot, fault, page)
    await whole.scheduler.wait_kept()
    assert not len(whole.scheduler._table)
    assert not whole.scheduler.demands_wait


async def test_a_reader_that_breaks_breaks_nothing_for_others(whole: Stack, snapshot: BuiltSnapshot) -> None:
    page, other = data_pages(snapshot)[1:3]

    def broken(answer: object) -> None:
        raise RuntimeError("a bug")

    whole.scheduler.watch()
    assert whole.ram.read_soon(page * PAGE_SIZE, PAGE_SIZE, broken) is True
    assert select.select([whole.scheduler.fileno()], [], [], PATIENCE_SECONDS)[0]
    with pytest.raises(RuntimeError, match="a bug"):
        whole.scheduler.receive_nowait()
    fault = Fault(whole, other)
    fault.look()
    assert fault.answers == [bytes_of(snapshot, other)]
    whole.scheduler.unwatch()
    await whole.scheduler.wait_kept()
    assert whole.ram.is_at_hand(page * PAGE_SIZE, PAGE_SIZE)
    assert not whole.scheduler.demands_wait
    assert whole.client.statistics().reconnects == 0


async def test_what_cannot_go_directly_goes_the_common_way(hashed: bool, tmp_path: Path, nursery: trio.Nursery) -> None:
    """The first fault of a leaf brings digests; an unhashed snapshot's answers do always; zeros are no bytes."""
    snapshot = make_snapshot(tmp_path / "other", PAGES, hashed=hashed)
    serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"]))
    async with stack(snapshot, serving.addresses[0], tmp_path / "otherscache") as whole:
        assert await whole.ram.read(0, PAGE_SIZE) == bytes_of(snapshot, 0)
        for page in (1, PAGES - 1, PAGES // 2, *range(2, PAGES, 37)):
            fault = Fault(whole, page)
            if fault.begun is True:
                fault.look()
                assert fault.answers == [bytes_of(snapshot, page)]
            elif fault.begun is not False:
                assert fault.begun == bytes_of(snapshot, page)
            whole.scheduler.unwatch()
            assert await whole.ram.read(page * PAGE_SIZE, PAGE_SIZE) == bytes_of(snapshot, page)
        await whole.scheduler.wait_kept()
        assert not len(whole.scheduler._table)
