"""What this kernel tells of the page faults of other processes, and when nobody asks it any more."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from lazymem.fs import faultaddresses, faultcounter
from lazymem.fs.faultaddresses import FaultAddresses
from lazymem.fs.faultcounter import FaultCounter
from lazymem.pages import PAGE_SIZE
from tests.support.skips import needs_fault_counts

PAGES = 64
PATIENCE_SECONDS = 60.0

_GUEST = """
import ctypes, mmap, os, sys, threading
descriptor = os.open(sys.argv[1], os.O_RDWR)
ram = mmap.mmap(descriptor, 32 * 4096, offset=32 * 4096)
def serve():
    print(threading.get_native_id(), flush=True)
    while line := sys.stdin.readline():
        if line == "thread\\n":
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
        elif line == "end\\n":
            return
        else:
            ram[(int(line) - 32) * 4096] = 1  # to read one would map its neighbours, too
            print(line, end="", flush=True)
serve()
"""


class Guest:
    """A process with the second half of a file mapped, which touches pages of that when it is told to."""

    def __init__(self, file: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GUEST, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.thread = self._line()

    def touch(self, page: int) -> None:
        """Returns when it has."""
        self._say(page)
        self._line()

    def begin_thread(self) -> int:
        """From now on that one is told."""
        self._say("thread")
        return self._line()

    def end_thread(self) -> None:
        self._say("end")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It stands for the RAM of a mount."""
    path = tmp_path / "pc.ram"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    monkeypatch.setattr(faultaddresses, "RAM_INODE", path.stat().st_ino)
    return path


@pytest.fixture
def guest(file: Path) -> Iterator[Guest]:
    found = Guest(file)
    yield found
    found.end()


@pytest.fixture
def device(file: Path) -> str:
    """Of the file system that `file` is on, as in the tables of maps. (stat(2) says another one on btrfs, say.)"""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0):
        lines = Path("/proc/self/maps").read_text().splitlines()
    (where,) = {line.split()[3] for line in lines if line.endswith(f" {file}")}
    major, minor = (int(part, 16) for part in where.split(":"))
    return f"{major}:{minor}"


@pytest.fixture
async def faults(device: str, nursery: trio.Nursery) -> FaultAddresses:
    """Of the mount that `file` is on, and able to count."""
    found = FaultAddresses(device, lambda: True)
    nursery.start_soon(found.run, lambda: False)
    await until(lambda: counters() == 1)
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


def counters() -> int:
    """That this process has open."""
    return Path("/proc/self/maps").read_text().count("[perf_event]")


@needs_fault_counts
def test_the_newest_fault_of_a_thread_is_told(guest: Guest) -> None:
    counter = FaultCounter(guest.thread)
    try:
        assert counter.newest() == (0, 0)
        guest.touch(33)
        stamp, address = counter.newest()
        assert stamp
        assert address
        guest.touch(34)
        assert counter.newest()[0] not in (0, stamp)
    finally:
        counter.close()
    assert not counters()


@needs_fault_counts
def test_no_descriptor_stays_open_and_no_child_has_the_counter() -> None:
    before = os.listdir("/proc/self/fd")
    counter = FaultCounter(0)
    try:
        assert os.listdir("/proc/self/fd") == before
        assert counters() == 1
        child = os.fork()
        if child == 0:
            os._exit(counters())
        assert os.waitpid(child, 0)[1] == 0
    finally:
        counter.close()


