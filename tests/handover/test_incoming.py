"""A device state on its way in: counted against what its source says, and not waited for for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from lazymem.handover import incoming
from lazymem.handover.channel import SILENCE_SECONDS
from lazymem.handover.incoming import Incoming

BringIn = Callable[[Any, Path, Callable[[int], None], Callable[[int], None]], Awaitable[None]]


async def _say(_: object) -> None: ...


@asynccontextmanager
async def bringing(found: Incoming, monkeypatch: pytest.MonkeyPatch, bring_in: BringIn) -> AsyncIterator[None]:
    """While `bring_in` stands in for what reads the connection."""
    monkeypatch.setattr(incoming, "bring_in", bring_in)
    stream, other = memory_stream_pair()
    async with stream, other, trio.open_nursery() as nursery:
        nursery.start_soon(found.bring, cast(Any, stream), Path("/emulator"), lambda _: None)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def seven_bytes(_: object, __: Path, received: Callable[[int], None], arrived: Callable[[int], None]) -> None:
    """As `relay.bring_in`."""
    arrived(7)
    received(7)
    await trio.sleep_forever()


def _is_whole(found: Incoming) -> bool:
    return found._whole.is_set()


@pytest.mark.parametrize("told_first", [True, False])
@pytest.mark.parametrize(("sent", "is_right"), [(7, True), (0, True), (8, False)])
async def test_it_is_whole_where_the_source_does_not_say_otherwise(
    monkeypatch: pytest.MonkeyPatch, sent: int, *, is_right: bool, told_first: bool
) -> None:
    failed: list[str] = []
    found = Incoming(_say, failed.append)

    if told_first:
        assert found.expect(sent) is None
    async with bringing(found, monkeypatch, seven_bytes):
        difference = "of 8 bytes of device state 7 arrived"
        if told_first:
            assert (_is_whole(found), failed) == (is_right, [] if is_right else [difference])
        else:
            assert _is_whole(found)
            assert found.expect(sent) == (None if is_right else difference)


async def test_what_was_sent_is_not_forgotten_when_the_source_is_back_and_does_not_say_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says "given" to whoever is connected once more, and not how much it was."""
    failed: list[str] = []
    found = Incoming(_say, failed.append)

    assert found.expect(8) is None
    assert found.expect(0) is None
    async with bringing(found, monkeypatch, seven_bytes):
        assert (_is_whole(found), failed) == (False, ["of 8 bytes of device state 7 arrived"])


@pytest.mark.parametrize("comes", [True, False])
async def test_a_rest_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, *, comes: bool
) -> None:
    """But as long as there is some of it now and then."""
    failed: list[str] = []
    found = Incoming(_say, failed.append)
    last = 40.0

    async def bring_in(_: object, __: Path, received: Callable[[int], None], arrived: Callable[[int], None]) -> None:
        for count in range(1, int(last / 8) + 1):
            await trio.sleep(8.0)
            arrived(count)
        if comes:
            received(5)
        await trio.sleep_forever()

    began = trio.current_time()
    async with bringing(found, monkeypatch, bring_in):
        await found.await_rest()
        assert bool(failed) is not comes
        assert comes or last <= trio.current_time() - began <= last + 2 * SILENCE_SECONDS + 0.1
