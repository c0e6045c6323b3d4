"""A side's events: whoever is outside waits when there are too many; nothing of ours is lost for that."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lazymem.handover.eventqueue import EventQueue


async def test_a_full_queue_takes_what_is_ours_and_lets_others_wait() -> None:
    events = EventQueue[str](2)
    async with trio.open_nursery() as nursery:
        for word in ("1", "2", "3"):
            nursery.start_soon(events.put, word)
            await trio.testing.wait_all_tasks_blocked()
        events.put_now("interrupted")
        events.put_now("interrupted")
        taken = [await events.take() for _ in range(4)]
        assert taken == ["1", "2", "interrupted", "3"]
        events.put_now("interrupted")
        assert await events.take() == "interrupted"
        with trio.move_on_after(0) as scope:
            await events.take()
        assert scope.cancelled_caught


async def test_what_is_ours_gives_nobody_else_room() -> None:
    events = EventQueue[int](1)
    events.put_now(1)
    await events.put(2)
    assert [await events.take(), await events.take()] == [1, 2]
    await events.put(3)
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
        await events.put(4)