@needs_fault_counts
def test_after_many_faults_the_newest_is_still_the_newest() -> None:
    """More than there is room for records of."""
    counter = FaultCounter(0)
    try:
        with mmap.mmap(-1, 1000 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            stamps = set()
            for page in range(1000):
                memory[page * PAGE_SIZE] = 1
                stamps.add(counter.newest()[0])
            assert len(stamps) == 1000
    finally:
        counter.close()


def test_a_machine_whose_system_calls_nobody_knows_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert not faultcounter.may_count()


@needs_fault_counts
async def test_the_page_is_where_the_file_is_mapped(faults: FaultAddresses, guest: Guest) -> None:
    faults.watch(guest.thread)
    await until(lambda: guest.thread in faults._threads)
    assert faults.latest() == []
    found = {}
    for page in range(PAGES // 2, PAGES):
        guest.touch(page)
        found[page] = faults.maybe_latest(guest.thread)
    known = [(page, touch) for page, touch in found.items() if touch is not None]
    assert known, "not each time something of Python's own was touched behind it"
    assert all((touch.thread, touch.page) == (guest.thread, page) for page, touch in known)
    assert len({touch.stamp for _, touch in known}) == len(known)


@needs_fault_counts
async def test_threads_that_begin_later_are_found_and_forgotten_when_they_end(
    faults: FaultAddresses, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultaddresses, "LOOK_SECONDS", 3600.0)  # it looks for as long, though less and less often
    faults.watch(guest.thread)
    await until(lambda: guest.thread in faults._threads)
    thread = guest.begin_thread()
    await until(lambda: thread in faults._threads)
    assert counters() == 3, "the first one's, and both threads'"
    guest.end_thread()
    await until(lambda: thread not in faults._threads)
    guest.end()
    await until(lambda: counters() == 1)


@needs_fault_counts
async def test_its_own_threads_are_not_counted(faults: FaultAddresses) -> None:
    assert faults.maybe_latest(0) is None
    assert faults.maybe_latest(os.getpid()) is None
    await until(lambda: os.getpid() in faults._threads)
    assert faults.maybe_latest(os.getpid()) is None
    assert counters() == 1


@needs_fault_counts
async def test_no_more_are_watched_than_are_allowed(
    faults: FaultAddresses, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultaddresses, "MOST_THREADS", 1)
    guest.begin_thread()
    assert faults.maybe_latest(guest.thread) is None
    await until(lambda: bool(faults._threads))
    assert counters() == 2, "one of two threads, and the first counter of all"


@needs_fault_counts
async def test_who_has_ended_by_then_is_nobody(faults: FaultAddresses, guest: Guest) -> None:
    guest.end()
    faults.watch(guest.thread)
    await until(lambda: not faults._asked)
    await until(lambda: counters() == 1)
    assert faults.maybe_latest(guest.thread) is None


@needs_fault_counts
async def test_once_it_is_over_nobody_is_counted(
    device: str, guest: Guest, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultaddresses, "LOOK_SECONDS", 0.01)
    is_over = False
    found = FaultAddresses(device, lambda: True)
    nursery.start_soon(found.run, lambda: is_over)
    await until(lambda: counters() == 1)
    found.watch(guest.thread)
    await until(lambda: counters() == 2)
    is_over = True
    await until(lambda: not counters())
    assert found.maybe_latest(guest.thread) is None
    assert found.latest() == []


async def test_where_it_is_refused_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: int) -> FaultCounter:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(faultaddresses, "FaultCounter", refused)
    found = FaultAddresses("0:47", lambda: True)
    await found.run(lambda: False)
    found.watch(os.getppid())
    assert found.maybe_latest(os.getppid()) is None
    assert found.latest() == []


async def test_where_there_is_no_thread_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_left(*arguments: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
    found = FaultAddresses("0:47", lambda: True)
    await found.run(lambda: False)
    assert found.latest() == []


@needs_fault_counts
async def test_a_look_that_finds_no_thread_is_done_again(
    faults: FaultAddresses, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultaddresses, "LOOK_SECONDS", 0.01)
    run_sync = trio.to_thread.run_sync
    refused = 0

    async def none_left(*arguments: object, **options: object) -> None:
        nonlocal refused
        refused += 1
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
    faults.watch(guest.thread)
    await until(lambda: refused > 0)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    await until(lambda: faults.maybe_latest(guest.thread) is None and guest.thread in faults._threads)


@needs_fault_counts
async def test_where_it_does_not_pay_nobody_is_counted_until_it_does(
    device: str, guest: Guest, nursery: trio.Nursery
) -> None:
    """Not even the first counter is made, which takes the kernel its time."""
    pays = False
    found = FaultAddresses(device, lambda: pays)
    nursery.start_soon(found.run, lambda: False)
    await until(lambda: found._runs)
    found.watch(guest.thread)
    assert not found._asked
    assert not counters()
    pays = True
    found.watch(guest.thread)
    await until(lambda: guest.thread in found._threads)
    assert counters() == 2


@needs_fault_counts
async def test_who_maps_the_ram_long_after_it_was_opened_is_seen_when_it_reads(
    faults: FaultAddresses, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultaddresses, "LOOK_SECONDS", 0.01)
    with monkeypatch.context() as not_yet:
        not_yet.setattr(faultaddresses, "_ram_maps", lambda process, device: [])
        faults.watch(guest.thread)
        await until(lambda: guest.thread in faults._threads)
    await until(lambda: faults.maybe_latest(guest.thread) is not None or bool(faults._maps.get(guest.thread)))
