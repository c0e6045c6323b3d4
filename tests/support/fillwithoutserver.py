"""A filling process whose server is away when it begins, and comes back: run by a test, in a process of its own."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import msgspec
import trio
from lazymem_server.serving import serve

from lazymem.cli.fillprocess import FillOrder, FillProcess
from lazymem.cli.mountfill import fill
from lazymem.fetch.client import connect
from lazymem.settings import LinkSettings, MountSettings, parse_server
from tests.support.snapshots import make_snapshot

PAGES = 300


def main(folder: Path) -> None:
    snapshot = make_snapshot(folder / "snapshot", PAGES)
    link = LinkSettings(backoff_base_seconds=0.01, backoff_cap_seconds=0.05)
    server = parse_server(f"unix:{folder}/socket")
    settings = MountSettings(servers=(server,), mountpoint=folder, cache_dir=folder / "cache", link=link)
    process = FillProcess(partial(fill, settings))

    async def hear() -> bool:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve, [snapshot.folder], [str(server)]))
                client = await connect(nursery, server, link)
                nursery.cancel_scope.cancel()
            welcome = msgspec.msgpack.encode(client.welcome)
            assert snapshot.root is not None
            order = FillOrder(snapshot.identity, len(snapshot.ram), snapshot.root, True, template=True, welcome=welcome)
            process.prepare(order)
            process.begin(PAGES, (), None)
            await trio.sleep(0.3)  # it asks meanwhile: that is what is tested, not waited for
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve, [snapshot.folder], [str(server)]))
                done = await process.run(lambda report: None)
                nursery.cancel_scope.cancel()
        return done

    try:
        assert trio.run(hear), process.latest
        assert process.latest.held_pages == PAGES
    finally:
        process.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
