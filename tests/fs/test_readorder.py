"""Which READ goes when: what somebody waits for at once, of the rest few at a time, and in the end all of them."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fs.readorder import BLOCK_PAGES, MOST_OUT, Aside, ReadOrder, Touch
from lazymem.pages import PAGE_SHIFT

READ_PAGES = 32
READS = BLOCK_PAGES // READ_PAGES


class World:
    """A kernel, what it knows of threads' touches, and a channel. `started`: READs by number, in order."""

    def __init__(self) -> None:
        self.touches: dict[int, Touch] = {}
        self.held: set[int] = set()
        self.pays = True
        self.reads: dict[int, Aside] = {}
        self.open: dict[int, int] = {}
        self.started: list[int] = []
        self.order = ReadOrder(self, self.at_hand, lambda: self.pays)

    def maybe_latest(self, thread: int) -> Touch | None:
        return self.touches.get(thread)

    def latest(self) -> Collection[Touch]:
        return self.touches.values()

    def at_hand(self, offset: int, size: int) -> bool:
        return self.held.issuperset(range(offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT))

    @property
    def out(self) -> set[int]:
        return set(self.open) - set(self.order.aside)

    def touch(self, thread: int, page: int) -> None:
        stamp = self.touches[thread].stamp + 1 if thread in self.touches else 1
        self.touches[thread] = Touch(thread, page, stamp)

    def read(self, thread: int, page: int, count: int = READ_PAGES) -> int:
        """The kernel sends it; its number."""
        unique = len(self.reads) + 1
        self.reads[unique] = Aside(unique, thread, page << PAGE_SHIFT, count << PAGE_SHIFT)
        self.open[unique] = thread
        if not self.order.puts_aside(*self.reads[unique], self.open):
            self.started.append(unique)
        return unique

    def burst(self, thread: int, block: int) -> list[int]:
        """All of a huge page, from its beginning on."""
        return [self.read(thread, block * BLOCK_PAGES + number * READ_PAGES) for number in range(READS)]

    def go_on(self, *, everything: bool = False) -> list[int]:
        """As the channel when one has ended, or no more come: what was started."""
        found = []
        while (due := self.order.maybe_due(self.open, everything=everything)) is not None:
            assert due == self.reads[due.unique]
            found.append(due.unique)
        self.started += found
        return found

    def answer(self, unique: int) -> list[int]:
        """It is given to the kernel, and held."""
        read = self.reads[unique]
        self.held.update(range(read.offset >> PAGE_SHIFT, (read.offset + read.size) >> PAGE_SHIFT))
        del self.open[unique]
        return self.go_on()

    def waited_for(self) -> set[int]:
        """Of those that are open, what has a page that somebody waits for."""
        pages = {touch.page for touch in self.touches.values()} - self.held
        return {unique for unique in self.open if any(self.reads[unique].has(page) for page in pages)}


def test_the_touched_one_goes_first_and_then_the_nearest_rather_behind_it() -> None:
    world = World()
    world.touch(7, 5 * READ_PAGES + 3)
    uniques = world.burst(7, 0)
    assert world.started == [uniques[5]], "though five came before it"
    assert world.go_on() == [uniques[number] for number in (6, 7, 4, 8)]
    assert len(world.out) == MOST_OUT
    assert world.answer(uniques[7]) == [uniques[9]]
    assert world.answer(uniques[6]) == [uniques[3]]


def test_one_that_is_touched_later_goes_at_once_however_many_are_out() -> None:
    world = World()
    world.touch(7, 0)
    uniques = world.burst(7, 0)
    world.go_on()
    world.touch(7, 14 * READ_PAGES)
    assert world.go_on() == [uniques[14]]
    world.touch(8, 12 * READ_PAGES + 1)  # another thread, whose own READs did not come: its page is locked
    assert world.go_on() == [uniques[12]]
    assert len(world.out) == MOST_OUT + 2


def test_what_is_behind_the_huge_page_waits_too() -> None:
    world = World()
    world.touch(7, 3)
    world.burst(7, 0)
    world.burst(7, 1)
    assert world.started == [1]


