"""The process that fills a mount's cache: it ends with its daemon, and the daemon goes on without it."""

from __future__ import annotations

import mmap
import os
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lazymem.cli.confinement import DAEMONS
from lazymem.cli.fillprocess import NICENESS
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import workingset
from lazymem.snapshot.workingset import WorkingSet
from tests.support.heldanswers import HeldGuesses
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.privileges import NOBODY, root_may_become_nobody
from tests.support.processstatus import status_of, threads_of
from tests.support.processtree import fillers_of, is_gone
from tests.support.skips import OTHERS, skip_without
from tests.support.slowlink import slow_link
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

PAGES = 4096


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", PAGES)


@pytest.fixture
def noise(tmp_path: Path) -> BuiltSnapshot:
    """No zero pages, and no two equal ones: whatever is held was fetched."""
    return make_snapshot(tmp_path / "noise", ram=random.Random(29).randbytes(PAGES * PAGE_SIZE))


@pytest.fixture
def slow(mounts: Stage, snapshot: BuiltSnapshot) -> Iterator[str]:
    """The address of a server behind a link that takes a minute for the snapshot."""
    with slow_link(mounts.serve(snapshot.folder).address, 250_000) as address:
        yield address


def filler_of(mounted: Mounted) -> int:
    wait_until(lambda: len(fillers_of(mounted.pid)) == 1, "the filling process")
    return fillers_of(mounted.pid)[0]


def pages_of(ranges: Iterable[PageRange]) -> set[int]:
    return {page for pages in ranges for page in range(pages.start, pages.end)}


def test_it_brings_everything_and_is_gone(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mounted = mounts.mount(mounts.serve(snapshot.folder).address)
    wait_until(lambda: mounted.status()["pages_held"] == PAGES, "all pages")
    pid = mounted.status()["pid"]
    wait_until(lambda: not fillers_of(pid), "the filling process to be waited for")
    status = mounted.status()
    assert 0 < status["pages_prefetched"] <= PAGES
    assert (status["demand_faults"], status["pages_in_flight"]) == (0, 0)
    assert status["wire_received_bytes"] > PAGES * 1000, "the fill's bytes are the mount's"
    assert mounted.ram_path.read_bytes() == snapshot.ram


@pytest.mark.parametrize("recorded", [(), (PageRange(2944, 640), PageRange(704, 32))], ids=["sweep", "set"])
def test_the_daemon_goes_on_when_it_is_killed(
    mounts: Stage, noise: BuiltSnapshot, recorded: tuple[PageRange, ...]
) -> None:
    """What it had on its way comes too, and a recorded set before the rest; and a demand before all of that."""
    if recorded:
        data = workingset.encode(WorkingSet(noise.identity, PAGES, recorded))
        (noise.folder / workingset.WORKING_SET_NAME).write_bytes(data)
    with HeldGuesses(mounts.serve(noise.folder).address) as link:
        mounted = mounts.mount(link.address)
        filler = filler_of(mounted)
        wait_until(lambda: len(link.guessed()) == 1, "it to ask")
        os.kill(filler, signal.SIGKILL)
        wait_until(lambda: "going on without it" in mounted.log.read_text(), "the daemon to notice")
        wait_until(lambda: len(link.guessed()) == 2, "the daemon to guess")
        lost, asked_again = map(pages_of, link.guessed())
        assert mounted.status()["pages_held"] == 0
        if recorded:
            assert lost | asked_again <= pages_of(recorded), "of both processes"
        descriptor = os.open(mounted.ram_path, os.O_RDONLY)
        try:
            assert os.pread(descriptor, PAGE_SIZE, (PAGES - 1) * PAGE_SIZE) == noise.page(PAGES - 1)
        finally:
            os.close(descriptor)
        link.holding = False
        wait_until(lambda: mounted.status()["pages_held"] == PAGES, "all pages")
        assert lost <= pages_of(link.guessed()[1]), "by the daemon, which did not take them for being on their way"
        assert mounted.ram_path.read_bytes() == noise.ram


@pytest.mark.parametrize("kill", [False, True])
def test_it_ends_with_its_daemon(mounts: Stage, slow: str, kill: bool) -> None:
    mounted = mounts.mount(slow)
    filler = filler_of(mounted)
    if kill:
        os.kill(mounted.pid, signal.SIGKILL)  # another daemon follows, with a filling process of its own
    else:
        mounted.unmount()
    wait_until(lambda: is_gone(filler), "the filling process to end")


def test_it_gives_way_and_hears_no_ctrl_c(mounts: Stage, slow: str) -> None:
    mounted = mounts.mount(slow)
    filler = filler_of(mounted)
    wanted = min(os.getpriority(os.PRIO_PROCESS, mounted.pid) + NICENESS, 19)
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, filler) == wanted, "it to give way")
    wait_until(lambda: Path(f"/proc/{filler}/oom_score_adj").read_text() == "500\n", "it to offer itself")
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(filler, number)
    held = mounted.status()["pages_held"]
    wait_until(lambda: mounted.status()["pages_held"] > held, "it to go on")
    assert not is_gone(filler)


