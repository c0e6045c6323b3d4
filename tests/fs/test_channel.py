"""The channel's bursts, between a made-up kernel and link: what it tells the link, and whom it keeps waiting."""

from __future__ import annotations

import math
import os
import select
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio

from lazymem.errors import LazymemError
from lazymem.fs import channel as module
from lazymem.fs import readers
from lazymem.fs.channel import Channel
from lazymem.fs.channelends import Answer
from lazymem.pages import PAGE_SIZE
from tests.support.fakekernel import FakeKernel, tree_of

PAGES = 8
HELD = b"h" * PAGE_SIZE
FETCHED = b"f" * PAGE_SIZE
LONG = b"l" * PAGE_SIZE
PATIENCE_SECONDS = 60.0


class Peer:
    """RAM and link in one: page 0 is held, page 1 has to be asked for, page 2 can only be read the long way. `calls`:
    what the channel said, in order."""

    best_answer_seconds = 0.0001

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers = True
        self._asked: list[Answer] = []
        self._come, self._comes = socket.socketpair()
        self._come.setblocking(False)

    def fileno(self) -> int:
        return self._come.fileno()

    def answer(self) -> None:
        """What was asked for has come."""
        self._comes.send(b"x")

    def close(self) -> None:
        self._come.close()
        self._comes.close()

    def read_soon(self, offset: int, length: int, done: Answer) -> bytes | bool:
        self.calls.append("read")
        if offset == PAGE_SIZE:
            self._asked.append(done)
            if self.answers:
                self.answer()
            return True
        return HELD if offset == 0 else False

    async def read(self, offset: int, length: int) -> bytes:
        self.calls.append("long")
        return LONG

    async def write(self, offset: int, data: bytes, storing: Callable[[], None]) -> None:
        self.calls.append("write")

    def is_unseen(self, offset: int, length: int) -> bool:
        return False

    def receive_nowait(self) -> bool:
        try:
            self._come.recv(1)
        except BlockingIOError:
            return False
        self.calls.append("answer")
        self._asked.pop(0)(FETCHED)
        return True

    def watch(self) -> None:
        self.calls.append("watch")

    def unwatch(self) -> None:
        self.calls.append("unwatch")

    def settle(self) -> None:
        self.calls.append("settle")


class Polls:
    """As `select.poll`; notes what each look was to wait."""

    def __init__(self, inner: select.poll) -> None:
        self._inner = inner
        self.waits: list[int] = []
        self.register, self.unregister = inner.register, inner.unregister

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        self.waits.append(timeout_ms)
        return self._inner.poll(timeout_ms)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    found = FakeKernel()
    yield found
    found.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.close()


@pytest.fixture
async def channel(kernel: FakeKernel, peer: Peer, nursery: trio.Nursery) -> AsyncIterator[Channel]:
    found = Channel(kernel.descriptor, tree_of(PAGES * PAGE_SIZE), peer, peer)
    nursery.start_soon(found.run)
    yield found
    nursery.cancel_scope.cancel()
    found.close()


@pytest.fixture
def polls(channel: Channel, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Polls:
    found = Polls(select.poll())
    found.register(kernel.descriptor, select.POLLIN)
    monkeypatch.setattr(channel, "_poll", found)
    monkeypatch.setattr(module, "TURN_SECONDS", math.inf)  # however slow this machine is
    monkeypatch.setattr(os, "sched_yield", lambda: pytest.fail("waited on the processor"))
    return found


async def heard(peer: Peer, *calls: str) -> None:
    """Until the link has heard all of these; the burst is then over, since it lets nobody in between."""
    with trio.fail_after(PATIENCE_SECONDS):
        while not set(calls) <= set(peer.calls):  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


async def test_a_read_leaves_the_direct_way_to_the_link_and_everything_else_settles_it(
    channel: Channel, kernel: FakeKernel, peer: Peer
) -> None:
    for offset in (0, PAGE_SIZE, 0):
        kernel.read(offset, PAGE_SIZE)
    await heard(peer, "answer")
    assert peer.calls[0] == "watch"
    assert peer.calls[-1] == "unwatch"
    assert "settle" not in peer.calls, "a READ is no reason"
    assert {kernel.reply().data for _ in range(3)} == {HELD, FETCHED}

    for ask in (kernel.getattr, lambda: kernel.write(0, HELD), lambda: kernel.interrupt(2)):
        peer.calls.clear()
        ask()
        await heard(peer, "unwatch")
        assert [call for call in peer.calls if call != "write"][:2] == ["watch", "settle"]


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("kind", ["long", "write", "library"])
async def test_who_needs_a_task_is_not_kept_waiting_for_what_comes_next(
    channel: Channel, kernel: FakeKernel, peer: Peer, polls: Polls, kind: str, crowded: bool
) -> None:
    """Neither on the processor nor in poll(2), be it that an answer is to come from near, or that waiting has paid."""
    peer.answers = False
    channel._linger = module.MAX_LINGER_SECONDS
    channel._crowded_until = math.inf if crowded else 0.0
    kernel.read(PAGE_SIZE, PAGE_SIZE)
    if kind == "long":
        kernel.read(2 * PAGE_SIZE, PAGE_SIZE)
    elif kind == "write":
        kernel.write(0, HELD)
    else:
        kernel.getattr()
    await heard(peer, "unwatch")
    assert len(polls.waits) == 3, "one for each request, and one that found no more"
    assert polls.waits[-1] == 0
    assert peer.calls.count("unwatch") == 1


@pytest.mark.parametrize(("page", "waits"), [(0, [0, 0]), (1, [0, 1])])
async def test_on_a_crowded_machine_an_answer_from_near_is_slept_for_and_nothing_that_did_not_pay(
    channel: Channel, kernel: FakeKernel, peer: Peer, polls: Polls, page: int, waits: list[int]
) -> None:
    peer.answers = False
    channel._crowded_until = math.inf
    kernel.read(page * PAGE_SIZE, PAGE_SIZE)
    await heard(peer, "unwatch")
    assert polls.waits == waits


async def test_a_reader_killed_before_its_answer_is_ended_and_the_answer_dropped(
    channel: Channel, kernel: FakeKernel, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "is_killed", lambda thread: True)
    peer.answers = False
    unique = kernel.read(PAGE_SIZE, PAGE_SIZE)
    kernel.interrupt(unique)
    await heard(peer, "settle")
    assert (kernel.reply().unique, channel._open) == (unique, {})
    peer.answer()
    last = kernel.read(0, PAGE_SIZE)
    await heard(peer, "answer")
    assert kernel.reply().unique == last, "and not once more for the killed one"


async def test_a_read_that_fails_is_told_so(channel: Channel, kernel: FakeKernel, peer: Peer) -> None:
    peer.answers = False
    kernel.read(PAGE_SIZE, PAGE_SIZE)
    await heard(peer, "read")
    peer._asked.pop()(LazymemError("no"))
    assert kernel.reply().error
    assert not channel._open
