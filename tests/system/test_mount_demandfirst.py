"""A demand beside a fill over a slow link: how much that was only guessed comes before its answer (rule 5)."""

from __future__ import annotations

import mmap
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from lazymem_server.pace import frame_pages_at, unsent_bytes_at

from lazymem.fetch.neighbourhood import NEAR_SHIFT
from lazymem.fetch.scheduler import DEMANDED_SECONDS
from lazymem.fetch.window import BEHIND_DEMANDS, GAIN
from lazymem.pages import PAGE_SIZE
from tests.support.countinglink import CountingLink
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.slowlink import slow_link
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

PAGES = 16384

RATE = 2_500_000
ROUND_TRIP_SECONDS = 0.05
PRODUCT_BYTES = int(RATE * ROUND_TRIP_SECONDS)

ALLOWED = 1.25
"""Times the product: by so much a busy machine's relay, and what is measured of it, are off."""

DEMANDS = 9
"""The middle one of so many counts: a process that stood still for a moment takes what has piled up meanwhile for a
faster link, for some round trips."""


def most_before(gain: float) -> float:
    """Bytes of guesses before an answer: so many products of bandwidth and delay are out at a time. What comes beyond
    them is a frame that has begun, and what the server's kernel has taken and not sent."""
    return gain * ALLOWED * PRODUCT_BYTES + frame_pages_at(RATE) * PAGE_SIZE + unsent_bytes_at(RATE)


@pytest.fixture
def noise(tmp_path: Path) -> BuiltSnapshot:
    """Whose pages are on the wire what they are in memory: the fill takes half a minute."""
    return make_snapshot(tmp_path / "noise", ram=random.Random(5).randbytes(PAGES * PAGE_SIZE))


@pytest.fixture
def link(mounts: Stage, noise: BuiltSnapshot) -> Iterator[CountingLink]:
    with (
        slow_link(mounts.serve(noise.folder).address, RATE, ROUND_TRIP_SECONDS) as far_end,
        CountingLink(far_end) as link,
    ):
        yield link


class Guest:
    """Reads pages past the kernel's cache, one READ of one page each. They are so far from each other that nothing is
    guessed around them: no two blocks of `neighbourhood.NEAR_SHIFT` are the same or side by side."""

    def __init__(self, mounted: Mounted, link: CountingLink, noise: BuiltSnapshot) -> None:
        self._descriptor = os.open(mounted.ram_path, os.O_RDONLY | os.O_DIRECT)
        self._link = link
        self._noise = noise
        blocks = random.Random(6).sample(range(0, PAGES >> NEAR_SHIFT, 2), PAGES >> NEAR_SHIFT + 1)
        self._pages = ((block + 1 << NEAR_SHIFT) - 1 for block in blocks)

    def demand(self) -> int:
        """A page that is missing and not on its way; returns how many bytes of guesses came before it."""
        link = self._link
        answers = len(link.before_answers)
        with mmap.mmap(-1, PAGE_SIZE) as buffer:
            while len(link.before_answers) == answers:
                page = next(self._pages)
                os.preadv(self._descriptor, [buffer], page * PAGE_SIZE)
                assert buffer[:] == self._noise.page(page)
        return link.before_answers[answers]

    def close(self) -> None:
        os.close(self._descriptor)


def wait_filled(mounted: Mounted, pages: int) -> None:
    held = mounted.status()["pages_held"]
    wait_until(lambda: mounted.status()["pages_held"] >= held + pages, "the fill to go on")


def test_guesses_before_a_demand_are_about_a_product_of_bandwidth_and_delay(
    mounts: Stage, noise: BuiltSnapshot, link: CountingLink
) -> None:
    """Two for one that nobody expected, and one while they go on. Bytes are counted, and nothing is timed."""
    mounted = mounts.mount(link.address)
    wait_filled(mounted, 1000)
    guest = Guest(mounted, link, noise)
    try:
        unexpected = []
        for _ in range(DEMANDS):
            unexpected.append(guest.demand())
            wait_filled(mounted, int(2 * DEMANDED_SECONDS * RATE / PAGE_SIZE))  # in no less time than the link takes
        expected = [guest.demand() for _ in range(2 * DEMANDS)][DEMANDS:]
    finally:
        guest.close()
    assert mounted.status()["pages_held"] < PAGES, "the fill went on"
    assert 0 < statistics.median(unexpected) <= most_before(GAIN)
    assert 0 < statistics.median(expected) <= most_before(BEHIND_DEMANDS.gain)
