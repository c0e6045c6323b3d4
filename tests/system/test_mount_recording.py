"""Working sets on real mounts: recorded, published, learned; and recordings that nobody should believe."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from lazymem.errors import SnapshotError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import workingset
from lazymem.snapshot.workingset import WorkingSet
from tests.support.mounts import Mounted, Server, Stage, page_of, stage, wait_until
from tests.support.residency import cached_pages
from tests.support.snapshots import BuiltSnapshot, make_snapshot

PAGES = 4096

TOUCHED = (3000, 17, 3001, 18, 600, 1200)
"""In this order, by a map that is read at random: a READ each."""


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    """No zero pages, and no two equal ones: whatever is held was fetched."""
    ram = random.Random(11).randbytes(PAGES * PAGE_SIZE)
    return make_snapshot(tmp_path / "snap", PAGES, ram=ram)


def touch(mounted: Mounted, snapshot: BuiltSnapshot, *pages: int) -> None:
    with mounted.open_map() as mapped:
        for page in pages:
            assert page_of(mapped, page) == snapshot.page(page)


def read_set(path: Path, snapshot: BuiltSnapshot) -> WorkingSet:
    return workingset.decode(path.read_bytes(), snapshot.identity, PAGES)


def pages_of(found: WorkingSet) -> list[int]:
    return [page for run in found.runs for page in range(run.start, run.end)]


def publish(snapshot: BuiltSnapshot, data: bytes) -> None:
    (snapshot.folder / workingset.WORKING_SET_NAME).write_bytes(data)


def a_set(snapshot: BuiltSnapshot, *runs: tuple[int, int]) -> bytes:
    return workingset.encode(WorkingSet(snapshot.identity, PAGES, tuple(PageRange(*run) for run in runs)))


def record(staged: Stage, server: Server, snapshot: BuiltSnapshot, *options: object) -> Path:
    target = staged.folder / "recorded"
    mounted = staged.mount(server.address, "--prefetch", "none", "--record", target, *options, name="recording")
    touch(mounted, snapshot, *TOUCHED)
    mounted.unmount()
    return target


def test_a_recorded_run_is_brought_to_the_next_one_and_nothing_else(staged: Stage, snapshot: BuiltSnapshot) -> None:
    server = staged.serve(snapshot.folder)
    target = record(staged, server, snapshot)
    assert pages_of(read_set(target, snapshot)) == list(TOUCHED)
    server.stop()
    os.rename(target, snapshot.folder / workingset.WORKING_SET_NAME)

    server = staged.serve(snapshot.folder)
    staged.cache = staged.folder / "fresh"
    mounted = staged.mount(server.address, "--prefetch", "working-set")
    wait_until(lambda: mounted.status()["pages_held"] >= len(TOUCHED), "the recorded pages")
    status = mounted.status()
    assert (status["pages_held"], status["pages_prefetched"], status["demand_faults"]) == (len(TOUCHED),) * 2 + (0,)
    touch(mounted, snapshot, *reversed(TOUCHED))
    status = mounted.status()
    assert status["demand_faults"] == 0
    assert status["working_set"]["set_pages"] == len(TOUCHED)
    # Those that were put into the kernel's page cache are touched without our knowledge.
    assert status["working_set"]["set_ready"] == status["working_set"]["set_touched"]
    touch(mounted, snapshot, 2000)
    assert mounted.status()["demand_faults"] == 1
    wait_until(lambda: mounted.status()["pages_held"] > len(TOUCHED), "what was touched now, and what is around it")


def test_a_read_past_the_page_cache_is_not_refused(staged: Stage, snapshot: BuiltSnapshot) -> None:
    """It is no read-ahead: whoever made it would get EAGAIN."""
    server = staged.serve(snapshot.folder)
    mounted = staged.mount(server.address, "--prefetch", "none", "--record", staged.folder / "recorded")
    fd = os.open(mounted.ram_path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 64 << 10) as buffer:  # aligned
            assert os.preadv(fd, [buffer], 1 << 20) == len(buffer)
            assert buffer[:] == snapshot.ram[1 << 20 : (1 << 20) + len(buffer)]
    finally:
        os.close(fd)


def test_all_brings_the_rest_too(staged: Stage, snapshot: BuiltSnapshot) -> None:
    publish(snapshot, a_set(snapshot, (3000, 5), (10, 1)))
    mounted = staged.mount(staged.serve(snapshot.folder).address)
    wait_until(lambda: mounted.status()["pages_held"] == PAGES, "everything")
    touch(mounted, snapshot, *range(0, PAGES, 100))


def test_a_recording_ends_when_its_time_is_over(staged: Stage, snapshot: BuiltSnapshot) -> None:
    server = staged.serve(snapshot.folder)
    target = staged.folder / "recorded"
    mounted = staged.mount(server.address, "--prefetch", "none", "--record", target, "--record-seconds", "0.3")
    assert not target.exists(), "it begins with the first touch"
    touch(mounted, snapshot, 5)
    wait_until(target.exists, "the recording")
    before = target.read_bytes()
    touch(mounted, snapshot, 900)
    mounted.unmount()
    assert target.read_bytes() == before
    assert 5 in pages_of(read_set(target, snapshot))
    assert os.listdir(target.parent).count("recorded") == 1
    assert not [name for name in os.listdir(target.parent) if name.startswith(".recorded")]


def test_what_the_sweep_and_the_page_cache_bring_is_no_touch(staged: Stage, snapshot: BuiltSnapshot) -> None:
    """Everything is held soon, and was put into the kernel's cache if it were not for the recording."""
    server = staged.serve(snapshot.folder)
    target = staged.folder / "recorded"
    mounted = staged.mount(server.address, "--prefetch", "all", "--record", target)
    wait_until(lambda: mounted.status()["pages_held"] == PAGES, "everything")
    touch(mounted, snapshot, *TOUCHED)
    mounted.unmount()
    assert pages_of(read_set(target, snapshot)) == list(TOUCHED)


