"""The small files of a mount: a vmstate that is small is there before it is read, and is verified like any."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from lazymem.cli import mountfiles
from lazymem.cli.mountfiles import AHEAD_BYTES, AHEAD_PIECE_BYTES, AHEAD_SECONDS, SmallFiles
from lazymem.errors import LazymemError, ServerRefusedError, VerificationError
from lazymem.fetch.client import Client
from lazymem.fs.tree import VMSTATE_INODE
from lazymem.snapshot.manifest import Manifest, vmstate_digest
from lazymem.wire.messages import PublishedFile

STATE = b"device state" * 10000


class _Server:
    """In the client's place: gives `data`, or raises, once it is `let_go`; what was `asked` for, as offset and end."""

    def __init__(self, data: bytes = STATE, maybe_error: LazymemError | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.best_round_trip_seconds = AHEAD_SECONDS / 2
        self.let_go = trio.Event()
        self.maybe_error = maybe_error
        self._data = data

    async def read_file(self, file: PublishedFile, size_limit: int, begin: int = 0) -> bytes:
        assert size_limit > len(self._data)
        return await self.read_file_piece(file, begin, len(self._data) - begin)

    async def read_file_piece(self, file: PublishedFile, offset: int, length: int) -> bytes:
        assert file is PublishedFile.VMSTATE
        self.asked.append((offset, offset + length))
        await self.let_go.wait()
        if self.maybe_error is not None:
            raise self.maybe_error
        return self._data[offset : offset + length]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link over which a piece takes no time, however busy this host is."""
    monkeypatch.setattr(mountfiles, "perf_counter", lambda: 0.0)


PIECES = [(at, min(at + AHEAD_PIECE_BYTES, len(STATE))) for at in range(0, len(STATE), AHEAD_PIECE_BYTES)]


def _files(server: _Server, named: bytes = STATE) -> SmallFiles:
    named_as = SimpleNamespace(size=len(named), digest=vmstate_digest(named))
    return SmallFiles(cast("Client", server), cast("Manifest", SimpleNamespace(vmstate=named_as)))


@pytest.mark.usefixtures("fast")
async def test_it_is_here_before_it_is_read() -> None:
    server = _Server()
    server.let_go.set()
    files = _files(server)
    await files.fetch_ahead(len(STATE))
    assert await files.read(VMSTATE_INODE) == STATE
    assert server.asked == PIECES


async def test_whoever_reads_what_is_on_its_way_has_the_rest_at_once_and_nothing_sent_twice() -> None:
    server = _Server()
    files = _files(server)
    read: list[bytes] = []

    async def reader() -> None:
        read.append(await files.read(VMSTATE_INODE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.fetch_ahead, len(STATE))
        await trio.testing.wait_all_tasks_blocked()
        assert server.asked == PIECES[:1], "a demand meets no more of it"
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        server.let_go.set()
    assert read == [STATE]
    assert await files.read(VMSTATE_INODE) == STATE
    assert server.asked == [PIECES[0], (AHEAD_PIECE_BYTES, len(STATE))]


async def test_over_a_link_that_is_slow_though_its_round_trips_are_short_it_is_left_to_who_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Demands would stand behind it: 1 MiB takes a second of 10 Mb/s."""
    server = _Server()
    server.let_go.set()
    files = _files(server)
    times = iter([0.0, AHEAD_PIECE_BYTES / 1.25e6])
    monkeypatch.setattr(mountfiles, "perf_counter", lambda: next(times))
    await files.fetch_ahead(len(STATE))
    assert server.asked == PIECES[:1]
    assert await files.read(VMSTATE_INODE) == STATE
    assert server.asked == [PIECES[0], (AHEAD_PIECE_BYTES, len(STATE))]


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
    assert server.asked == []


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("make_server", "error"),
    [
        (lambda: _Server(maybe_error=ServerRefusedError("it is gone")), ServerRefusedError),
        (lambda: _Server(STATE[::-1]), VerificationError),
    ],
)
async def test_what_is_wrong_with_it_its_reader_is_told(
    make_server: Callable[[], _Server], error: type[LazymemError]
) -> None:
    server = make_server()
    server.let_go.set()
    files = _files(server)
    await files.fetch_ahead(len(STATE))
    asked = len(server.asked)
    with pytest.raises(error):
        await files.read(VMSTATE_INODE)
    assert server.asked[asked:] == [(0, len(STATE))], "none of what was wrong is kept"
