"""Guesses: what was recorded, then near the guest's own faults, then everything that is missing, and then an end."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lazymem.digests import LEAF_PAGES
from lazymem.fetch.guesses import GuessQueue
from lazymem.fetch.inflight import InFlightTable, Want
from lazymem.fetch.neighbourhood import MAX_REACH_PAGES, MIN_REACH_PAGES, Neighbourhoods
from lazymem.fetch.plan import Budget, Load, background_allowance
from lazymem.fetch.prefetch import Prepager, prepager
from lazymem.fetch.recorded import BLOCK_PAGES, RecordedSet
from lazymem.fetch.sweep import (
    LEAST_LEAVES_A_PLACE,
    MAX_LEAD_LEAVES,
    PLACE_PAGES,
    PLACES,
    SCOUT_LEAVES,
    sweep_of,
)
from lazymem.pages import PageRange

TOTAL = 1000

BLOCK = 128
"""Pages of a neighbourhood at the start."""


def all_missing(pages: PageRange, limit: int) -> PageRange:
    return PageRange(pages.start, min(limit, pages.count))


class Pages:
    """What is missing, as the sink would tell it."""

    def __init__(self, missing: set[int]) -> None:
        self.missing = missing

    def next_missing(self, pages: PageRange, limit: int) -> PageRange | None:
        first = min((page for page in self.missing if page in pages), default=None)
        if first is None:
            return None
        end = first
        while end in self.missing and end < min(first + limit, pages.end):
            end += 1
        return PageRange(first, end - first)

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        return [pages]

    def bring(self, prefetcher: Prepager, pages: PageRange) -> None:
        self.missing -= set(range(pages.start, pages.end))
        prefetcher.brought(pages)


def test_what_surrounds_the_latest_fault_comes_first() -> None:
    pages = Pages(set(range(TOTAL)))
    prefetcher = prepager(pages.next_missing, TOTAL)
    fault = PageRange(BLOCK * 2 + 10, 4)
    pages.bring(prefetcher, fault)
    prefetcher.faulted(fault)
    base, nearest = BLOCK * 2, MIN_REACH_PAGES
    assert prefetcher.next_range(64) == PageRange(fault.end, nearest - 14)
    assert prefetcher.next_range(64) == PageRange(base, 10)
    assert prefetcher.next_range(64) == PageRange(base + nearest, nearest)
    assert prefetcher.next_range(64) == PageRange(base + 2 * nearest, BLOCK - 2 * nearest)
    assert prefetcher.next_range(64) == PageRange(0, 64)
    assert prefetcher.next_range(64) == PageRange(64, 64)


def test_what_is_nearest_to_any_of_the_latest_faults_comes_before_what_is_wider_around_one() -> None:
    neighbourhoods = Neighbourhoods(Pages(set(range(TOTAL))).next_missing, TOTAL)
    faults = [31, 300, 799]
    for fault in faults:
        neighbourhoods.faulted(PageRange(fault, 1))
    nearest = MIN_REACH_PAGES
    guessed: list[int] = []
    while (guess := neighbourhoods.next_range(8)) is not None:
        guessed += range(guess.start, guess.end)
    of_nearest = [page for page in guessed if any(page // nearest == fault // nearest for fault in faults)]
    assert guessed[: len(of_nearest)] == of_nearest, "these first"
    assert [page // nearest for page in of_nearest[:: nearest - 1]] == [799 // nearest, 300 // nearest, 0], "the latest"
    blocks = {page for fault in faults for page in range(fault - fault % BLOCK, fault - fault % BLOCK + BLOCK)}
    assert sorted(guessed) == sorted(blocks - set(faults))


def test_fault_at_the_end_guesses_nothing_behind_it() -> None:
    pages = Pages(set(range(TOTAL)))
    prefetcher = prepager(pages.next_missing, TOTAL)
    prefetcher.faulted(PageRange(TOTAL - 1, 1))
    first = prefetcher.next_range(1000)
    assert first is not None
    assert first.end == TOTAL - 1


def test_only_so_many_neighbourhoods_are_kept() -> None:
    """The guest has moved on: the rest is the sweep's."""
    pages = Pages(set(range(0, 2_000_000, 1000)))
    neighbourhoods = Neighbourhoods(pages.next_missing, 2_000_000)
    for fault in range(0, 2_000_000, 1000):
        neighbourhoods.faulted(PageRange(fault + 1, 1))
    guesses = 0
    while neighbourhoods.next_range(64) is not None:
        guesses += 1
    assert 0 < guesses <= 32


