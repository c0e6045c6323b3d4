"""Places for handshakes: each for so long, and a crowd is its own host's trouble."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from lazymem_server.handshakes import Handshakes


async def hold(handshakes: Handshakes, host: str, ended: list[str], name: str) -> None:
    with handshakes.begun(host) as handshake:
        await trio.sleep_forever()
    assert handshake.scope.cancelled_caught
    ended.append(f"{name} evicted" if handshake.evicted else f"{name} late")


async def start(nursery: trio.Nursery, handshakes: Handshakes, host: str, ended: list[str], name: str) -> None:
    nursery.start_soon(hold, handshakes, host, ended, name)
    await trio.testing.wait_all_tasks_blocked()


async def test_time_is_short(autojump_clock: trio.testing.MockClock) -> None:
    handshakes, ended = Handshakes(4, 10.0), list[str]()
    began = trio.current_time()
    await hold(handshakes, "a", ended, "one")
    assert ended == ["one late"]
    assert trio.current_time() - began == pytest.approx(10.0)
    assert len(handshakes) == 0


async def test_a_crowded_host_loses_its_oldest(autojump_clock: trio.testing.MockClock) -> None:
    handshakes, ended = Handshakes(4, 1000.0), list[str]()
    async with trio.open_nursery() as nursery:
        await start(nursery, handshakes, "honest", ended, "honest")
        for name in ("1", "2", "3", "4", "5"):
            await start(nursery, handshakes, "crowd", ended, name)
        assert ended == ["1 evicted", "2 evicted"], "the honest one, older than all, keeps its place"
        await start(nursery, handshakes, "another", ended, "another")
        assert ended == ["1 evicted", "2 evicted", "3 evicted"]
        assert len(handshakes) == 4
        nursery.cancel_scope.cancel()


async def test_strangers_in_any_number_lose_to_who_comes(autojump_clock: trio.testing.MockClock) -> None:
    handshakes, ended = Handshakes(4, 1000.0), list[str]()
    async with trio.open_nursery() as nursery:
        for host in "abcdefgh":
            await start(nursery, handshakes, host, ended, host)
        with handshakes.begun("honest") as handshake:
            await trio.sleep(0.1)
        assert not handshake.scope.cancelled_caught
        assert len(ended) == 5
        nursery.cancel_scope.cancel()


async def test_places_come_back(autojump_clock: trio.testing.MockClock) -> None:
    handshakes = Handshakes(2, 10.0)
    for _ in range(10):
        with handshakes.begun("a"):
            await trio.sleep(1)
    with pytest.raises(ValueError, match="ours"), handshakes.begun("a"):
        raise ValueError("ours")
    assert len(handshakes) == 0


async def test_all_end_at_once(autojump_clock: trio.testing.MockClock) -> None:
    handshakes, ended = Handshakes(9, 1000.0), list[str]()
    async with trio.open_nursery() as nursery:
        for host in "abc":
            await start(nursery, handshakes, host, ended, host)
        handshakes.end_all()
    assert sorted(ended) == ["a evicted", "b evicted", "c evicted"]
