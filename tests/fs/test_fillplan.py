"""Steps of the page cache's filling: what is ready, whole, nothing else, none larger than the kernel takes."""

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fs import fillplan
from lazymem.fs.session import MAX_READ_BYTES
from lazymem.pages import PAGE_SIZE, PageRange

states_of = st.lists(st.sampled_from([fillplan.DONE, fillplan.READY, fillplan.MISSING]), max_size=200).map(bytes)


def test_a_step_is_one_request() -> None:
    assert fillplan.STEP_PAGES * PAGE_SIZE == MAX_READ_BYTES


@given(first=st.integers(0, 1 << 40), states=states_of)
def test_runs_are_all_ready_pages_and_no_others(first: int, states: bytes) -> None:
    found = [page for run in fillplan.ready_runs(first, states) for page in range(run.start, run.end)]
    assert found == [first + at for at, state in enumerate(states) if state == fillplan.READY]


@given(start=st.integers(0, 1 << 40), count=st.integers(1, 500))
def test_blocks_cover_a_range_and_cross_no_multiple(start: int, count: int) -> None:
    found = list(fillplan.blocks(PageRange(start, count)))
    assert [page for block in found for page in range(block.start, block.end)] == list(range(start, start + count))
    assert all(block.start // fillplan.STEP_PAGES == (block.end - 1) // fillplan.STEP_PAGES for block in found)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=200))
def test_what_was_asked_is_done(pairs: list[tuple[int, int]]) -> None:
    states, asked = bytes(state for state, _ in pairs), bytes(was for _, was in pairs)
    assert fillplan.without(states, asked) == bytes(0 if was and fillplan.READY in states else s for s, was in pairs)
