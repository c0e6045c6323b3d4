"""The filling process and what its daemon knows of it, with work that is none; real: `system/test_mount_fill.py`."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from msgspec import structs

from lazymem.cli.fillprocess import NICENESS, Fill, FillOrder, FillPipe, FillProcess, FillReport, give_way
from lazymem.cli.mountfill import _check_same
from lazymem.cli.mountfill import fill as really_fill
from lazymem.errors import StoreError
from lazymem.fetch.lastdemand import LastDemand
from lazymem.pages import PageRange
from lazymem.settings import MountSettings, parse_server
from lazymem.store.cachefolder import open_cache
from lazymem.store.origin import RamOrigin
from lazymem.store.pagemap import SET
from lazymem.wire.messages import Capability, Limits, Welcome
from tests.support.snapshots import make_snapshot

ORDER = FillOrder(bytes(32), 4096, bytes(16), everything=True, welcome=b"w" * 300_000)
RECORDED = (PageRange(3, 5), PageRange(1, 1))
PAGES = 40
ON_ITS_WAY = FillReport(held_pages=7, brought_pages=6, in_flight_pages=5, wire_received_bytes=9, set_is_coming=True)


def run(
    fill: Fill,
    meanwhile: Callable[[FillProcess], None] = lambda process: None,
    recorded: tuple[PageRange, ...] = RECORDED,
) -> tuple[bool, FillProcess]:
    process = FillProcess(fill)

    async def hear() -> bool:
        process.prepare(ORDER)
        process.begin(1, recorded, None, 0.25)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, meanwhile, process)
                return await process.run(lambda report: None)

    try:
        return trio.run(hear), process
    finally:
        process.close()


def test_an_order_arrives_and_its_descriptors_stay() -> None:
    def fill(order: FillOrder, pipe: FillPipe, demand: LastDemand) -> None:
        assert order == ORDER
        start = trio.run(pipe.maybe_start)
        assert start is not None
        assert (start.recorded, start.round_trip_seconds) == (RECORDED, 0.25)
        assert not os.get_inheritable(start.written_fd)
        assert not os.get_inheritable(start.coming_fd)
        pipe.tell_end(FillReport(held_pages=1, done=True))

    done, process = run(fill)
    assert process.latest == FillReport(held_pages=1, done=True)
    assert done


@pytest.mark.parametrize("begins", [True, False], ids=["begun", "never begun"])
def test_what_it_shares_with_its_daemon_leaves_no_descriptor_behind(begins: bool) -> None:
    def wait(*arguments: object) -> None:
        signal.pause()

    def descriptors() -> int:
        found = []
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                found.append(os.readlink(f"/proc/self/fd/{entry}"))
        return sum("memfd:coming" in name for name in found)

    process = FillProcess(wait)
    gc.collect()  # what earlier tests shared, if nobody has come for it
    before = descriptors()
    coming = process.share(8)
    assert descriptors() == before + 2, "ours, and the mapping's own"
    if begins:
        process.prepare(ORDER)
        process.begin(1, RECORDED, None)
    process.close()
    assert descriptors() == before + 1
    coming.demand(PageRange(3, 1))
    assert coming.is_demanded(PageRange(3, 1)), "it stays mapped"


@pytest.mark.parametrize("recorded", [RECORDED, ()])
def test_who_brings_a_recorded_set_gives_way_when_that_is_here(recorded: tuple[PageRange, ...]) -> None:
    """It is what a guest waits for; everything else is what others leave time for, from the beginning."""
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def fill(order: FillOrder, pipe: FillPipe, demand: LastDemand) -> None:
        start = trio.run(pipe.maybe_start)
        assert start is not None
        at_first = os.getpriority(os.PRIO_PROCESS, 0)
        if start.recorded:
            give_way()
        pipe.tell_end(FillReport(held_pages=at_first, brought_pages=os.getpriority(os.PRIO_PROCESS, 0), done=True))

    _, process = run(fill, recorded=recorded)
    nicer = min(before + NICENESS, 19)
    assert (process.latest.held_pages, process.latest.brought_pages) == (before if recorded else nicer, nicer)


def test_an_error_of_any_length_is_told_and_what_was_brought_stays_told() -> None:
    def fill(*arguments: object) -> None:
        pipe = arguments[1]
        assert isinstance(pipe, FillPipe)
        pipe.tell_end(ON_ITS_WAY)
        raise StoreError("no room in /\udcff" + "x" * 10_000)

    done, process = run(fill)
    assert not done
    assert process.latest.maybe_error is not None
    assert process.latest.maybe_error.startswith("no room in /\\udcffxxx")
    assert (process.latest.held_pages, process.latest.brought_pages, process.latest.wire_received_bytes) == (7, 6, 9)
    assert (process.latest.in_flight_pages, process.latest.set_is_coming) == (0, False)


def test_why_one_ended_is_told_though_it_never_heard_that_it_may_start() -> None:
    """Its end of the pipe closes with our word unread, which is an error for us before what it said."""

    def fill(order: FillOrder, pipe: FillPipe, demand: LastDemand) -> None:
        select.select([pipe._end], [], [])
        raise StoreError("no room")

    process = FillProcess(fill)
    process.prepare(ORDER)
    process.begin(1, RECORDED, None)
    os.waitid(os.P_PID, process._pid, os.WEXITED | os.WNOWAIT)
    assert not trio.run(process.run, lambda report: None)
    assert process.latest.maybe_error == "no room"


def test_nothing_is_to_come_from_a_killed_one() -> None:
    """Otherwise the kernel's read-ahead would be refused for the rest of the mount's life."""

    def fill(*arguments: object) -> None:
        signal.pause()

    def kill(process: FillProcess) -> None:
        assert process.latest.set_is_coming
        os.kill(process._pid, signal.SIGKILL)

    done, process = run(fill, kill)
    assert not done
    assert process.latest == FillReport()


def test_its_end_is_waited_for_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may hold it up, and the guest's faults must not wait for that."""
    found: list[str] = []
    really = os.waitpid

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        return really(pid, options)

    def fill(*arguments: object) -> None:
        pipe = arguments[1]
        assert isinstance(pipe, FillPipe)
        pipe.tell_end(FillReport(done=True))
        signal.pause()

    monkeypatch.setattr(os, "waitpid", waitpid)
    done, _ = run(fill)
    assert done
    assert found == ["Z"], "it had ended when it was waited for"


