"""Every page source that the contract suite runs over. A new source adds one entry to `SOURCES`, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

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


SOURCES: dict[str, OpenSource] = {
    "local": local,
    "layer": layered(Layer),
    "delay": layered(lambda source: DelayLayer(source, 0.001)),
    "layers": layered(CountLayer, lambda source: ErrorLayer(source, range(0)), lambda source: DelayLayer(source, 0)),
}
