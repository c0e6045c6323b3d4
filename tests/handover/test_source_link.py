"""A source whose offer makes no sense is none, whatever it is made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from lazymem.errors import RemoteProtocolError
from lazymem.handover import messages
from lazymem.handover.arriving import boot_id
from lazymem.handover.channel import Channel
from lazymem.handover.source_link import SourceLink
from lazymem.settings import TcpEndpoint

GOOD = messages.Offer(messages.VERSION, "0a" * 16, 4096, {"name": "qemu"}, boot_id(), "/ram", running=True)


async def _offer(offer: messages.Offer, stream: trio.SocketStream) -> None:
    assert await stream.receive_some(messages.MAGIC_BYTES) == messages.CONTROL
    channel = Channel(stream)
    assert isinstance(await channel.receive(), messages.Hello)
    await channel.send(offer)


@pytest.mark.parametrize(
    "more",
    [{}, {"version": 9}, {"handover": "x" * 32}, {"handover": "../etc"}, {"ram_bytes": -1}, {"ram_path": "a\0b"}],
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