def test_neighbourhoods_shrink_to_nothing_while_faults_are_far_apart() -> None:
    neighbourhoods = Neighbourhoods(all_missing, 1 << 24)
    assert neighbourhoods.reach_pages == BLOCK
    for number in range(100):
        neighbourhoods.faulted(PageRange((number * 7919) % 4096 * 4096, 32))
    assert neighbourhoods.reach_pages == MIN_REACH_PAGES
    assert not neighbourhoods.is_near
    while neighbourhoods.next_range(64) is not None:
        pass
    neighbourhoods.faulted(PageRange(100 * 4096, 1))
    assert neighbourhoods.next_range(64) is None, "any other page is as likely"


def test_neighbourhoods_grow_while_faults_stay_near() -> None:
    neighbourhoods = Neighbourhoods(all_missing, 1 << 24)
    for number in range(100):
        neighbourhoods.faulted(PageRange(5_000_000 + number * 32, 32))
    assert neighbourhoods.reach_pages == MAX_REACH_PAGES
    assert neighbourhoods.is_near


def test_faults_at_random_within_a_quarter_of_a_gigabyte_are_not_near() -> None:
    rng = random.Random(3)
    neighbourhoods = Neighbourhoods(all_missing, 1 << 24)
    near = []
    for _ in range(1100):
        neighbourhoods.faulted(PageRange(rng.randrange(1 << 16), 1))
        near.append(neighbourhoods.is_near)
    assert sum(near[100:]) < 50, "but for chance"


@given(
    st.sets(st.integers(0, TOTAL - 1)),
    st.lists(st.integers(0, TOTAL - 1), max_size=10),
    st.integers(1, 100),
    st.integers(0, 5),
)
def test_everything_is_guessed_once_and_then_it_ends(
    missing: set[int], faults: list[int], limit: int, in_flight: int
) -> None:
    """Answers come `in_flight` requests late; what is out is filtered as the scheduler does."""
    pages = Pages(set(missing))
    prefetcher = prepager(pages.next_missing, TOTAL)
    out: list[PageRange] = []
    asked: list[int] = []
    for _ in range(5000):
        if faults:
            prefetcher.faulted(PageRange(faults.pop(), 1))
        guess = prefetcher.next_range(limit)
        if guess is None:
            if not out:
                break
            pages.bring(prefetcher, out.pop(0))
            continue
        assert guess.count <= limit
        fresh = [page for page in range(guess.start, guess.end) if not any(page in flight for flight in out)]
        asked += fresh
        if fresh:
            out.append(guess)
        if len(out) > in_flight:
            pages.bring(prefetcher, out.pop(0))
    else:
        raise AssertionError("it never ends")
    assert sorted(asked) == sorted(missing)
    assert not pages.missing


def test_pages_that_never_come_do_not_keep_it_busy() -> None:
    pages = Pages({3, 700})
    prefetcher = prepager(pages.next_missing, TOTAL)
    guesses = 0
    while prefetcher.next_range(64) is not None:
        guesses += 1
        assert guesses < 10
    assert prefetcher.next_range(64) is None
    prefetcher.brought(PageRange(5, 1))
    assert prefetcher.next_range(64) == PageRange(3, 1)