def test_an_object_of_the_daemons_closes_nothing_here() -> None:
    """It may be collected at any moment; its number must not be that of something of ours by then."""
    with Path(os.devnull).open("rb") as daemons:

        def fill(_order: object, pipe: FillPipe, _last: object) -> None:
            ours = [os.memfd_create("ours") for _ in range(64)]
            daemons.close()
            for descriptor in ours:
                os.fstat(descriptor)
            pipe.tell_end(FillReport(done=True))

        done, process = run(fill)
    assert done, process.latest


def test_one_whose_daemon_ends_before_it_may_start_hears_that() -> None:
    read_end, write_end = os.pipe()

    def fill(order: FillOrder, pipe: FillPipe, demand: LastDemand) -> None:
        os.write(told, repr(trio.run(pipe.maybe_start)).encode())

    told = write_end
    process = FillProcess(fill, keep=(write_end,))
    os.close(write_end)
    process.prepare(ORDER)
    process._end.close()  # as the end of a killed daemon's
    with os.fdopen(read_end, "rb") as file:
        assert file.read() == b"None"
    process.close()


@pytest.mark.parametrize("same", [True, False])
def test_one_with_another_cache_than_its_daemon_leaves_all_of_it_to_that(same: bool, tmp_path: Path) -> None:
    """Each may have set aside what the other one made. Else the daemon would take for held what only this one has."""
    snapshot = make_snapshot(tmp_path / "snapshot", PAGES)
    assert snapshot.root is not None
    origin = RamOrigin(snapshot.identity, len(snapshot.ram), snapshot.root)
    with contextlib.closing(open_cache(tmp_path / "cache", origin)) as cache:
        cache.digests.store_upper(snapshot.upper)
        if not same:
            cache.path.rename(tmp_path / "aside")
        for page in range(PAGES):  # so that the right one has nothing to wait for
            cache.held.set(PageRange(page, 1), SET)
        settings = MountSettings(
            servers=(parse_server(f"unix:{tmp_path}/nobody"),), mountpoint=tmp_path, cache_dir=tmp_path / "cache"
        )
        limits = Limits(1, 1, 1)
        welcome = Welcome(1, Capability(0), limits, "", snapshot.identity, origin.size_bytes, True, b"", 0)
        order = structs.replace(ORDER, identity=snapshot.identity, size_bytes=origin.size_bytes, root=snapshot.root)
        process = FillProcess(partial(really_fill, settings))

        async def hear() -> bool:
            process.prepare(structs.replace(order, template=True, welcome=msgspec.msgpack.encode(welcome)))
            process.begin(PAGES, (), None, maybe_held_fd=cache.held.fileno())
            with trio.fail_after(60):
                return await process.run(lambda report: None)

        try:
            assert trio.run(hear) is same
        finally:
            process.close()
    assert same or "another cache" in (process.latest.maybe_error or "")


def test_a_cache_that_cannot_be_looked_at_is_left_to_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", PAGES)
    origin = RamOrigin(snapshot.identity, len(snapshot.ram), snapshot.root)

    def fails(one: int, other: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os.path, "sameopenfile", fails)
    with contextlib.closing(open_cache(tmp_path / "cache", origin)) as cache:
        descriptor = os.dup(cache.held.fileno())
        with pytest.raises(StoreError, match="Input/output error"):
            _check_same(descriptor, cache)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_one_that_gets_no_order_can_be_ended() -> None:
    process = FillProcess(lambda *arguments: None)
    pid = process._pid
    trio.run(process.end)
    assert not Path(f"/proc/{pid}").exists()
    process.close()


def test_a_server_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """As by the daemon, which goes on with a mount whether its server is there or not. In a process that forks as the
    daemon does."""
    command = [sys.executable, "-m", "tests.support.fillwithoutserver", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
