"""Pages that come ahead of a guest, from where `lazymem receive` sees it: what ends them, and what is left."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from lazymem.cli import receivewarm
from lazymem.cli.receivewarm import Ahead, clear_away
from lazymem.errors import ServerUnreachableError
from lazymem.handover import messages
from lazymem.handover.arrival import Arriving
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.codec import encode
from lazymem.wire.messages import Encoding, Pages

FRAME = encode(Pages(1, PageRange(3, 2), Encoding.RAW, b"x" * PAGE_SIZE * 2))


class Link:
    """A source whose control connection is lost when it is told so."""

    def __init__(self, stream: trio.SocketStream | None) -> None:
        self._stream = stream
        self.lost = trio.Event()

    async def open_warm(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if self._stream is None:
            raise ServerUnreachableError("nobody is there")
        return self._stream

    async def wait_lost(self) -> None:
        await self.lost.wait()


def offer(seconds: float = 3600.0) -> messages.Offer:
    return messages.Offer(
        messages.VERSION, "0a" * 16, 64 * PAGE_SIZE, {}, "", "/ram", running=True, warm_seconds=seconds
    )


def arriving(ahead: Ahead) -> Arriving:
    return Arriving("", "", "", "", 0, "", 64 * PAGE_SIZE, candidates=ahead.folder)


def ends() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), trio.SocketStream(
        trio.socket.from_stdlib_socket(theirs)
    )


@pytest.mark.parametrize("end", ["it ends", "the source is lost"])
async def test_it_ends(end: str, tmp_path: Path) -> None:
    ours, theirs = ends()
    said: list[str] = []
    ahead, link = Ahead(offer(), tmp_path, said.append), Link(ours)
    ahead.make()
    assert ahead.maybe_writer is not None
    found = arriving(ahead)

    async def send() -> None:
        await theirs.send_all(FRAME)
        if end == "it ends":
            await theirs.aclose()
            return
        while found.warmed_bytes == 0 and not written():  # noqa: ASYNC110 (a file)
            await trio.sleep(0.01)
        link.lost.set()

    def written() -> bool:
        assert ahead.maybe_writer is not None
        return os.pread(ahead.maybe_writer._fds[1], 64, 0)[3:5] == b"\1\1"

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await ahead.take(cast(Any, link), found)
    assert found.warmed_bytes == len(FRAME)
    assert written()
    assert ("the source is gone, or silent" in said[-1]) == (end != "it ends")
    assert [found.candidates] == [str(tmp_path / name) for name in os.listdir(tmp_path)]
    ahead.close()
    assert os.listdir(tmp_path) == []
    await theirs.aclose()


async def test_a_source_that_is_gone_already(tmp_path: Path) -> None:
    said: list[str] = []
    ahead = Ahead(offer(), tmp_path, said.append)
    ahead.make()
    await ahead.take(cast(Any, Link(None)), arriving(ahead))
    assert said[-1] == "no pages come ahead of the guest: nobody is there"
    ahead.close()


async def test_a_source_that_offers_none(tmp_path: Path) -> None:
    said: list[str] = []
    ahead = Ahead(offer(0.0), tmp_path, said.append)
    ahead.make()
    await ahead.take(cast(Any, None), arriving(ahead))
    assert (ahead.folder, ahead.maybe_writer, said, os.listdir(tmp_path)) == ("", None, [], [])
    ahead.close()


async def test_a_disk_that_has_no_place_for_them(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").touch()
    ahead = Ahead(offer(), tmp_path / "file", said.append)
    ahead.make()
    await ahead.take(cast(Any, None), arriving(ahead))
    assert len(said) == 1
    assert said[0].startswith("no pages come ahead of the guest: ")
    ahead.close()


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    ahead = Ahead(offer(), tmp_path, lambda _: None)
    ahead.make()
    assert os.listdir(tmp_path) != []
    clear_away(arriving(ahead))
    clear_away(arriving(ahead))
    assert os.listdir(tmp_path) == []
    ahead.close()


async def test_how_it_goes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivewarm, "_TELL_SECONDS", 0.01)
    ours, theirs = ends()
    said: list[str] = []
    ahead = Ahead(offer(), tmp_path, said.append)
    ahead.make()

    async def send() -> None:
        await theirs.send_all(FRAME)
        while not any("2 pages" in line for line in said):  # noqa: ASYNC110 (a list)
            await trio.sleep(0.01)
        await theirs.aclose()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await ahead.take(cast(Any, Link(ours)), arriving(ahead))
    ahead.close()
