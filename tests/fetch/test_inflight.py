"""The in-flight table under random demands, answers, failures and cancellations: rule 4."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazymem.errors import VerificationError
from lazymem.fetch.inflight import Demand, InFlightTable, State, Want, cut_runs
from lazymem.pages import PAGE_SIZE, PageRange, PageRun

PAGES = 24


def page_bytes(page: int) -> bytes:
    return bytes([page + 1]) * PAGE_SIZE


def runs_of(pages: PageRange) -> tuple[PageRun, ...]:
    """One run for the first page, one for the rest: readers' borders and runs' borders differ."""
    first = PageRun(PageRange(pages.start, 1), page_bytes(pages.start))
    if pages.count == 1:
        return (first,)
    rest = PageRange(pages.start + 1, pages.count - 1)
    return first, PageRun(rest, b"".join(page_bytes(page) for page in range(rest.start, rest.end)))


ranges = st.builds(
    lambda start, count: PageRange(start, min(count, PAGES - start)), st.integers(0, PAGES - 1), st.integers(1, 8)
)


class Reader:
    def __init__(self, table: InFlightTable, pages: PageRange) -> None:
        self.woken = 0
        self.early: list[Want] = []
        """Wants of which all that it waited for came before they did."""
        self.demand: Demand = table.demand(pages, self.wake)

    def wake(self) -> None:
        self.woken += 1


class TableMachine(RuleBasedStateMachine):
    """Keeps its own list of wants and readers, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.table = InFlightTable()
        self.readers: list[Reader] = []
        self.wants: list[Want] = []
        self.early: dict[Want, set[int]] = {}

    def learn(self) -> None:
        for page in range(PAGES):
            want = self.table.find(page)
            if want is not None and want not in self.wants:
                self.wants.append(want)

    def learn_early(self) -> None:
        for reader in self.readers:
            pages = set(range(reader.demand.pages.start, reader.demand.pages.end))
            for want in reader.demand.wants:
                is_open = want.state in (State.WAITING, State.SENT)
                if is_open and pages.intersection(_pages(want)) <= self.early.get(want, set()):
                    reader.early.append(want)

    def some(self, data: st.DataObject, state: State) -> Want | None:
        wants = [want for want in self.wants if want.state is state]
        return data.draw(st.sampled_from(wants)) if wants else None

    @rule(pages=ranges)
    def demand(self, pages: PageRange) -> None:
        before = {page: self.table.find(page) for page in range(pages.start, pages.end)}
        self.readers.append(Reader(self.table, pages))
        for page, want in before.items():
            assert want is None or self.table.find(page) is want, "a page on its way was asked for again"
        self.learn()
        self.learn_early()

    @rule(pages=ranges)
    def guess(self, pages: PageRange) -> None:
        for piece in self.table.free(pages):
            self.table.add_background(piece)
        self.learn()

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        want = self.some(data, State.WAITING)
        if want is not None:
            self.table.sent(want)

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        want = self.some(data, State.SENT)
        if want is not None:
            self.table.arrived(want, runs_of(want.pages))

    @rule(data=st.data(), pages=ranges)
    def come_early(self, data: st.DataObject, pages: PageRange) -> None:
        """Some pages of it, cut anywhere: of its own frames, or of a second answer."""
        want = self.some(data, State.SENT)
        if want is not None and (runs := cut_runs(runs_of(pages), want.pages)):
            self.table.came_early(want, runs)
            self.early.setdefault(want, set()).update(page for run in runs for page in _run_pages(run))
            self.learn_early()

    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        want = self.some(data, State.SENT)
        if want is not None and want.demands:
            self.table.requeue(want)

    @rule(data=st.data(), state=st.sampled_from([State.WAITING, State.SENT]))
    def fail(self, data: st.DataObject, state: State) -> None:
        want = self.some(data, state)
        if want is not None:
            self.table.failed(want, VerificationError("wrong"))

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        want = self.some(data, State.HERE)
        if want is not None:
            self.table.kept(want)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.readers.remove(reader)
        woken = reader.woken
        orphans = self.table.leave(reader.demand)
        for orphan in orphans:
            assert orphan.state is State.SENT
            assert not orphan.demands
            if data.draw(st.booleans()):
                self.table.abandon(orphan)
        assert reader.woken == woken
        assert all(reader.demand not in want.demands for want in self.wants)

    @invariant()
    def each_page_is_in_one_want_that_is_not_gone(self) -> None:
        pages = [page for want in self.wants if want.state is not State.GONE for page in _pages(want)]
        assert len(pages) == len(set(pages)) == len(self.table)
        for want in self.wants:
            for page in _pages(want):
                assert (self.table.find(page) is want) is (want.state is not State.GONE)

    @invariant()
    def no_page_is_here_twice(self) -> None:
        for want in self.wants:
            if want.state is State.SENT:
                assert [page for run in want.runs for page in _run_pages(run)] == sorted(self.early.get(want, set()))

    @invariant()
    def counts_are_right(self) -> None:
        sent = [want for want in self.wants if want.state is State.SENT]
        here = [want for want in self.wants if want.state is State.HERE]
        assert self.table.in_flight_pages == sum(want.pages.count for want in sent)
        assert self.table.background_in_flight_pages == sum(want.pages.count for want in sent if want.background)
        assert self.table.unkept_pages == sum(want.pages.count for want in here)
        assert set(self.table.waiting) == {want for want in self.wants if want.state is State.WAITING}
        assert all(not want.background for want in self.table.waiting)

    @invariant()
    def readers_wake_exactly_when_their_pages_are_settled(self) -> None:
        for reader in self.readers:
            demand = reader.demand
            waited_for = [want for want in demand.wants if want not in reader.early]
            failed = any(want.error is not None for want in waited_for)
            still = [want for want in waited_for if want.state in (State.WAITING, State.SENT)]
            assert (demand.error is not None) is failed
            if failed:
                assert reader.woken == 1
            elif still:
                assert reader.woken == 0
            else:
                assert demand.open == 0
                assert reader.woken <= 1  # 0: everything was here when it asked
                data = b"".join(bytes(run.data or b"") for run in demand.collect())
                assert data == b"".join(page_bytes(page) for page in range(demand.pages.start, demand.pages.end))


def _pages(want: Want) -> range:
    return range(want.pages.start, want.pages.end)


def _run_pages(run: PageRun) -> range:
    return range(run.pages.start, run.pages.end)


TestTable = TableMachine.TestCase


def test_failure_is_raised_to_every_reader() -> None:
    table = InFlightTable()
    first, second = Reader(table, PageRange(0, 2)), Reader(table, PageRange(1, 2))
    wrong = VerificationError("page 1")
    want = table.find(1)
    assert want is not None
    table.failed(want, wrong)
    for reader in (first, second):
        with pytest.raises(VerificationError, match="page 1"):
            reader.demand.collect()
    assert table.find(0) is None
    assert table.find(2) is not None


def test_cut_runs_copies_nothing_and_keeps_zeros() -> None:
    data = b"".join(page_bytes(page) for page in range(4))
    runs = (PageRun(PageRange(0, 4), data), PageRun(PageRange(4, 4), None))
    cut = cut_runs(runs, PageRange(3, 3))
    assert [run.pages for run in cut] == [PageRange(3, 1), PageRange(4, 2)]
    assert isinstance(cut[0].data, memoryview)
    assert cut[0].data.obj is data
    assert cut[0].data == page_bytes(3)
    assert cut[1].data is None
