"""The small files of a mount: a vmstate that is small is there before it is read, and is verified like any."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from lazymem.cli.mountfiles import AHEAD_BYTES, AHEAD_SECONDS, SmallFiles
from lazymem.errors import LazymemError, ServerRefusedError, VerificationError
from lazymem.fetch.client import Client
from lazymem.fs.tree import VMSTATE_INODE
from lazymem.snapshot.manifest import Manifest, vmstate_digest
from lazymem.wire.messages import PublishedFile

STATE = b"device state" * 100


class _Server:
    """In the client's place: gives `data`, or raises, once it is `let_go`; counts how often it was asked."""

    def __init__(self, data: bytes = STATE, maybe_error: LazymemError | None = None) -> None:
        self.asked = 0
        self.best_round_trip_seconds = AHEAD_SECONDS / 2
        self.let_go = trio.Event()
        self.maybe_error = maybe_error
        self._data = data

    async def read_file(self, file: PublishedFile, size_limit: int) -> bytes:
        assert file is PublishedFile.VMSTATE
        assert size_limit > len(self._data)
        self.asked += 1
        await self.let_go.wait()
        if self.maybe_error is not None:
            raise self.maybe_error
        return self._data


def _files(server: _Server, named: bytes = STATE) -> SmallFiles:
    named_as = SimpleNamespace(size=len(named), digest=vmstate_digest(named))
    return SmallFiles(cast("Client", server), cast("Manifest", SimpleNamespace(vmstate=named_as)))


async def test_whoever_reads_what_is_on_its_way_does_not_have_it_sent_twice() -> None:
    server = _Server()
    files = _files(server)
    read: list[bytes] = []

    async def reader() -> None:
        read.append(await files.read(VMSTATE_INODE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.fetch_ahead, len(STATE))
        await trio.testing.wait_all_tasks_blocked()
        assert server.asked == 1
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        server.let_go.set()
    assert read == [STATE]
    assert await files.read(VMSTATE_INODE) == STATE
    assert server.asked == 1


@pytest.mark.parametrize(
    ("size", "round_trip_seconds"),
    [(0, 0.001), (AHEAD_BYTES + 1, 0.001), (len(STATE), AHEAD_SECONDS), (len(STATE), math.inf)],
)
async def test_none_and_what_others_would_wait_behind_are_left_to_who_reads_them(
    size: int, round_trip_seconds: float
) -> None:
    """Infinite: nobody knows yet."""
    server = _Server()
    server.best_round_trip_seconds = round_trip_seconds
    await _files(server).fetch_ahead(size)
    assert server.asked == 0


@pytest.mark.parametrize(
    ("make_server", "error"),
    [
        (lambda: _Server(maybe_error=ServerRefusedError("it is gone")), ServerRefusedError),
        (lambda: _Server(b"another one's"), VerificationError),
    ],
)
async def test_what_is_wrong_with_it_its_reader_is_told(
    make_server: Callable[[], _Server], error: type[LazymemError]
) -> None:
    server = make_server()
    server.let_go.set()
    files = _files(server)
    await files.fetch_ahead(len(STATE))
    with pytest.raises(error):
        await files.read(VMSTATE_INODE)
    assert server.asked == 2
