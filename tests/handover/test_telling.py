"""What has arrived is told: much of it at once, little after a moment, and never twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import trio
import trio.testing

from lazymem.handover.channel import Channel
from lazymem.handover.messages import Arrived, Message, Ready, Receiver
from lazymem.handover.telling import EACH_BYTES, Telling


class Source:
    """Takes words one at a time, once it is `free`."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.free = trio.Event()
        self.free.set()

    async def say(self, message: Message) -> None:
        self.heard.append(message)
        await self.free.wait()


@asynccontextmanager
async def _telling(source: Source) -> AsyncIterator[Telling]:
    telling = Telling(source.say)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(telling.run)
        yield telling
        nursery.cancel_scope.cancel()


async def test_much_at_once_and_little_after_a_moment(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with _telling(source) as telling:
        begun = trio.current_time()
        telling.arrived(EACH_BYTES)
        await trio.testing.wait_all_tasks_blocked()
        assert source.heard == [Arrived(EACH_BYTES)]
        assert trio.current_time() == begun
        telling.arrived(EACH_BYTES + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.heard) == 1
        await trio.sleep(1.0)
        assert source.heard[1:] == [Arrived(EACH_BYTES + 1)]
        await trio.sleep(10.0)
        assert len(source.heard) == 2


async def test_the_end_of_the_state_does_not_cut_a_word_in_two(autojump_clock: trio.testing.MockClock) -> None:
    """A control connection on which half a message was sent is closed, and made again a tenth of a second later."""
    ours, theirs = trio.testing.memory_stream_pair()
    channel = Channel(cast(Any, ours))
    telling = Telling(channel.send)
    carry: Any = ours.send_stream.send_all_hook
    async with trio.open_nursery() as nursery:

        async def cancelled() -> None:
            nursery.cancel_scope.cancel()
            await trio.lowlevel.checkpoint()
            await carry()

        nursery.start_soon(telling.run)
        await trio.testing.wait_all_tasks_blocked()
        telling.arrived(EACH_BYTES)
        ours.send_stream.send_all_hook = cancelled
    await channel.send(Ready())
    receiver = Receiver()
    heard: list[Message] = []
    while len(heard) < 2:
        heard += receiver.feed(bytes(await theirs.receive_some()))
    assert heard == [Arrived(EACH_BYTES), Ready()]


async def test_what_comes_while_the_source_is_told_is_told_in_one_word(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    source.free = trio.Event()
    async with _telling(source) as telling:
        telling.arrived(EACH_BYTES)
        await trio.testing.wait_all_tasks_blocked()
        for count in range(2, 9):
            telling.arrived(count * EACH_BYTES)
        source.free.set()
        await trio.sleep(1.0)
        assert source.heard == [Arrived(EACH_BYTES), Arrived(8 * EACH_BYTES)]
