"""The Nth call to the disk or the network fails, for every N until none fails: of a mount's start, its page fetches,
the guest's write-backs, and a reconnect. Store, scheduler, client and server are the real ones, over real files and
sockets; only the kernel's FUSE is left out. After SQLite's `do_ioerr_test`.

Each time: no wrong byte, no acknowledged write lost (neither for this daemon nor for a next one over the same folders),
no hang, and nothing but our own errors, which end with the fault.

LAZYMEM_SWEEP=wide fails each call of the disk, of which else every second or fifth does, and also several in a row.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, serve

from lazymem.errors import LazymemError, StoreError
from lazymem.fetch.client import connect
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PAGE_SIZE
from lazymem.settings import LinkSettings, ServerAddress, parse_endpoint
from lazymem.store import room
from lazymem.store.cachefolder import open_cache
from lazymem.store.folders import read_record
from lazymem.store.guestram import GuestRam
from lazymem.store.pristine import PristinePages
from lazymem.store.statefiles import LOST_KEY, META_NAME
from lazymem.store.statefolder import open_state
from tests.support.faults import Faults
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import opened_store, origin_of

MANY = 400
"""More calls than the work below makes."""

LINK = LinkSettings(backoff_base_seconds=0.001, backoff_cap_seconds=0.01)

WIDE = os.environ.get("LAZYMEM_SWEEP") == "wide"

IN_A_ROW = (0, 1, 5) if WIDE else (0,)

R = TypeVar("R")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("sweep") / "web", pages=300)


class Guest:
    """Reads and writes, tries again what failed, and knows what must be there."""

    def __init__(self, snapshot: BuiltSnapshot) -> None:
        self.model = bytearray(snapshot.ram)
        self.errors: list[LazymemError] = []

    async def again(self, step: Callable[[], Awaitable[R]]) -> R:
        """The step, and once more for each error, of which there are a few."""
        while True:
            try:
                return await step()
            except LazymemError as error:
                self.errors.append(error)
                assert len(self.errors) < 20, self.errors

    async def once(self, step: Callable[[], Awaitable[None]]) -> None:
        """A sync that failed is not made up for by another one: the kernel tells of lost pages once."""
        try:
            await step()
        except LazymemError as error:
            self.errors.append(error)

    async def read(self, ram: GuestRam, page: int, count: int) -> None:
        offset, length = page * PAGE_SIZE, count * PAGE_SIZE
        assert await self.again(lambda: ram.read(offset, length)) == self.model[offset : offset + length]

    async def write(self, ram: GuestRam, offset: int, data: bytes) -> None:
        await self.again(lambda: ram.write(offset, data))
        self.model[offset : offset + len(data)] = data


@asynccontextmanager
async def mounted(guest: Guest, address: str, snapshot: BuiltSnapshot, folder: Path) -> AsyncIterator[GuestRam]:
    """As `lazymem-mount` puts it together; whatever fails at the start is tried again, as its user would."""
    origin = origin_of(snapshot)
    async with trio.open_nursery() as nursery:
        where = ServerAddress(parse_endpoint(address))
        client = await guest.again(lambda: connect(nursery, where, LINK))

        async def open_all() -> tuple[GuestRam, Scheduler]:
            cache = await trio.to_thread.run_sync(open_cache, folder / "cache", origin)
            try:
                state = await trio.to_thread.run_sync(open_state, folder / "state", origin)
                try:
                    upper = cache.digests.maybe_upper(origin.root or b"") or await client.fetch_upper()
                    pristine = PristinePages(origin, cache, upper, state.written)
                except BaseException:
                    state.close()
                    raise
            except BaseException:
                cache.close()
                raise
            scheduler = Scheduler(client, pristine, nursery)
            return GuestRam(pristine, state, scheduler), scheduler

        ram, scheduler = await guest.again(open_all)
        yield ram
        await scheduler.wait_kept()
        client.close()
        nursery.cancel_scope.cancel()
    try:
        await ram.close()
    except LazymemError as error:
        guest.errors.append(error)


async def work(guest: Guest, ram: GuestRam, cut: Callable[[], None]) -> None:
    """A page fetch, one of many pages, write-backs of whole and half pages, a reconnect, and all of it once more."""
    await guest.read(ram, 5, 1)
    await guest.read(ram, 250, 20)
    await guest.write(ram, 7 * PAGE_SIZE, b"w" * (2 * PAGE_SIZE))
    await guest.write(ram, 40 * PAGE_SIZE + 10, b"half" * PAGE_SIZE)
    cut()
    await guest.write(ram, 7 * PAGE_SIZE + 100, b"again")
    await guest.read(ram, 38, 8)
    await guest.once(ram.sync)
    await guest.write(ram, 260 * PAGE_SIZE - 3, b"border")
    await guest.read(ram, 0, 64)


KINDS = {
    "connection reset": (errno.ECONNRESET, False, 1),
    "connection reset behind what was sent": (errno.ECONNRESET, True, 1),
    "disk error": (errno.EIO, False, 1 if WIDE else 2),
    "disk full": (errno.ENOSPC, False, 1 if WIDE else 5),
}
"""The error; whether it comes late; every how many calls one fails."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("more", IN_A_ROW)
@pytest.mark.parametrize("kind", KINDS)
async def test_each_call_fails_once(
    snapshot: BuiltSnapshot,
    tmp_path: Path,
    kind: str,
    more: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    error, late, every = KINDS[kind]
    limits = ServerLimits(goodbye_seconds=0)
    async with trio.open_nursery() as nursery:
        serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits))
        for number in itertools.count(step=every):
            assert number < MANY
            folder = tmp_path / str(number)
            folder.mkdir()
            guest = Guest(snapshot)
            with pytest.MonkeyPatch.context() as patch, trio.fail_after(30):
                patch.setattr(room, "RETRY_SECONDS", 0.001)
                with Faults(patch, folder, number, error, late=late, more=more) as faults:
                    async with mounted(guest, serving.addresses[0], snapshot, folder) as ram:
                        await work(guest, ram, partial(cut_all, serving))
            await check(guest, faults, snapshot, folder)
            shutil.rmtree(folder)
            if not faults.failed:
                assert not guest.errors, guest.errors
                assert number > 20
                break
        nursery.cancel_scope.cancel()


def cut_all(serving: Serving) -> None:
    for session in serving._sessions:
        session.cut()


async def check(guest: Guest, faults: Faults, snapshot: BuiltSnapshot, folder: Path) -> None:
    assert all(str(error).isprintable() for error in guest.errors)
    """The next daemon's view. After a sync that failed it reads the same, and calls nothing synced any more."""
    lost = LOST_KEY in (read_record(folder / "state" / META_NAME) or {})
    with pytest.raises(StoreError, match="refused written pages before") if lost else nullcontext():
        async with opened_store(snapshot, folder / "cache", folder / "state") as store:
            found = await store.ram.read(0, len(guest.model))
    size = PAGE_SIZE
    wrong = [at // size for at in range(0, len(found), size) if found[at : at + size] != guest.model[at : at + size]]
    assert not wrong, f"{faults.failed}: {guest.errors}"
