"""The channel's READs of a huge page, of which somebody waits for one: what it starts when, and how the rest ends."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio
import trio.testing

from lazymem.errors import LazymemError
from lazymem.fs import readers
from lazymem.fs.asidetime import MOST_SECONDS
from lazymem.fs.channel import Channel
from lazymem.fs.channelends import Answer
from lazymem.fs.readorder import BLOCK_PAGES, MOST_OUT, ReadOrder, Touch
from lazymem.pages import PAGE_SIZE
from tests.support.fakekernel import FakeKernel, tree_of

READ_BYTES = 128 * 1024
READS = BLOCK_PAGES * PAGE_SIZE // READ_BYTES
GUEST = 7
TOUCHED = READS - 2
PATIENCE_SECONDS = 60.0


class Peer:
    """RAM of which nothing is here, its link, and a kernel that knows what the guest touched. `asked`: READs of it that
    were started, by their number in the huge page, in order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.dones: dict[int, Answer] = {}
        self.best_answer_seconds = 0.001
        self.page = TOUCHED * READ_BYTES // PAGE_SIZE + 5

    def read_soon(self, offset: int, length: int, done: Answer) -> bytes | bool:
        number = offset // READ_BYTES
        self.asked.append(number)
        self.dones[number] = done
        return True

    async def read(self, offset: int, length: int) -> bytes:
        return b"l" * length

    async def write(self, offset: int, data: bytes, storing: Callable[[], None]) -> None:
        raise AssertionError("nobody writes")

    def is_unseen(self, offset: int, length: int) -> bool:
        return False

    def fileno(self) -> int:
        return -1

    def receive_nowait(self) -> bool:
        return False

    def watch(self) -> None:
        self.asked.append(-1)

    def unwatch(self) -> None: ...

    def settle(self) -> None: ...

    def maybe_latest(self, thread: int) -> Touch | None:
        return Touch(thread, self.page, self.page + 1) if thread == GUEST else None

    def latest(self) -> list[Touch]:
        return [Touch(GUEST, self.page, self.page + 1)]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    found = FakeKernel()
    yield found
    found.close()


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
async def channel(
    kernel: FakeKernel, peer: Peer, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> AsyncIterator[Channel]:
    """Its time passes where nobody has anything to do: or on a busy machine all that is put aside would be overdue."""
    order = ReadOrder(peer, lambda offset, size: False, lambda: True)
    tree = tree_of(2 * BLOCK_PAGES * PAGE_SIZE)
    found = Channel(kernel.descriptor, tree, peer, peer, maybe_order=order)
    nursery.start_soon(found.run)
    yield found
    nursery.cancel_scope.cancel()
    found.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


async def burst(kernel: FakeKernel, peer: Peer, channel: Channel, thread: int = GUEST) -> list[int]:
    """The kernel reads the huge page, all of which was taken; the requests' numbers."""
    found = [kernel.read(number * READ_BYTES, READ_BYTES, thread) for number in range(READS)]
    await until(lambda: len(channel._open) == READS and len(peer.asked) >= min(MOST_OUT, READS))
    return found


async def test_the_touched_one_is_asked_for_at_once_and_each_answer_lets_one_go(
    channel: Channel, kernel: FakeKernel, peer: Peer
) -> None:
    uniques = await burst(kernel, peer, channel)
    assert TOUCHED in peer.asked[: MOST_OUT + 1]
    assert len(peer.asked) <= MOST_OUT + 1
    answered = []
    while peer.dones:
        number = next(iter(peer.dones))
        before = len(peer.asked)
        peer.dones.pop(number)(bytes([number]) * READ_BYTES)
        answered.append(number)
        assert len(peer.asked) <= before + 1
        reply = kernel.reply()
        assert (reply.unique, reply.data[:1]) == (uniques[number], bytes([number]))
    assert sorted(answered) == list(range(READS))


async def test_of_a_thread_that_nobody_knows_they_are_asked_for_as_they_come(
    channel: Channel, kernel: FakeKernel, peer: Peer
) -> None:
    await burst(kernel, peer, channel, thread=GUEST + 1)
    await until(lambda: len(peer.asked) == READS)
    assert peer.asked == list(range(READS))


async def test_who_is_killed_lets_go_of_what_was_put_aside(
    channel: Channel, kernel: FakeKernel, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "is_killed", lambda thread: True)
    uniques = await burst(kernel, peer, channel)
    for unique in uniques:
        kernel.interrupt(unique)
    await until(lambda: not channel._open)
    assert {(reply.unique, reply.error) for reply in (kernel.reply() for _ in uniques)} == {
        (unique, errno.EINTR) for unique in uniques
    }
    assert not channel._aside


async def test_where_one_of_those_out_is_killed_the_next_goes(
    channel: Channel, kernel: FakeKernel, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "is_killed", lambda thread: True)
    uniques = await burst(kernel, peer, channel)
    before = len(peer.asked)
    out = len(uniques) - len(channel._aside)
    for number in peer.asked[:out]:
        kernel.interrupt(uniques[number])
    await until(lambda: len(channel._open) == READS - out)
    assert len(peer.asked) >= before + min(MOST_OUT, READS - out)


async def test_a_daemon_that_hands_over_answers_them_all(
    channel: Channel, kernel: FakeKernel, peer: Peer, nursery: trio.Nursery
) -> None:
    await burst(kernel, peer, channel)
    nursery.start_soon(channel.drain)
    await until(lambda: len(peer.asked) == READS)
    assert not channel._aside


async def test_what_fails_has_none_of_the_others_wait(channel: Channel, kernel: FakeKernel, peer: Peer) -> None:
    """With a deadline, the last of them would wait for as many of these."""
    await burst(kernel, peer, channel)
    peer.dones[peer.asked[0]](LazymemError("no"))
    assert kernel.reply().error
    assert sorted(peer.asked) == list(range(READS))


async def test_none_is_put_aside_for_long_though_none_that_is_out_ends(
    channel: Channel, kernel: FakeKernel, peer: Peer
) -> None:
    """Somebody whom nobody counts may wait for it."""
    uniques = await burst(kernel, peer, channel)
    assert len(peer.asked) <= MOST_OUT + 1
    begun = trio.current_time()
    await until(lambda: len(peer.asked) == READS)
    assert trio.current_time() - begun < 3 * MOST_SECONDS
    assert not channel._aside
    for number in range(READS):
        peer.dones.pop(number)(bytes([number]) * READ_BYTES)
        assert kernel.reply().unique == uniques[number]
    peer.asked.clear()
    peer.page += 1
    await burst(kernel, peer, channel)  # and so with those that come later
    assert len(peer.asked) <= MOST_OUT + 1
    await until(lambda: len(peer.asked) == READS)


async def test_what_takes_the_long_way_lets_the_next_go_too(channel: Channel, kernel: FakeKernel, peer: Peer) -> None:
    await burst(kernel, peer, channel)
    before = len(peer.asked)
    peer.dones[peer.asked[0]](None)
    await until(lambda: len(peer.asked) == before + 1)
    assert kernel.reply().data == b"l" * READ_BYTES


async def test_nothing_is_put_aside_while_the_link_is_watched(channel: Channel, kernel: FakeKernel, peer: Peer) -> None:
    """An answer of the direct way is given before it is entered: nothing may be started from there."""
    await burst(kernel, peer, channel)
    peer.best_answer_seconds = 0.0001
    kernel.read(0, PAGE_SIZE, GUEST + 1)
    await until(lambda: -1 in peer.asked)
    assert sorted(peer.asked[: peer.asked.index(-1)]) == list(range(READS))


@pytest.mark.parametrize("where", ["puts_aside", "maybe_due"])
async def test_a_bug_in_the_order_costs_nobody_his_page(
    channel: Channel, kernel: FakeKernel, peer: Peer, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put aside is started, and READs go as they come from then on."""
    bugs: list[str] = []

    def bug(*arguments: object, **options: object) -> None:
        bugs.append(where)
        raise ValueError("a bug")

    monkeypatch.setattr(channel._maybe_order, where, bug)
    for number in range(3):
        kernel.read(number * READ_BYTES, READ_BYTES, GUEST)
    await until(lambda: sorted(peer.asked) == [0, 1, 2])
    assert bugs == [where], "it was not asked again"
    kernel.read(4 * READ_BYTES, READ_BYTES, GUEST)
    await until(lambda: peer.asked[-1] == 4)
