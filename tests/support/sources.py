"""Every page source that the contract suite runs over. A new source adds one entry to `SOURCES`, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio
from lazymem_server.serving import serve

from lazymem.fetch.client import connect
from lazymem.settings import ServerAddress, parse_endpoint
from lazymem.store.layers import CountLayer, DelayLayer, ErrorLayer, Layer
from lazymem.store.source import PageSource
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import local_source

OpenSource = Callable[[BuiltSnapshot], AbstractAsyncContextManager[PageSource]]


@asynccontextmanager
async def local(snapshot: BuiltSnapshot) -> AsyncIterator[PageSource]:
    source = local_source(snapshot)
    try:
        yield source
    finally:
        source.close()


def layered(*layers: Callable[[PageSource], PageSource]) -> OpenSource:
    @asynccontextmanager
    async def opened(snapshot: BuiltSnapshot) -> AsyncIterator[PageSource]:
        async with local(snapshot) as source:
            for layer in layers:
                source = layer(source)
            yield source

    return opened


@asynccontextmanager
async def served(snapshot: BuiltSnapshot) -> AsyncIterator[PageSource]:
    """A server and a client of it, over a loopback socket."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"]))
            client = await connect(nursery, ServerAddress(parse_endpoint(serving.addresses[0])))
            yield client
            client.close()
            nursery.cancel_scope.cancel()


SOURCES: dict[str, OpenSource] = {
    "local": local,
    "layer": layered(Layer),
    "delay": layered(lambda source: DelayLayer(source, 0.001)),
    "layers": layered(CountLayer, lambda source: ErrorLayer(source, range(0)), lambda source: DelayLayer(source, 0)),
    "served": served,
}
