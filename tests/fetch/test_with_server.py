"""The whole way once, in one process: store over scheduler over client over sockets to the real server."""

from __future__ import annotations

import itertools
import logging
import random
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.serving import Serving, serve

from lazymem.errors import ServerRefusedError
from lazymem.fetch.client import connect
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import parse_server
from lazymem.store.guestram import GuestRam
from lazymem.wire.messages import PublishedFile
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stacks import stack

PAGES = 1000


@pytest.fixture(params=[True, False], ids=["hashed", "unhashed"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", PAGES, hashed=request.param)


async def compare(ram: GuestRam, snapshot: BuiltSnapshot, seed: int, reads: int) -> None:
    rng = random.Random(seed)
    for _ in range(reads):
        pages = rng.choice([1, 1, 1, 32])
        start = rng.randrange(PAGES - pages)
        got = await ram.read(start * PAGE_SIZE, pages * PAGE_SIZE)
        assert got == snapshot.ram[start * PAGE_SIZE : (start + pages) * PAGE_SIZE]


@pytest.mark.parametrize("prefetch", [True, False])
async def test_many_readers_see_the_snapshot(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery, prefetch: bool
) -> None:
    serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"]))
    async with stack(snapshot, serving.addresses[0], tmp_path / "cache", prefetch) as whole:
        async with trio.open_nursery() as readers:
            for seed in range(8):
                readers.start_soon(compare, whole.ram, snapshot, seed, 40)
        assert await whole.client.read_file(PublishedFile.VMSTATE, 1 << 20) == snapshot.vmstate
        assert await whole.client.maybe_sums() == (snapshot.sums if snapshot.manifest else None)
        if prefetch:
            await whole.scheduler.prefetch([PageRange(0, PAGES)])
            await whole.scheduler.wait_kept()
            while whole.pristine.held_pages < PAGES:  # what was on its way when `prefetch` looked
                await whole.scheduler.wait_kept()
                await trio.lowlevel.checkpoint()
    nursery.cancel_scope.cancel()


async def test_server_that_restarts_again_and_again_costs_no_reader_anything(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut off in the middle, and told to go in order, by turns."""
    caplog.set_level(logging.ERROR)
    snapshot = make_snapshot(tmp_path / "snapshot", PAGES)
    address = f"unix:{tmp_path}/socket"

    async def restarts() -> None:
        for turn in itertools.count():
            async with trio.open_nursery() as inner:
                serving: Serving = await inner.start(partial(serve, [snapshot.folder], [address]))
                started.set()
                await connected.wait()  # of a server that is gone, a first connection is an error
                await trio.sleep(0.05)
                if enough.is_set():
                    await trio.sleep_forever()
                if turn % 2:
                    serving.stop("restart")
                else:
                    inner.cancel_scope.cancel()

    started, connected, enough = trio.Event(), trio.Event(), trio.Event()
    nursery.start_soon(restarts)
    await started.wait()
    async with stack(snapshot, address, tmp_path / "cache", prefetch=False) as whole:
        connected.set()
        while whole.client.statistics().reconnects < 4:
            async with trio.open_nursery() as readers:
                for seed in range(4):
                    readers.start_soon(compare, whole.ram, snapshot, seed, 20)
            for start in range(0, PAGES, 100):
                whole.pristine.drop(PageRange(start, 100))
        enough.set()
        await compare(whole.ram, snapshot, 99, 1)
    nursery.cancel_scope.cancel()


async def test_no_such_snapshot_is_said_by_the_server(tmp_path: Path, nursery: trio.Nursery) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", 8)
    serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"]))
    with pytest.raises(ServerRefusedError, match="other"):
        await connect(nursery, parse_server(f"{serving.addresses[0]}/other"))
    await connect(nursery, parse_server(f"{serving.addresses[0]}/snapshot"))
    nursery.cancel_scope.cancel()
