"""The client against peers over memory streams: what it asks, what it makes of answers, how it survives losses."""

from __future__ import annotations

from lazymem.pages import PageRange
from tests.fetch.conftest import Joined, Network
from tests.support.peer import Peer


async def test_fetch_brings_exactly_the_asked_pages(network: Network, peer: Peer, joined: Joined) -> None:
    client = await network.connect()
    ranges = [PageRange(0, 1), PageRange(5, 100), PageRange(511, 1)]
    fetched = await client.fetch(ranges)
    assert fetched.runs[0].pages == PageRange(0, 1)
    assert joined(fetched.runs) == b"".join(peer.bytes_of(pages) for pages in ranges)
    assert len(peer.fetches) == 1
    client.close()
