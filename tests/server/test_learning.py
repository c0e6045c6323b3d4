"""A server that learns: one good working set a snapshot, from whoever is first, and nothing else."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.learning import Learning
from lazymem_server.serving import Serving, serve

from lazymem.errors import UsageError
from lazymem.pages import PageRange
from lazymem.snapshot import workingset
from lazymem.snapshot.workingset import WorkingSet, encode
from lazymem.wire.limits import MAX_STORE_PIECE_BYTES
from lazymem.wire.messages import (
    Capability,
    Error,
    ErrorCode,
    FileData,
    FileStored,
    Message,
    PublishedFile,
    StoreFile,
)
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import WireClient, connected

PAGES = 3000


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "web", PAGES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "learned"


def a_set(snapshot: BuiltSnapshot, *runs: tuple[int, int]) -> bytes:
    return encode(WorkingSet(snapshot.identity, PAGES, tuple(PageRange(*run) for run in runs or ((7, 2), (1, 1)))))


async def served(nursery: trio.Nursery, folder: Path | None, *snapshots: BuiltSnapshot) -> Serving:
    serving: Serving = await nursery.start(
        partial(serve, [found.folder for found in snapshots], ["127.0.0.1:0"], learn=folder)
    )
    return serving


async def store(client: WireClient, data: bytes, piece: int = MAX_STORE_PIECE_BYTES) -> Message:
    """The last piece's answer, or the first that is an error."""
    answer: Message | None = None
    for at in range(0, len(data), piece):
        part = data[at : at + piece]
        request = StoreFile(client.next_id(), PublishedFile.WORKING_SET, at, len(data), part)
        await client.send(request)
        [answer] = await client.answers(request.id)
        if isinstance(answer, Error):
            break
    assert answer is not None
    return answer


async def told(address: str) -> tuple[bool, bytes]:
    """Whether the server wants one from a new client, and the one that it has for it."""
    async with connected(address) as client:
        welcome = client.welcome
        data = b""
        if welcome.working_set_bytes:
            answer = await client.read_file(PublishedFile.WORKING_SET, 0, welcome.working_set_bytes)
            assert isinstance(answer, FileData)
            data = answer.data
        return bool(welcome.capabilities & Capability.LEARN), data


async def test_the_first_one_is_taken_and_given_to_the_next(snapshot: BuiltSnapshot, folder: Path) -> None:
    good, other = a_set(snapshot), a_set(snapshot, (5, 1))
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        [address] = serving.addresses
        async with connected(address) as first, connected(address) as second:
            assert await told(address) == (True, b"")
            assert isinstance(await store(first, good, piece=50), FileStored)
            answer = await store(second, other)
            assert isinstance(answer, Error)
            assert answer.code is ErrorCode.NOT_WANTED
            assert not first.welcome.working_set_bytes
            missing = await first.read_file(PublishedFile.WORKING_SET, 0, 10)
            assert isinstance(missing, Error), "what a client was told at its welcome stays so"
        assert await told(address) == (False, good)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:  # and beyond the server's end
        serving = await served(nursery, folder, snapshot)
        assert await told(serving.addresses[0]) == (False, good)
        nursery.cancel_scope.cancel()
    assert os.listdir(folder) == [f"{snapshot.identity.hex()}.working-set"]


async def test_nobody_is_asked_without_learn_or_where_there_is_one(snapshot: BuiltSnapshot, folder: Path) -> None:
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, None, snapshot)
        assert await told(serving.addresses[0]) == (False, b"")
        own = a_set(snapshot, (100, 5))
        (snapshot.folder / workingset.WORKING_SET_NAME).write_bytes(own)
        serving = await served(nursery, folder, snapshot)
        assert await told(serving.addresses[0]) == (False, own)
        nursery.cancel_scope.cancel()


async def test_what_makes_no_sense_is_refused_and_the_next_may_try(snapshot: BuiltSnapshot, folder: Path) -> None:
    good = a_set(snapshot)
    elsewhere = encode(WorkingSet(bytes(32), PAGES, (PageRange(1, 1),)))
    larger = encode(WorkingSet(snapshot.identity, PAGES + 1, (PageRange(PAGES, 1),)))
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        [address] = serving.addresses
        async with connected(address) as client:
            for bad in (good[:-1], b"x", bytes(1 << 20), elsewhere, larger, good[:-1] + b"\0"):
                answer = await store(client, bad)
                assert isinstance(answer, Error)
                assert answer.code is ErrorCode.BAD_REQUEST
            assert await told(address) == (True, b"")
            assert not os.listdir(folder)
            assert isinstance(await store(client, good), FileStored)
        assert await told(address) == (False, good)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 100), (51, 100)),  # a gap
        ((0, 100), (49, 100)),  # an overlap
        ((0, 100), (50, 101)),  # another file's
        ((50, 100), (50, 100)),  # no beginning
    ],
)
async def test_pieces_that_do_not_follow_each_other(
    snapshot: BuiltSnapshot, folder: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        async with connected(serving.addresses[0]) as client:
            for (offset, total), last in ((first, False), (second, True)):
                request = StoreFile(
                    client.next_id(), PublishedFile.WORKING_SET, offset, total, bytes(49 + (not offset))
                )
                await client.send(request)
                [answer] = await client.answers(request.id)
                assert isinstance(answer, Error) or not last
            assert isinstance(await store(client, a_set(snapshot)), FileStored), "a new beginning is always possible"
        nursery.cancel_scope.cancel()


async def test_an_unhashed_snapshots_is_kept_in_memory(tmp_path: Path, folder: Path) -> None:
    snapshot = make_snapshot(tmp_path / "bare", PAGES, hashed=False)
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        [address] = serving.addresses
        async with connected(address) as client:
            good = encode(WorkingSet(client.welcome.identity, PAGES, (PageRange(3, 1),)))
            assert isinstance(await store(client, good), FileStored)
        assert await told(address) == (False, good)
        nursery.cancel_scope.cancel()
    assert not os.listdir(folder)


async def test_a_damaged_file_is_learned_anew(snapshot: BuiltSnapshot, folder: Path) -> None:
    os.mkdir(folder)
    (folder / f"{snapshot.identity.hex()}.working-set").write_bytes(a_set(snapshot)[:-1])
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        assert await told(serving.addresses[0]) == (True, b"")
        nursery.cancel_scope.cancel()


async def test_a_disk_that_refuses_costs_the_file_only(snapshot: BuiltSnapshot, folder: Path) -> None:
    good = a_set(snapshot)
    async with trio.open_nursery() as nursery:
        serving = await served(nursery, folder, snapshot)
        os.rmdir(folder)
        async with connected(serving.addresses[0]) as client:
            assert isinstance(await store(client, good), FileStored)
        assert await told(serving.addresses[0]) == (False, good)
        nursery.cancel_scope.cancel()


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--learn"):
        Learning(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="--learn"):
        Learning(tmp_path / "file")
