"""Which of several servers it is: the first that is ready, and nobody is given up for being slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from lazymem.errors import IdentityError, LazymemError, ServerRefusedError, ServerUnreachableError
from lazymem.fetch import servers
from lazymem.fetch.servers import Servers
from lazymem.fetch.stats import LinkCounters
from lazymem.settings import LinkSettings, ServerAddress, parse_servers
from lazymem.wire.messages import Welcome

A, B, C = parse_servers("a:1,b:1,c:1")
LINK = LinkSettings(next_server_seconds=3, connect_timeout_seconds=10, handshake_timeout_seconds=10)


class World:
    """Who is ready after so many seconds, or fails then. `log`: when who was tried, `open`: sessions that are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **ready: float | tuple[float, LazymemError]) -> None:
        self._ready = ready
        self.log: list[tuple[str, float]] = []
        self.open: list[str] = []
        self.servers = Servers([A, B, C], LINK, LinkCounters(), self._dial)
        monkeypatch.setattr(servers, "open_session", self._open)

    async def _dial(self, address: ServerAddress, link: LinkSettings) -> Any:
        assert link == LINK  # all of its time, whatever the others do
        return address

    async def _open(self, address: Any, *_: object) -> Any:
        name = address.endpoint.host
        self.log.append((name, trio.current_time()))
        found = self._ready[name]
        seconds, maybe_error = found if isinstance(found, tuple) else (found, None)
        await trio.sleep(seconds)
        if maybe_error is not None:
            raise maybe_error
        self.open.append(name)
        welcome = SimpleNamespace(identity=b"same", ram_bytes=4096)
        return SimpleNamespace(welcome=welcome, close=lambda: self.open.remove(name))


WELCOME = cast(Welcome, SimpleNamespace(identity=b"same", ram_bytes=4096, name=""))
REFUSED = ServerRefusedError("no")
GONE = ServerUnreachableError("nobody there")


@pytest.mark.parametrize(
    ("ready", "who", "seconds", "tried"),
    [
        ({"a": 1, "b": 0, "c": 0}, A, 1, [("a", 0)]),
        ({"a": 4, "b": 60, "c": 60}, A, 4, [("a", 0), ("b", 3)]),
        ({"a": 9, "b": (0, GONE), "c": (0, REFUSED)}, A, 9, [("a", 0), ("b", 3), ("c", 3)]),
        ({"a": 60, "b": 60, "c": 2}, C, 8, [("a", 0), ("b", 3), ("c", 6)]),
        ({"a": (1, GONE), "b": (0, IdentityError("other")), "c": 9}, C, 10, [("a", 0), ("b", 1), ("c", 1)]),
        ({"a": (4, GONE), "b": 9, "c": 60}, B, 12, [("a", 0), ("b", 3), ("c", 6)]),
    ],
)
@pytest.mark.parametrize("again", [False, True])
async def test_the_first_that_is_ready(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: object,
    *,
    ready: dict[str, Any],
    who: ServerAddress,
    seconds: float,
    tried: list[tuple[str, float]],
    again: bool,
) -> None:
    world = World(monkeypatch, **ready)
    found = await (world.servers.open_again(WELCOME, None) if again else world.servers.open_first())
    assert (found[1], trio.current_time()) == (who, seconds)
    assert world.log == tried
    assert world.open == [cast(Any, who.endpoint).host]


async def test_nobody_is_ready(monkeypatch: pytest.MonkeyPatch, autojump_clock: object) -> None:
    """All had their time, and the errors stand in the order of the addresses."""
    world = World(monkeypatch, a=(9, GONE), b=(1, REFUSED), c=(2, GONE))
    with pytest.raises(ServerUnreachableError, match=r"a:1: nobody there; b:1: no; c:1: nobody there"):
        await world.servers.open_first()
    assert trio.current_time() == 9


async def test_two_at_once(monkeypatch: pytest.MonkeyPatch, autojump_clock: object) -> None:
    world = World(monkeypatch, a=6, b=3, c=0)
    _, address = await world.servers.open_again(WELCOME, None)
    assert world.open == [cast(Any, address.endpoint).host]


async def test_who_does_not_want_it_any_more_leaves_no_session(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    world = World(monkeypatch, a=6, b=3, c=0)
    for moment in (0, 1, 3, 5.9, 6):
        with trio.move_on_at(trio.current_time() + moment) as scope:
            await world.servers.open_first()
            world.open.clear()
        assert world.open == [], (moment, scope.cancelled_caught)