@pytest.mark.needs_root("only root's daemon fills the kernel's page cache (open_tree(2))")
def test_refused_read_ahead_gets_into_the_page_cache_later(staged: Stage, snapshot: BuiltSnapshot) -> None:
    """The empty pages that it leaves behind in the kernel are no reason to pass by them."""
    server = staged.serve(snapshot.folder)
    target = staged.folder / "recorded"
    mounted = staged.mount(server.address, "--prefetch", "all", "--record", target, "--record-seconds", "0.2")
    descriptor = os.open(mounted.ram_path, os.O_RDONLY)
    with mmap.mmap(descriptor, PAGES * PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        os.close(descriptor)
        mapped.madvise(14)  # MADV_HUGEPAGE
        for page in TOUCHED:
            assert page_of(mapped, page) == snapshot.page(page)
        wait_until(target.exists, "the recording")
        # On a busy machine it may be over before the last touch; but nothing else is in it.
        assert {TOUCHED[0]} <= set(pages_of(read_set(target, snapshot))) <= set(TOUCHED)
        wait_until(lambda: mounted.status()["pages_held"] == PAGES, "everything")
        wait_until(lambda: mounted.status()["fill"]["state"] == "the kernel has it all", "the filler")
        before = mounted.requests()
        for page in range(PAGES):
            assert page_of(mapped, page) == snapshot.page(page)
        assert mounted.requests() - before < PAGES // 100


@pytest.mark.needs_root("only root's daemon fills the kernel's page cache (open_tree(2))")
def test_what_is_around_a_touched_page_of_refused_read_ahead_follows(staged: Stage, snapshot: BuiltSnapshot) -> None:
    """All of it is held, and nothing else fills the kernel's cache; a page that was written meanwhile stays."""
    server = staged.serve(snapshot.folder)
    mounted = staged.mount(server.address, "--prefetch", "all", name="first")
    wait_until(lambda: mounted.status()["pages_held"] == PAGES, "everything")
    mounted.unmount()
    target = staged.folder / "recorded"
    options = ("--prefetch", "working-set", "--record", target, "--record-seconds", "0.2")
    mounted = staged.mount(server.address, *options, name="second")
    descriptor = os.open(mounted.ram_path, os.O_RDWR)
    with mmap.mmap(descriptor, PAGES * PAGE_SIZE, mmap.MAP_SHARED) as mapped:
        os.close(descriptor)
        mapped.madvise(14)  # MADV_HUGEPAGE
        block = range(TOUCHED[0] - TOUCHED[0] % 32, TOUCHED[0] - TOUCHED[0] % 32 + 32)
        assert page_of(mapped, TOUCHED[0]) == snapshot.page(TOUCHED[0])
        wait_until(target.exists, "the recording")
        touched, written = [page for page in block if page != TOUCHED[0]][10:12]
        mapped[written * PAGE_SIZE : (written + 1) * PAGE_SIZE] = b"w" * PAGE_SIZE
        assert page_of(mapped, touched) == snapshot.page(touched)
        wait_until(lambda: cached_pages(mounted.ram_path) >= len(block), "the rest of the block")
        for page in block:
            assert page_of(mapped, page) == (b"w" * PAGE_SIZE if page == written else snapshot.page(page))


def test_pages_that_were_overwritten_whole_are_not_wanted(staged: Stage, snapshot: BuiltSnapshot) -> None:
    server = staged.serve(snapshot.folder)
    target = staged.folder / "recorded"
    mounted = staged.mount(server.address, "--prefetch", "none", "--record", target)
    descriptor = os.open(mounted.ram_path, os.O_RDWR)
    try:
        os.pwrite(descriptor, b"x" * PAGE_SIZE, 40 * PAGE_SIZE)
        os.pwrite(descriptor, b"x" * 10, 50 * PAGE_SIZE + 7)
    finally:
        os.close(descriptor)
    mounted.unmount()
    assert pages_of(read_set(target, snapshot)) == [50]


def test_nothing_touched_is_no_recording(staged: Stage, snapshot: BuiltSnapshot) -> None:
    target = staged.folder / "recorded"
    mounted = staged.mount(staged.serve(snapshot.folder).address, "--prefetch", "none", "--record", target)
    mounted.unmount()
    assert not target.exists()
    assert "nothing was recorded" in mounted.log.read_text()


def test_where_no_file_can_be_is_said_at_once(staged: Stage, snapshot: BuiltSnapshot) -> None:
    server = staged.serve(snapshot.folder)
    mounted = staged.mount(server.address, "--record", staged.folder / "missing" / "set", check=False)
    assert mounted.result.returncode == 2
    assert mounted.result.stderr.startswith("lazymem-mount: --record")
    assert mounted.result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("another", "another snapshot"),
        ("damaged", "damaged"),
        ("endless", "more than"),
        ("noise", "not one"),
        ("empty runs beyond", "beyond"),
    ],
)
def test_recordings_that_are_not_believed(staged: Stage, snapshot: BuiltSnapshot, kind: str, text: str) -> None:
    """One line in the log, and the mount is as without one."""
    good = a_set(snapshot, (100, 50), (7, 1))
    made = {
        "another": workingset.encode(WorkingSet(bytes(32), PAGES, (PageRange(1, 2),))),
        "damaged": good[:70] + b"\xff" + good[71:],
        "endless": good + bytes(5 << 20),
        "noise": random.Random(1).randbytes(3000),
        "empty runs beyond": _beyond(snapshot),
    }
    publish(snapshot, made[kind])
    mounted = staged.mount(staged.serve(snapshot.folder).address, "--prefetch", "working-set")
    touch(mounted, snapshot, 2500)
    status = mounted.status()
    assert status["demand_faults"] == 1
    assert status["working_set"] is None
    lines = [line for line in mounted.log.read_text().splitlines() if "working set is not used" in line]
    assert len(lines) == 1
    assert text in lines[0]