class Leaves(Pages):
    """A hashed snapshot: leaves come along with the pages, and their zero pages are then held."""

    def __init__(self, missing: set[int], zeros: set[int]) -> None:
        super().__init__(missing | zeros)
        self.zeros = zeros
        self.known: set[int] = set()
        self.leaves_sent = 0

    def leaf_missing(self, pages: PageRange) -> bool:
        return any(page // LEAF_PAGES not in self.known for page in range(pages.start, pages.end))

    def bring_with_leaves(self, prefetcher: Prepager, pages: PageRange, wanted: bool) -> None:
        for leaf in {page // LEAF_PAGES for page in range(pages.start, pages.end)}:
            self.leaves_sent += wanted
            self.known.add(leaf)
            self.missing -= {page for page in self.zeros if page // LEAF_PAGES == leaf}
        self.bring(prefetcher, pages)


def test_scouts_bring_leaves_before_the_sweep() -> None:
    leaves = 40
    total = leaves * LEAF_PAGES
    zeros = {page for page in range(total) if page % 3}
    pages = Leaves(set(range(total)) - zeros, zeros)
    prefetcher = prepager(pages.next_missing, total, maybe_leaf_missing=pages.leaf_missing)
    scouts = [prefetcher.next_range(64) for _ in range(SCOUT_LEAVES)]
    assert scouts == [PageRange(leaf * LEAF_PAGES, 1) for leaf in range(SCOUT_LEAVES)]
    for scout in scouts:
        assert scout is not None
        pages.bring_with_leaves(prefetcher, scout, pages.leaf_missing(scout))
    asked: list[int] = [scout.start for scout in scouts if scout]
    while (guess := prefetcher.next_range(64)) is not None:
        asked += range(guess.start, guess.end)
        pages.bring_with_leaves(prefetcher, guess, pages.leaf_missing(guess))
    assert len(asked) == len(set(asked))
    assert set(asked) - {leaf * LEAF_PAGES for leaf in range(leaves)} == {
        page for page in range(total) if page not in zeros and page % LEAF_PAGES
    }
    assert pages.leaves_sent == leaves


def test_a_sweep_goes_on_without_its_scouts_in_the_end() -> None:
    """They never arrive, nor does anything else: every page is guessed, and then it ends."""
    total = (MAX_LEAD_LEAVES + 20) * LEAF_PAGES
    pages = Leaves(set(range(total)), set())
    prefetcher = prepager(all_missing, total, maybe_leaf_missing=lambda _: True)
    guesses = []
    while (guess := prefetcher.next_range(256)) is not None:
        guesses.append(guess)
        assert len(guesses) < 4000
    assert len({page for guess in guesses for page in range(guess.start, guess.end)}) == len(pages.missing)
    first_swept = next(index for index, guess in enumerate(guesses) if guess.count > 1)
    assert SCOUT_LEAVES <= first_swept <= PLACES * MAX_LEAD_LEAVES


@given(
    st.sets(st.integers(0, TOTAL - 1)),
    st.sets(st.integers(0, TOTAL - 1)),
    st.lists(st.integers(0, TOTAL - 1), max_size=10),
    st.integers(1, 300),
    st.integers(0, 5),
)
def test_with_scouts_too_everything_comes_and_then_it_ends(
    missing: set[int], zeros: set[int], faults: list[int], limit: int, in_flight: int
) -> None:
    pages = Leaves(missing - zeros, zeros)
    prefetcher = prepager(pages.next_missing, TOTAL, maybe_leaf_missing=pages.leaf_missing)
    out: list[tuple[PageRange, bool]] = []
    for _ in range(5000):
        if faults:
            prefetcher.faulted(PageRange(faults.pop(), 1))
        guess = prefetcher.next_range(limit)
        if guess is None:
            if not out:
                break
            pages.bring_with_leaves(prefetcher, *out.pop(0))
            continue
        assert guess.count <= limit
        if any(all(page not in flight for flight, _ in out) for page in range(guess.start, guess.end)):
            out.append((guess, pages.leaf_missing(guess)))
        if len(out) > in_flight:
            pages.bring_with_leaves(prefetcher, *out.pop(0))
    else:
        raise AssertionError("it never ends")
    assert not pages.missing


# --- a recorded working set


def test_what_was_recorded_comes_first_and_in_its_order() -> None:
    pages = Pages(set(range(TOTAL)))
    runs = (PageRange(500, 3), PageRange(10, 100), PageRange(700, 1))
    strategy = prepager(pages.next_missing, TOTAL, recorded=runs, sweep=False)
    strategy.faulted(PageRange(900, 1))
    asked = [strategy.next_range(64) for _ in range(6)]
    assert asked[:4] == [PageRange(500, 3), PageRange(10, 64), PageRange(74, 36), PageRange(700, 1)]
    assert asked[4:] == [PageRange(901, 27), PageRange(896, 4)], "of 896 to 928"


def test_nothing_is_guessed_while_others_bring_the_set() -> None:
    """Faults are noted meanwhile: what surrounds them is guessed afterwards."""
    others: list[str] = ["bring it"]
    strategy = prepager(Pages(set(range(TOTAL))).next_missing, TOTAL, others_bring_set=lambda: bool(others))
    strategy.faulted(PageRange(320, 1))
    assert strategy.next_range(64) is None
    others.clear()
    assert strategy.next_range(64) == PageRange(321, MIN_REACH_PAGES - 1)


def test_what_surrounds_recorded_pages_comes_along_where_that_is_wished() -> None:
    """To the borders of their blocks, in the order of the set, and a block once."""
    pages = Pages(set(range(4 * BLOCK_PAGES)) - {BLOCK_PAGES + 1})
    runs = (PageRange(BLOCK_PAGES + 5, 2), PageRange(3, 1), PageRange(BLOCK_PAGES + 9, 1))
    recorded = RecordedSet(pages.next_missing, runs, lambda: True)
    found: list[int] = []
    while (guess := recorded.next_range(64)) is not None:
        found += range(guess.start, guess.end)
        pages.missing -= set(range(guess.start, guess.end))
    assert found == [page for page in range(BLOCK_PAGES, 2 * BLOCK_PAGES) if page != BLOCK_PAGES + 1] + list(
        range(BLOCK_PAGES)
    )


def test_recorded_pages_that_are_here_are_not_asked_for() -> None:
    pages = Pages(set(range(0, TOTAL, 2)))
    recorded = RecordedSet(pages.next_missing, (PageRange(9, 4), PageRange(1, 1), PageRange(3, 2)))
    found = []
    while (guess := recorded.next_range(64)) is not None:
        found.append(guess)
        pages.missing -= set(range(guess.start, guess.end))
    assert found == [PageRange(10, 1), PageRange(12, 1), PageRange(4, 1)]


def test_whether_the_set_is_still_coming() -> None:
    pages = Pages(set(range(TOTAL)))
    strategy = prepager(pages.next_missing, TOTAL, recorded=(PageRange(5, 1),))
    assert strategy.set_is_coming
    strategy.next_range(8)
    strategy.next_range(8)
    assert not strategy.set_is_coming
    assert not prepager(pages.next_missing, TOTAL).set_is_coming


@st.composite
def _disjoint(draw: st.DrawFn) -> tuple[PageRange, ...]:
    found = []
    at = 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), max_size=12)):
        if at + gap + count > TOTAL:
            break
        found.append(PageRange(at + gap, count))
        at += gap + count
    return tuple(draw(st.permutations(found)))