def test_without_a_touch_that_somebody_waits_for_nothing_is_put_aside() -> None:
    """Not known; of another place; its page is here; its READ was answered, though the page is not held yet."""
    world = World()
    world.burst(7, 0)
    world.touch(7, 9 * BLOCK_PAGES)
    world.burst(7, 1)
    world.touch(7, 2 * BLOCK_PAGES)
    world.held.add(2 * BLOCK_PAGES)
    world.burst(7, 2)
    assert len(world.started) == 3 * READS
    world.touch(7, 3 * BLOCK_PAGES)
    first = world.read(7, 3 * BLOCK_PAGES)
    del world.open[first]
    world.read(7, 3 * BLOCK_PAGES + READ_PAGES)
    assert len(world.started) == 3 * READS + 2
    assert not world.order.aside


def test_a_touch_that_comes_again_is_another_one() -> None:
    """The kernel dropped the page meanwhile, and so did the cache."""
    world = World()
    world.touch(7, 0)
    world.answer(world.read(7, 0))
    world.held.clear()
    world.touch(7, 0)
    world.read(7, READ_PAGES)
    assert list(world.order.aside) == [2]


def test_what_is_at_hand_is_not_put_aside() -> None:
    world = World()
    world.held.update(range(READ_PAGES, 2 * READ_PAGES))
    world.touch(7, 0)
    uniques = world.burst(7, 0)
    assert world.started == uniques[:2]


def test_where_it_does_not_pay_nothing_is_put_aside_nor_stays_so() -> None:
    world = World()
    world.touch(7, 0)
    world.burst(7, 0)
    world.pays = False
    world.burst(7, 1)
    assert len(world.started) == READS + 1
    assert len(world.go_on()) == READS - 1


def test_everything_is_started_where_there_is_a_reason() -> None:
    world = World()
    world.touch(7, 0)
    uniques = world.burst(7, 0)
    assert sorted(world.go_on(everything=True)) == uniques[1:]


def test_of_very_many_threads_the_touches_are_forgotten_and_all_goes_on() -> None:
    world = World()
    for thread in range(1, 400):
        world.touch(thread, thread * 2 * BLOCK_PAGES)
        world.read(thread, thread * 2 * BLOCK_PAGES)
    assert len(world.started) == 399
    assert len(world.order._asked) <= 256


ACTIONS = st.one_of(
    st.tuples(st.just("touch"), st.integers(1, 3), st.integers(0, 4 * BLOCK_PAGES - 1)),
    st.tuples(st.just("burst"), st.integers(1, 3), st.integers(0, 3)),
    st.tuples(st.just("one"), st.integers(1, 3), st.integers(0, 4 * BLOCK_PAGES - READ_PAGES)),
    st.tuples(st.just("answer"), st.integers(0, 200), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 200), st.just(0)),
    st.tuples(st.just("pays"), st.integers(0, 3), st.just(0)),
)


@given(st.lists(ACTIONS, max_size=40))
def test_whatever_happens_each_is_started_once_and_few_are_out(actions: list[tuple[str, int, int]]) -> None:
    world = World()
    killed: set[int] = set()
    at_once: set[int] = set()  # the touched ones, and what came while nobody was known to wait: no number bounds them
    for kind, one, other in actions:
        before = len(world.started)
        if kind == "touch":
            world.touch(one, other)
        elif kind == "burst":
            world.burst(one, other)
        elif kind == "one":
            world.read(one, other)
        elif kind == "pays":
            world.pays = bool(one)
        elif world.open:
            unique = sorted(world.open)[one % len(world.open)]
            if kind == "answer" and unique in world.out:
                world.answer(unique)
            else:
                del world.open[unique]
                killed.add(unique)
        at_once.update(set(world.started[before:]) if kind in ("burst", "one") else ())
        at_once |= world.waited_for()
        started = world.go_on()
        if world.pays:
            assert len(world.out - at_once) <= MOST_OUT
        else:
            at_once.update(started)
            assert not world.order.aside
        assert not world.waited_for() & set(world.order.aside), "it goes at once"
        assert world.out or not world.order.aside, "somebody has it go on"
        assert set(world.order.aside) <= set(world.open), "who was killed is forgotten"
    while world.out:
        world.answer(min(world.out))
        assert len(set(world.started)) == len(world.started), "each once"
    assert not world.order.aside
    assert set(world.started) | killed == set(world.reads)
