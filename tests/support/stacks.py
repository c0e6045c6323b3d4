"""The whole way in one process, as the mount command puts it together, but for FUSE: store, scheduler, client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from lazymem.fetch.client import Client, connect
from lazymem.fetch.prefetch import prepager
from lazymem.fetch.scheduler import Scheduler
from lazymem.settings import LinkSettings, parse_server
from lazymem.store.cachefolder import open_cache
from lazymem.store.guestram import GuestRam
from lazymem.store.pristine import PristinePages
from lazymem.store.statefolder import open_private_state
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import origin_of

FAST = LinkSettings(backoff_base_seconds=0.01, backoff_cap_seconds=0.05)


class Stack:
    def __init__(self, client: Client, scheduler: Scheduler, ram: GuestRam, pristine: PristinePages) -> None:
        self.client = client
        self.scheduler = scheduler
        self.ram = ram
        self.pristine = pristine


@asynccontextmanager
async def stack(snapshot: BuiltSnapshot, address: str, cache: Path, prefetch: bool = False) -> AsyncIterator[Stack]:
    async with trio.open_nursery() as nursery:
        client = await connect(nursery, parse_server(address), FAST)
        upper = await client.fetch_upper() if client.welcome.hashed else b""
        assert upper == (snapshot.upper if snapshot.manifest else b"")
        origin = origin_of(snapshot)
        folder, state = open_cache(cache, origin), open_private_state(cache, origin)
        pristine = PristinePages(origin, folder, upper, state.written)
        guesses = prepager(pristine.next_missing, origin.pages) if prefetch else None
        scheduler = Scheduler(client, pristine, nursery, prefetcher=guesses)
        ram = GuestRam(pristine, state, scheduler)
        yield Stack(client, scheduler, ram, pristine)
        await scheduler.wait_kept()
        nursery.cancel_scope.cancel()
    await ram.close()