class Run:
    """The strategy behind the queue and the table that it runs behind in the daemon; the test is the link."""

    def __init__(self, missing: set[int], recorded: tuple[PageRange, ...], sweep: bool) -> None:
        self.sink = Pages(set(missing))
        self.table = InFlightTable()
        self.strategy = prepager(self.sink.next_missing, TOTAL, recorded=recorded, sweep=sweep)
        self.queue = GuessQueue(self.table, self.sink, self.strategy)  # type: ignore[arg-type]  # the part it needs
        self.out: list[Want] = []
        self.guessed: list[int] = []
        self.demanded: set[int] = set()

    def demand(self, page: int) -> None:
        """As `Scheduler.demand`, with every request slot taken: it waits unsent."""
        if page in self.sink.missing and self.table.find(page) is None:
            self.table.demand(PageRange(page, 1), lambda: None)
            self.demanded.add(page)
        self.strategy.faulted(PageRange(page, 1))

    def guess(self, window: int) -> bool:
        load = Load(len(self.table.waiting), self.table.background_in_flight_pages, self.table.unkept_pages)
        allowed = background_allowance(self.table.has_waiting, load, Budget(), window)
        if self.table.has_waiting:
            assert not allowed, "a demand goes first"
        if not allowed:
            return False
        wants, _ = self.queue.take(allowed)
        for want in wants:
            pages = range(want.pages.start, want.pages.end)
            assert self.sink.missing.issuperset(pages), "asks for a held page"
            self.guessed += pages
        self.out += wants
        assert self.table.background_in_flight_pages <= window
        return bool(wants)

    def answer(self) -> None:
        """The oldest demand, or else the oldest guess, arrives and is kept."""
        waiting = self.table.waiting
        if waiting:
            self.table.sent(waiting[0])
        want = waiting[0] if waiting else self.out.pop(0)
        self.table.arrived(want, ())
        self.sink.missing -= set(range(want.pages.start, want.pages.end))
        self.table.kept(want)
        self.strategy.brought(want.pages)