def test_over_a_slow_link_the_first_touch_already_asks_for_its_page_alone(
    mounts: Stage, snapshot: BuiltSnapshot
) -> None:
    """And not for the 128 KiB that the kernel reads around it: nothing was answered yet that would tell how slow it is,
    but a ping."""
    with slow_link(mounts.serve(snapshot.folder).address, 250_000, 0.02) as address:
        mounted = mounts.mount(address)
        with mounted.ram_path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as ram:
            touched = 1000  # not near where the fill begins
            page = slice(touched * PAGE_SIZE, (touched + 1) * PAGE_SIZE)
            assert ram[page] == snapshot.ram[page]
        assert mounted.status()["pages_demanded"] == 1


def test_it_has_no_capability_and_root_daemon_only_its_units(mounts: Stage, slow: str) -> None:
    """It takes a server's bytes apart: in no thread has it what root has."""
    mounted = mounts.mount(slow)
    filler = filler_of(mounted)
    wait_until(lambda: status_of(filler)["NoNewPrivs"] == "1", "it to give up what it had")
    held = mounted.status()["pages_held"]
    wait_until(lambda: mounted.status()["pages_held"] > held, "it to go on")
    for status in threads_of(filler):
        assert {status[name].strip("0") for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {""}
        assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        allowed = sum(1 << capability for capability in DAEMONS)
        maybe_supervisor = mounted.status()["survival"]["supervisor_pid"]
        for pid in filter(None, (mounted.pid, maybe_supervisor)):
            for status in threads_of(pid):
                assert not int(status["CapEff"], 16) & ~allowed


@pytest.mark.needs_root
def test_it_reaches_another_users_socket(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Which only its owner may connect to, and who has the one capability that overrides that."""
    if not root_may_become_nobody():
        skip_without(OTHERS, "no other user's socket")
    path = tmp_path / "socket"
    mounts.serve(snapshot.folder, arguments=("--listen", f"unix:{path}"))
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o600)
    mounted = mounts.mount(f"unix:{path}")
    wait_until(lambda: mounted.status()["pages_held"] == PAGES, "all pages")
    assert "going on without it" not in mounted.log.read_text()
    assert mounted.status()["wire_received_bytes"] > PAGES * 1000


def test_pages_that_the_guest_wrote_are_not_asked_for(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The filling process sees the run's written pages."""
    first = mounts.mount(
        mounts.serve(snapshot.folder).address, "--prefetch", "none", "--state", mounts.folder / "state"
    )
    with first.ram_path.open("r+b") as file:
        file.write(bytes(range(1, 251)) * (PAGES * 4096 // 250))
        file.flush()
        os.fsync(file.fileno())
    written = first.status()["pages_written"]
    first.unmount()
    second = mounts.mount(mounts.serve(snapshot.folder).address, "--state", mounts.folder / "state", name="second")
    wait_until(lambda: not fillers_of(second.pid), "the filling process to find little to do")
    status = second.status()
    assert written >= PAGES - 1
    assert status["pages_prefetched"] <= PAGES - written


def test_none_is_started_where_nothing_is_to_be_filled(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mounted = mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")
    assert not fillers_of(mounted.pid)
