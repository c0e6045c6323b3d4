"""A source whose offer makes no sense is none, and one that comes back with something else says what is wrong."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from lazymem.errors import RemoteProtocolError
from lazymem.handover import messages
from lazymem.handover.arriving import boot_id
from lazymem.handover.channel import Channel
from lazymem.handover.source_link import SourceLink
from lazymem.handover.states import Event
from lazymem.settings import TcpEndpoint
from tests.support.certificates import Pki

GOOD = messages.Offer(messages.VERSION, "0a" * 16, 4096, {"name": "qemu"}, boot_id(), "/ram", running=True)


async def _offer(offer: messages.Offer, stream: trio.SocketStream) -> None:
    assert await stream.receive_some(messages.MAGIC_BYTES) == messages.CONTROL
    channel = Channel(stream)
    assert isinstance(await channel.receive(), messages.Hello)
    await channel.send(offer)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"version": 9},
        {"handover": "x" * 32},
        {"handover": "../etc"},
        {"ram_bytes": -1},
        {"ram_path": "a\0b"},
        {"warm_seconds": -1.0},
        {"warm_seconds": messages.MAX_WARM_SECONDS + 1},
    ],
)
async def test_an_offer(more: dict[str, Any]) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, partial(_offer, replace(GOOD, **more)), 0, host="127.0.0.1")
        )
        link = SourceLink(TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1]), lambda _: None)
        if more:
            with pytest.raises(RemoteProtocolError, match="understands"):
                await link.first()
        else:
            assert (await link.first()).handover == link.handover
            await link.drop()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("silent", [True, False])
async def test_a_source_that_goes_while_nobody_listens(silent: bool) -> None:
    """It is silent for too long, or closes; pings until then are nothing."""

    async def serve(stream: trio.SocketStream) -> None:
        await _offer(GOOD, stream)
        await Channel(stream).send(messages.Ping())
        if silent:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        link = SourceLink(TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1]), lambda _: None)
        await link.first()
        with trio.fail_after(60):
            await link.wait_lost(0.2 if silent else 60.0)
        await link.drop()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("boot", "ahead"), [("another boot", 5.0), ("another boot", -5.0), (boot_id(), 0.0)])
async def test_the_clock_of_another_host_is_asked_for(boot: str, ahead: float) -> None:
    """By questions that take some milliseconds each, the first of them far more: the quickest one counts."""
    asked = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal asked
        await _offer(replace(GOOD, boot_id=boot), stream)
        channel = Channel(stream)
        while boot != boot_id():
            assert isinstance(await channel.receive(), messages.Clock)
            told = time.time() + ahead
            asked += 1
            await trio.sleep(2.0 if asked == 1 else 0.0)
            await channel.send(messages.Clock(told))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        link = SourceLink(TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1]), lambda _: None)
        await link.first()
        await link.drop()
        nursery.cancel_scope.cancel()
    assert link.clock_ahead_seconds == pytest.approx(ahead, abs=0.5 if ahead else 0.0)
    assert asked == (5 if ahead else 0)


NO = messages.No("this sender knows nothing of that hand-over", unknown=True)


async def test_a_source_of_the_version_before_is_come_back_to() -> None:
    """This lazymem was exchanged in the middle of a hand-over; a new one is of this version on both sides."""
    heard: list[tuple[int, str]] = []
    back = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        assert await stream.receive_some(messages.MAGIC_BYTES) == messages.CONTROL
        channel = Channel(stream)
        hello = await channel.receive()
        assert isinstance(hello, messages.Hello)
        heard.append((hello.version, hello.handover))
        await channel.send(replace(GOOD, version=hello.version))
        await trio.sleep_forever()

    async def on_event(event: Event, _: object) -> None:
        if event is Event.BACK:
            back.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        endpoint = TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1])
        first = SourceLink(endpoint, lambda _: None)
        await first.first()
        again = SourceLink(endpoint, lambda _: None, GOOD.handover)
        nursery.start_soon(again.run, on_event, lambda _: None)
        with trio.fail_after(60):
            await back.wait()
        for link in (first, again):
            await link.drop()
        nursery.cancel_scope.cancel()
    assert heard == [(messages.VERSION, ""), (messages.COMES_BACK_VERSION, GOOD.handover)]


async def test_what_a_source_says_against_us_is_said_once_and_kept() -> None:
    """Until it is something else, or nobody answers any more."""
    answers: list[messages.Message | bytes] = [NO, NO, b"\xff\xff\xff\xff", GOOD]
    said: list[str] = []
    seen: list[tuple[str, bool]] = []

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(messages.MAGIC_BYTES)
        channel = Channel(stream)
        await channel.receive()
        answer = answers.pop(0)
        await (stream.send_all(answer) if isinstance(answer, bytes) else channel.send(answer))
        await trio.sleep_forever()

    async def on_event(event: Event, _: object) -> None:
        assert event in (Event.LOST, Event.BACK)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        address = TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1])
        link = SourceLink(address, said.append, GOOD.handover)
        for _ in range(4):
            await link._try_again(on_event)
            seen.append((link.objection, link.let_go))
        assert link.connected
        await link.drop()
        nursery.cancel_scope.cancel()
    nonsense = "the other side sends a message of 4294967295 bytes"
    assert seen == [(NO.text, True), (NO.text, True), (nonsense, True), ("", True)]
    assert said == [f"{address}: {NO.text}", f"{address}: {nonsense}"]
    await link._try_again(on_event)
    assert (link.tries_begun, link.tries_ended, link.objection) == (5, 5, "")


async def test_a_source_without_the_tls_that_was_asked_for_is_told_of(tmp_path: Path) -> None:
    """Somebody answers there: that the guest is away for good is not known."""
    said: list[str] = []

    async def nonsense(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.receive_some()

    async def on_event(event: Event, _: object) -> None:
        raise AssertionError(event)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, nonsense, 0, host="127.0.0.1"))
        address = TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1])
        link = SourceLink(address, said.append, GOOD.handover, Pki(tmp_path / "pki").client())
        for _ in range(2):
            await link._try_again(on_event)
        nursery.cancel_scope.cancel()
    assert said == [link.objection]
    assert str(address) in said[0]
    assert "TLS" in said[0]


async def test_what_a_load_reads_is_heard_of_when_the_guest_stands() -> None:
    """And what comes behind it is heard, too."""
    heard: list[object] = []
    both = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(messages.MAGIC_BYTES)
        channel = Channel(stream)
        await channel.receive()
        await channel.send(GOOD)
        await channel.send(messages.Stopped([202, 203]))
        await channel.send(messages.Given(1.0, 7))
        await trio.sleep_forever()

    async def on_event(event: Event, _: object) -> None:
        heard.append(event)
        both.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        link = SourceLink(TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1]), lambda _: None)
        await link.first()
        nursery.start_soon(link.run, on_event, heard.append)
        with trio.fail_after(60):
            await both.wait()
        await link.drop()
        nursery.cancel_scope.cancel()
    assert heard == [[202, 203], Event.GIVEN]