@given(
    st.sets(st.integers(0, TOTAL - 1)),
    _disjoint(),
    st.booleans(),
    st.integers(1, 100),
    st.lists(st.sampled_from(["guess", "answer", "fault"]), max_size=60),
    st.lists(st.integers(0, TOTAL - 1), min_size=1, max_size=60),
)
def test_the_promises_of_the_whole(
    missing: set[int], recorded: tuple[PageRange, ...], sweep: bool, window: int, steps: list[str], faults: list[int]
) -> None:
    """Never a held page, never beyond the window, demand before everything, each wanted page in the end, none twice."""
    run = Run(missing, recorded, sweep)
    for number, step in enumerate(steps):
        if step == "fault":
            run.demand(faults[number % len(faults)])
        elif step == "answer" and (run.out or run.table.has_waiting):
            run.answer()
        else:
            run.guess(window)
    for _ in range(20_000):
        if run.out or run.table.has_waiting:
            run.answer()
        elif not run.guess(window):
            break
    else:
        raise AssertionError("it never ends")
    wanted = missing if sweep else {page for pages in recorded for page in range(pages.start, pages.end)} & missing
    assert wanted <= set(run.guessed) | run.demanded
    assert not wanted & run.sink.missing
    assert len(run.guessed) == len(set(run.guessed)), "a page was asked for twice"


@given(st.integers(1, 2 * PLACES * LEAST_LEAVES_A_PLACE), st.integers(0, LEAF_PAGES - 1), st.integers(30, 300))
def test_a_large_ram_is_swept_in_several_places_by_turns_and_no_page_twice(leaves: int, more: int, room: int) -> None:
    total = leaves * LEAF_PAGES - more

    sweeps = sweep_of(all_missing, total)
    found = []
    while (guess := sweeps.next_range(room)) is not None:
        assert guess.count <= room
        assert guess.start // LEAF_PAGES == (guess.end - 1) // LEAF_PAGES, "two leaves would be two frames"
        found.append(guess)
    assert sum(guess.count for guess in found) == total
    assert all(before.end <= after.start for before, after in pairwise(sorted(found)))
    if leaves >= PLACES * LEAST_LEAVES_A_PLACE:
        first = found[: PLACES * PLACE_PAGES]
        assert len({guess.start // (LEAST_LEAVES_A_PLACE * LEAF_PAGES) for guess in first}) >= PLACES
