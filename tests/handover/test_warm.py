"""Pages that go ahead of a guest: what is sent, and what a destination takes of whatever comes."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import StoreError
from lazymem.handover import runningram, warming
from lazymem.handover.runningram import FEW_SHARE, RunningRam, send
from lazymem.handover.warmed import Warmed, take
from lazymem.handover.warming import Warming
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, PageRange, PageRun
from lazymem.wire.codec import encode
from lazymem.wire.frame import Role
from lazymem.wire.messages import Encoding, Error, ErrorCode, Fetch, Message, Pages
from lazymem.wire.pagedata import decode_pages
from lazymem.wire.receivebuffer import ReceiveBuffer

PAGES = 700


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no guest that could be in the way."""
    monkeypatch.setattr(warming, "NICENESS", 0)


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """Three pages of noise, three zero ones that are written, three holes, and so on."""
    noise = random.Random(1)
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(PAGES * PAGE_SIZE)
        for page in range(PAGES):
            kind = page // 3 % 3
            if kind < 2:
                file.seek(page * PAGE_SIZE)
                file.write(noise.randbytes(PAGE_SIZE // 2) + bytes(PAGE_SIZE // 2) if kind == 0 else ZERO_PAGE)
    return path


def decoded(frames: Sequence[bytes]) -> dict[int, bytes | None]:
    """Page to bytes; None: said to be zero."""
    buffer = ReceiveBuffer(Role.SERVER)
    found: dict[int, bytes | None] = {}
    for frame in frames:
        buffer.feed(frame)
        message = buffer.next_message()
        assert isinstance(message, Pages)
        data = decode_pages(message)
        for index, page in enumerate(range(message.pages.start, message.pages.end)):
            found[page] = None if data is None else bytes(data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
        assert buffer.next_message() is None
    return found


def one_pass(found: RunningRam) -> dict[int, bytes | None]:
    return decoded(list(found.frames()))


def page_of(path: Path, page: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), PAGE_SIZE, page * PAGE_SIZE)


def test_the_first_pass_has_all_and_the_next_what_changed(ram: Path) -> None:
    with ram.open("r+b", buffering=0) as file:
        found = RunningRam(file.fileno(), PAGES * PAGE_SIZE)
        first = one_pass(found)
        assert set(first) == set(range(PAGES))
        for page, data in first.items():
            assert (data or ZERO_PAGE) == page_of(ram, page)
        assert not found.is_steady
        assert one_pass(found) == {}
        assert found.is_steady
        os.pwrite(file.fileno(), b"new", 5 * PAGE_SIZE)  # a zero page
        os.pwrite(file.fileno(), ZERO_PAGE, 9 * PAGE_SIZE)
        os.pwrite(file.fileno(), b"new", 8 * PAGE_SIZE)  # a hole
        changed = one_pass(found)
        assert changed == {5: page_of(ram, 5), 8: page_of(ram, 8), 9: None}
        assert found.changed_pages == 3


def test_what_is_not_in_memory_is_not_read(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runningram, "resident", lambda fd, pages: bytes(page < 10 for page in range(*_span(pages))))
    with ram.open("rb") as file:
        found = one_pass(RunningRam(file.fileno(), PAGES * PAGE_SIZE))
    noise = {page for page, data in found.items() if data is not None}
    assert noise == {0, 1, 2, 9}


def _span(pages: PageRange) -> tuple[int, int]:
    return pages.start, pages.end


def test_it_ends_when_little_changes_or_the_time_is_over(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runningram, "PAUSE_SECONDS", 0.0)
    with ram.open("r+b", buffering=0) as file:
        frames: list[bytes] = []
        send(RunningRam(file.fileno(), PAGES * PAGE_SIZE), frames.append, 600.0)
        assert set(decoded(frames)) == set(range(PAGES))

        def rewrite(_: bytes) -> None:
            """Whoever reads sees the guest write."""
            passes.append(len(passes))
            os.pwrite(file.fileno(), random.randbytes(PAGE_SIZE * (PAGES // FEW_SHARE + 2)), 0)

        passes: list[int] = []
        clock = itertools.count(step=0.001)  # a millisecond a look
        monkeypatch.setattr(runningram, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: next(clock)}))
        send(RunningRam(file.fileno(), PAGES * PAGE_SIZE), rewrite, 0.2)
        assert passes


def test_a_file_that_is_cut_meanwhile_ends_nothing(ram: Path) -> None:
    with ram.open("r+b") as file:
        found = RunningRam(file.fileno(), PAGES * PAGE_SIZE)
        os.truncate(ram, 100 * PAGE_SIZE)
        assert all(page < 100 for page, data in one_pass(found).items() if data is not None)


# ---- the destination


class Writer:
    def __init__(self, error: Exception | None = None) -> None:
        self.pages: dict[int, bytes | None] = {}
        self._error = error

    def write(self, runs: Sequence[PageRun]) -> int:
        if self._error is not None:
            raise self._error
        for run in runs:
            for index, page in enumerate(range(run.pages.start, run.pages.end)):
                data = run.data
                self.pages[page] = None if data is None else bytes(data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
        return sum(run.pages.count for run in runs if run.data is not None)


async def taken(said: bytes, writer: Writer, seconds: float = 60.0) -> Warmed:
    warmed = Warmed()
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())

    async def say() -> None:
        async with theirs:
            await theirs.send_all(said)

    with trio.fail_after(60):
        async with ours, trio.open_nursery() as nursery:
            nursery.start_soon(say)
            await take(ours, writer.write, seconds, warmed)
            nursery.cancel_scope.cancel()
    return warmed


FRAME = encode(Pages(1, PageRange(3, 2), Encoding.RAW, b"x" * PAGE_SIZE * 2))
ZEROS = encode(Pages(1, PageRange(5, 40), Encoding.ZERO))


async def test_what_comes_is_kept() -> None:
    writer = Writer()
    warmed = await taken(FRAME + ZEROS + FRAME, writer)
    assert (warmed.received_bytes, warmed.pages, warmed.complaint) == (2 * len(FRAME) + len(ZEROS), 4, "")
    assert writer.pages == dict.fromkeys((3, 4), b"x" * PAGE_SIZE) | dict.fromkeys(range(5, 45))


async def test_a_stream_that_is_cut_in_a_frame_leaves_what_came() -> None:
    """As when the time is over."""
    writer = Writer()
    warmed = await taken(FRAME + FRAME[:-1], writer)
    assert (warmed.pages, warmed.complaint, set(writer.pages)) == (2, "", {3, 4})


NONSENSE: dict[str, Message | bytes] = {
    "no frame": b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n",
    "a client's frame": Fetch(1, (PageRange(0, 1),)),
    "another frame": Error(1, ErrorCode.BUSY, "busy"),
    "a broken zstd frame": Pages(1, PageRange(0, 1), Encoding.ZSTD, b"no zstd"),
    "a length beyond all": b"\xff" * 64,
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_ends_it_and_leaves_what_came(name: str) -> None:
    said = NONSENSE[name]
    writer = Writer()
    warmed = await taken(FRAME + (said if isinstance(said, bytes) else encode(said)), writer)
    assert warmed.complaint
    assert set(writer.pages) <= {3, 4}


async def test_a_disk_that_refuses_ends_it() -> None:
    warmed = await taken(FRAME, Writer(StoreError("full")))
    assert (warmed.pages, warmed.complaint) == (0, "full")


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_whatever_comes_raises_nothing(said: bytes) -> None:
    trio.run(taken, FRAME + said, Writer())


# ---- the source's end of it


async def test_it_goes_from_end_to_end(ram: Path) -> None:
    """With the process that reads; and only once a hand-over."""
    said: list[str] = []
    found = Warming(60.0, said.append)
    writer, warmed = Writer(), Warmed()
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())

    async def send_all() -> None:
        async with theirs:
            await found.send(ram, theirs, "a")
            await found.send(ram, theirs, "a")

    async with ours, trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        await take(ours, writer.write, 60.0, warmed)
    assert warmed.complaint == ""
    assert set(writer.pages) == set(range(PAGES))
    assert len(said) == 2


@pytest.mark.parametrize("end", ["cut", "time", "gone"])
async def test_it_ends_at_once(end: str, tmp_path: Path) -> None:
    """When the receiver is ready, its time over, or the receiver gone; and the process is."""
    (tmp_path / "ram").write_bytes(random.randbytes(64 << 20))
    found = Warming(0.5 if end == "time" else 60.0, lambda _: None)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    done = trio.Event()

    async def send_all() -> None:
        async with theirs:
            await found.send(tmp_path / "ram", theirs, "a")
        done.set()

    with trio.fail_after(60):
        async with ours, trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            if end == "time":
                await done.wait()  # nobody takes anything
            else:
                await ours.receive_some(1)
                if end == "cut":
                    found.cut()
                else:
                    await ours.aclose()
                await done.wait()
    assert found._scope is None


async def test_without_seconds_there_is_none(ram: Path) -> None:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with ours, theirs:
        await Warming(0.0, lambda _: None).send(ram, theirs, "a")
        await theirs.send_eof()
        assert await ours.receive_some(1) == b""
