"""Who comes to the one address of a hand-over, and must not keep its receiver out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio
from lazymem_server.listeners import Listeners, parse_listen

from lazymem.cli import handoverserver
from lazymem.cli.handoverserver import HandoverServer
from lazymem.handover import messages
from lazymem.handover.channel import Channel, Stream, dial
from lazymem.handover.receivers import Receivers
from lazymem.handover.states import Event
from lazymem.settings import TlsSettings, parse_endpoint
from tests.support.certificates import Pki


class Door:
    handover = "ab" * 16

    def admit(self, hello: messages.Hello, *, occupied: bool) -> messages.Message | None:
        return messages.No("heard")

    async def offer(self) -> messages.Offer:
        raise AssertionError("nobody is let in here")

    def arrived(self, stream_bytes: int) -> None:
        raise AssertionError("nobody sends a state here")

    async def warm(self, stream: Stream) -> None:
        raise AssertionError("nor gets so far")


async def _put(event: Event, channel: Channel | None, what: object) -> None:
    raise AssertionError(event)


async def _hears(address: str, tls: TlsSettings) -> tuple[Stream, messages.Message]:
    """What whoever has that certificate is told; he stays, and says no more."""
    stream = await dial(parse_endpoint(address), messages.CONTROL, tls)
    channel = Channel(stream)
    await channel.send(messages.Hello(messages.VERSION, "another host"))
    return stream, await channel.receive()


async def test_who_may_not_take_the_guest_takes_no_receivers_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoverserver, "_MAX_CONNECTIONS", 2)
    monkeypatch.setattr(handoverserver, "_MAX_REFUSED", 3)
    monkeypatch.setattr(handoverserver, "_REFUSED_SECONDS", 60.0)
    pki = Pki(tmp_path / "pki")
    with Listeners() as listeners:
        listeners.open([parse_listen("127.0.0.1:0")])
        server = HandoverServer(listeners, pki.server(), ["host-b"])
        server.receivers = Receivers(Door(), _put)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            with trio.fail_after(60):
                stay = [await _hears(server.address, pki.client("host-z")) for _ in range(3)]
                assert {answer for _, answer in stay} == {messages.No("host-z may not take this guest")}
                dropped = await dial(parse_endpoint(server.address), messages.CONTROL, pki.client("host-z"))
                with suppress(trio.BrokenResourceError):  # a reset is an end, too
                    assert await dropped.receive_some() == b""
                last, answer = await _hears(server.address, pki.client())
                assert answer == messages.No("heard")
                for stream in (*(stream for stream, _ in stay), dropped, last):
                    await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()