def _beyond(snapshot: BuiltSnapshot) -> bytes:
    """With a right checksum: what only somebody who wants to makes."""
    larger = WorkingSet(snapshot.identity, PAGES * 2, (PageRange(PAGES * 2 - 1, 1),))
    with pytest.raises(SnapshotError):
        workingset.decode(workingset.encode(larger), snapshot.identity, PAGES)
    body = bytearray(workingset.encode(larger)[: -workingset.CHECKSUM_BYTES])
    body[16:24] = PAGES.to_bytes(8, "little")
    return bytes(body) + blake3(bytes(body)).digest()


def test_a_server_learns_from_the_first_and_gives_to_the_next(staged: Stage, snapshot: BuiltSnapshot) -> None:
    learned = staged.folder / "learned"
    server = staged.serve(snapshot.folder, arguments=("--learn", str(learned)))
    first = staged.mount(server.address, "--prefetch", "none", name="first")
    touch(first, snapshot, *TOUCHED)
    first.unmount()
    [kept] = learned.iterdir()
    assert pages_of(read_set(kept, snapshot)) == list(TOUCHED)

    staged.cache = staged.folder / "fresh"
    second = staged.mount(server.address, "--prefetch", "working-set", name="second")
    wait_until(lambda: second.status()["pages_held"] >= len(TOUCHED), "what was learned")
    assert second.status()["pages_held"] == len(TOUCHED)
    touch(second, snapshot, *TOUCHED, 2222)
    assert second.status()["demand_faults"] == 1
    second.unmount()
    assert pages_of(read_set(kept, snapshot)) == list(TOUCHED), "the first one's stays"


def test_a_run_that_goes_on_is_not_learned(staged: Stage, snapshot: BuiltSnapshot) -> None:
    """It does not begin where the snapshot does."""
    plain = staged.serve(snapshot.folder)
    state = staged.folder / "state"
    first = staged.mount(plain.address, "--prefetch", "none", "--state", state, name="first")
    with first.open_map() as mapped:
        mapped[5 * PAGE_SIZE] = 1
        mapped.flush()
    first.unmount()
    learned = staged.folder / "learned"
    server = staged.serve(snapshot.folder, arguments=("--learn", str(learned)))
    second = staged.mount(server.address, "--prefetch", "none", "--state", state, name="second")
    with second.open_map() as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        assert page_of(mapped, 100) == snapshot.page(100)
    second.unmount()
    assert not list(learned.iterdir())


def test_a_learning_server_that_is_gone_holds_up_no_unmount(staged: Stage, snapshot: BuiltSnapshot) -> None:
    learned = staged.folder / "learned"
    server = staged.serve(snapshot.folder, arguments=("--learn", str(learned)))
    mounted = staged.mount(server.address, "--prefetch", "none")
    touch(mounted, snapshot, 1)
    server.kill()
    mounted.unmount()
    assert not list(learned.iterdir())
