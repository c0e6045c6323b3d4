"""The lanes in which frames wait for one client."""

from __future__ import annotations

import trio
import trio.testing
from lazymem_server.output import Lane, Output


async def test_the_urgent_lane_goes_first_and_unsent_counts_until_the_socket_took_it() -> None:
    output = Output()
    output.put(b"b" * 100, Lane.BACKGROUND)
    output.put(b"d" * 10, Lane.DEMAND)
    output.put(b"e" * 10, Lane.DEMAND)
    output.put(b"c", Lane.CONTROL)
    assert output.unsent_bytes == 121
    assert output.take_nowait(15) == b"c" + b"d" * 10
    assert output.unsent_bytes == 121
    output.sent()
    assert output.unsent_bytes == 110
    assert output.take_nowait(64) == b"e" * 10
    output.sent()
    assert output.take_nowait(64) == b"b" * 100, "one frame at least, however large"
    output.sent()
    assert output.unsent_bytes == 0


async def test_waiting_for_room(nursery: trio.Nursery) -> None:
    output = Output()
    output.put(b"x" * 50, Lane.DEMAND)
    woken: list[str] = []

    async def wait() -> None:
        await output.wait_below(40)
        woken.append("room")

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    output.take_nowait(100)
    await trio.testing.wait_all_tasks_blocked()
    assert not woken
    output.sent()
    await trio.testing.wait_all_tasks_blocked()
    assert woken == ["room"]
