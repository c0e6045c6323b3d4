"""Puts a whole store together over a snapshot folder, as the mount command does, and takes it apart again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lazymem.snapshot.manifest import DIGESTS_NAME, RAM_NAME
from lazymem.store.cachefolder import CacheFolder, open_cache
from lazymem.store.directdemand import DirectDemand
from lazymem.store.guestram import GuestRam
from lazymem.store.layers import CountLayer
from lazymem.store.localsource import LocalSource
from lazymem.store.origin import RamOrigin
from lazymem.store.pristine import PristinePages
from lazymem.store.source import PageSource
from lazymem.store.statefiles import StateFolder
from lazymem.store.statefolder import open_private_state, open_state
from tests.support.snapshots import BuiltSnapshot

Over = Callable[[PageSource], PageSource]


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A store and its parts."""

    ram: GuestRam
    pristine: PristinePages
    cache: CacheFolder
    state: StateFolder | None
    source: CountLayer
    demand: DirectDemand


def origin_of(snapshot: BuiltSnapshot) -> RamOrigin:
    return RamOrigin(snapshot.identity, len(snapshot.ram), snapshot.root)


def local_source(snapshot: BuiltSnapshot) -> LocalSource:
    folder = snapshot.folder
    return LocalSource(folder / RAM_NAME, folder / DIGESTS_NAME if snapshot.manifest else None)


def build_store(
    snapshot: BuiltSnapshot,
    cache: Path,
    source: PageSource,
    state: Path | None = None,
    *,
    template: bool = False,
) -> OpenStore:
    """A store of `snapshot` that fetches from `source`; a private state folder when `state` is None."""
    origin = origin_of(snapshot)
    folder = open_cache(cache, origin)
    run = None if template else open_private_state(cache, origin) if state is None else open_state(state, origin)
    pristine = PristinePages(origin, folder, snapshot.upper, run.written if run else None)
    counted = CountLayer(source)
    demand = DirectDemand(counted, pristine)
    return OpenStore(GuestRam(pristine, run, demand), pristine, folder, run, counted, demand)


@asynccontextmanager
async def opened_store(
    snapshot: BuiltSnapshot,
    cache: Path,
    state: Path | None = None,
    *,
    over: Over = lambda source: source,
    template: bool = False,
) -> AsyncIterator[OpenStore]:
    """A store over the snapshot's own folder, with the layers that `over` puts on; closed at the end."""
    source = local_source(snapshot)
    store = build_store(snapshot, cache, over(source), state, template=template)
    try:
        yield store
    finally:
        await store.ram.close()
        source.close()
