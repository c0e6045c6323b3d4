"""A running guest's RAM, published: nothing is served before it stands, nothing is vouched for that changed since."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.listeners import Listeners, parse_listen

from lazymem.cli.handoverserver import HandoverServer
from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, page_digest
from lazymem.errors import RamFileError, VerificationError
from lazymem.fetch.client import connect
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import parse_server
from lazymem.snapshot import liveram
from lazymem.snapshot.liveram import UNTOLD, LiveRam, Served

PAGES = 64
NAME = "00" * 16


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(b"".join(bytes([number]) * PAGE_SIZE for number in range(PAGES)))
    (tmp_path / "vmstate").write_bytes(b"of somebody else")
    return path


def test_what_lies_beside_it_is_not_its_own(ram: Path) -> None:
    with LiveRam(ram, bytes(32)) as live:
        assert (live.vmstate.size_bytes, live.working_set.size_bytes, live.hashed) == (0, 0, False)
        assert live.identity == bytes(32)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RamFileError):
        LiveRam(tmp_path / "none", bytes(32))


def test_what_changes_before_it_stands_is_fine_and_after_is_not(ram: Path) -> None:
    live = LiveRam(ram, bytes(32))
    with live:
        os.truncate(ram, PAGES * PAGE_SIZE)
        with ram.open("r+b") as file:
            file.write(b"new")
        signature = live.freeze()
        assert bytes(live.read(PageRange(0, 1))[0].data or b"").startswith(b"new")
        assert live.is_as(signature)
        with ram.open("r+b") as file:
            file.write(b"too late")
        os.utime(ram, ns=(1, 1))
        assert not live.is_as(signature)
        with pytest.raises(VerificationError):
            live.read(PageRange(0, 1))


async def test_requests_wait_until_it_is_served(ram: Path) -> None:
    """First demands, then guesses; a client that connected before has to do nothing for it."""
    with Listeners() as listeners:
        listeners.open([parse_listen("127.0.0.1:0")])
        server = HandoverServer(listeners)
        live = LiveRam(ram, bytes(32))
        server.publish(NAME, live)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            client = await connect(nursery, parse_server(f"{server.address}/{NAME}"))
            done: list[str] = []

            async def fetch(word: str, *, background: bool) -> None:
                found = await client.fetch([PageRange(2, 1)], background=background)
                assert bytes(found.runs[0].data or b"") == bytes([2]) * PAGE_SIZE
                done.append(word)

            for served, expected in (
                (Served.NOTHING, []),
                (Served.DEMANDS, ["demand"]),
                (Served.ALL, ["demand", "guess"]),
            ):
                if served is Served.NOTHING:
                    nursery.start_soon(partial(fetch, "demand", background=False))
                    nursery.start_soon(partial(fetch, "guess", background=True))
                    while client.statistics().open_requests < 2:  # noqa: ASYNC110 (a count)
                        await trio.sleep(0.01)
                    live.freeze()
                live.serve(served)
                server.look_again()
                while len(done) < len(expected):  # noqa: ASYNC110 (a count)
                    await trio.sleep(0.01)
                assert done == expected
            client.close()
            nursery.cancel_scope.cancel()


async def test_leaves_are_told_of_what_stands(ram: Path) -> None:
    """Behind the same gate as guesses, and what was told is vouched for."""
    os.truncate(ram, 2 * LEAF_PAGES * PAGE_SIZE)
    with Listeners() as listeners:
        listeners.open([parse_listen("127.0.0.1:0")])
        server = HandoverServer(listeners)
        live = LiveRam(ram, bytes(32))
        server.publish(NAME, live)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            client = await connect(nursery, parse_server(f"{server.address}/{NAME}"))
            assert client.tells_leaves
            live.freeze()
            live.serve(Served.DEMANDS)
            server.look_again()
            await client.fetch([PageRange(2, 1)])
            with trio.move_on_after(0.05) as early:
                await client.leaf_digests(0)
            assert early.cancelled_caught
            live.serve(Served.ALL)
            server.look_again()
            expected = [page_digest(bytes([number]) * PAGE_SIZE) for number in range(PAGES)]
            zeros = [ZERO_PAGE_DIGEST] * (LEAF_PAGES - PAGES)
            assert await client.leaf_digests(0) == b"".join(expected + zeros)
            assert await client.leaf_digests(1) == ZERO_PAGE_DIGEST * LEAF_PAGES
            client.close()
            nursery.cancel_scope.cancel()


def test_a_leaf_that_was_told_stays(ram: Path) -> None:
    with LiveRam(ram, bytes(32)) as live:
        live.freeze()
        assert live.leaf(0) == live.leaf(0)
        with ram.open("r+b") as file:
            file.write(b"too late")
        os.utime(ram, ns=(1, 1))
        with pytest.raises(VerificationError):
            live.leaf(0)


def test_what_is_not_in_memory_is_not_told(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mount it would have to be fetched."""
    with LiveRam(ram, bytes(32)) as live:
        live.freeze()
        monkeypatch.setattr(live._file, "resident", lambda pages: bytes(page % 2 for page in range(pages.count)))
        told = live.leaf(0)
        for page in range(PAGES):
            digest = told[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]
            assert digest == (page_digest(bytes([page]) * PAGE_SIZE) if page % 2 else UNTOLD)
        monkeypatch.setattr(live._file, "resident", lambda pages: bytes(pages.count))
        assert live.leaf(0) == UNTOLD  # one for all


def test_who_is_not_told_what_is_in_memory_tells_no_leaves(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveram, "may_ask", lambda path: False)
    with LiveRam(ram, bytes(32)) as live:
        assert not live.vouches
