"""A guest touches one page of a huge page that is missing: what the server is asked for then, and in which order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.fs.readorder import BLOCK_PAGES, MOST_OUT
from lazymem.pages import PAGE_SIZE, PageRange
from tests.support.heldanswers import HeldAnswers
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.skips import needs_fault_counts
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [pytest.mark.system, needs_fault_counts]

READ_PAGES = 32
"""128 KiB, `session.MAX_READ_BYTES`."""

TRIES = 12
"""The daemon looks at a guest that has just mapped the RAM now and then: a few touches may be before it did."""

_GUEST = """
import mmap, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
ram = mmap.mmap(descriptor, 0)
ram.madvise(mmap.MADV_HUGEPAGE)
print("mapped", flush=True)
for line in sys.stdin:
    print(ram[int(line) << 12 : (int(line) << 12) + 4096].hex(), flush=True)
"""


class Guest:
    """A process that has the RAM mapped as QEMU has it, and touches a page when told to."""

    def __init__(self, ram: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GUEST, str(ram)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "mapped"

    def touch(self, page: int) -> None:
        assert self._process.stdin is not None
        print(page, file=self._process.stdin, flush=True)

    def touched(self) -> bytes:
        """The page, once it is there."""
        return bytes.fromhex(self._line())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def noise(tmp_path: Path) -> BuiltSnapshot:
    """`TRIES` huge pages without zeros, and one on each side: towards its end a file is read less far ahead."""
    return make_snapshot(tmp_path / "noise", ram=random.Random(35).randbytes((TRIES + 2) * BLOCK_PAGES * PAGE_SIZE))


def counters(mount: Mounted) -> int:
    """Threads whose faults its daemon hears of, itself among them."""
    return Path(f"/proc/{mount.pid}/maps").read_text().count("[perf_event]")


class OneMillisecondMount(Mounted):
    """Else a machine on which no answer comes in 5 ms would have a slow link, over which read-ahead is refused."""

    MODULE = "tests.support.onemillisecondmount"


def requests_waiting(mount: Mounted) -> int:
    """Of the kernel's, be they taken by the daemon or not."""
    minor = os.minor(os.stat(mount.path).st_dev)
    return int(Path(f"/sys/fs/fuse/connections/{minor}/waiting").read_text())


def asked_while_held(mount: Mounted, link: HeldAnswers, guest: Guest, page: int) -> list[PageRange]:
    """What the server is asked for when the guest touches the page, while nothing of it comes."""
    before = len(link.asked())
    link.holding = True
    guest.touch(page)
    wait_until(lambda: requests_waiting(mount) >= BLOCK_PAGES // READ_PAGES, "the kernel to ask for all of it")
    mount.status()  # what the kernel asked for before this has been taken
    wait_until(lambda: any(page in pages for pages in link.asked()[before:]), "it to be asked for")
    asked = link.asked()[before:]
    link.holding = False
    return asked


@pytest.mark.needs_root
def test_the_touched_page_of_a_huge_one_is_asked_for_before_the_rest(mounts: Stage, noise: BuiltSnapshot) -> None:
    """While answers are held back, few others are asked for at all; and in the end all of them are right."""
    with HeldAnswers(mounts.serve(noise.folder).address) as link:
        link.delay_seconds = 0.0005  # each way: not one over which the daemon waits for an answer in one go
        mount = mounts.mount(link.address, "--prefetch", "none", kind=OneMillisecondMount)
        guest = Guest(mount.ram_path)
        tried = []
        try:
            wait_until(lambda: counters(mount) > 1, "the guest's faults to be counted")
            for block in range(1, TRIES + 1):
                page = (block + 1) * BLOCK_PAGES - 3 * READ_PAGES // 2  # in the last but one of its READs
                asked = asked_while_held(mount, link, guest, page)
                assert guest.touched() == noise.page(page)
                tried.append(len(asked))
                if len(asked) <= MOST_OUT + 1:
                    break
            else:
                pytest.fail(f"the others do not wait for it: {tried}")
        finally:
            link.holding = False
            guest.end()
        assert PageRange(page - READ_PAGES // 2, READ_PAGES) in asked
        assert mount.ram_path.read_bytes() == noise.ram
