"""The coarse map: shares that add up, a page counted once, and a bounded number of looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.store.coarsemap import CELLS, MAX_LOOKS, coarse_map

STATES = st.integers(1, 40).flatmap(
    lambda pages: st.tuples(*(st.lists(st.integers(0, 2), min_size=pages, max_size=pages) for _ in range(4)))
)


@given(STATES, st.integers(1, 12))
def test_as_counted_one_by_one(maps: tuple[list[int], list[int], list[int], list[int]], cells: int) -> None:
    held, asked, written, ours = maps
    total = len(held)
    looks = [lambda pages, states=states: bytes(states[page] for page in pages) for states in maps]
    found = coarse_map(total, looks[0], looks[1], looks[2], looks[3], cells)
    size = found.pages_per_cell
    assert len(found.written) == -(-total // size) <= cells
    for cell, (guessed, demanded, wrote) in enumerate(zip(found.guessed, found.demanded, found.written, strict=True)):
        pages = range(cell * size, min(total, (cell + 1) * size))
        assert wrote == round(sum(written[page] > 0 for page in pages) / len(pages), 3)
        there = [page for page in pages if held[page] and not written[page]]
        by_guest = [page for page in there if asked[page] and not ours[page]]
        assert demanded == round(len(by_guest) / len(pages), 3)
        assert guessed == round((len(there) - len(by_guest)) / len(pages), 3)
    without = coarse_map(total, looks[0], looks[1], looks[2], cells=cells)
    assert without == coarse_map(total, looks[0], looks[1], looks[2], lambda pages: bytes(len(pages)), cells)


def test_a_huge_ram_costs_no_more_looks() -> None:
    looked = []

    def look(pages: range) -> bytes:
        looked.append(len(pages))
        return bytes(len(pages))

    found = coarse_map(16 << 20, look, look, look)
    assert len(found.written) == CELLS
    assert max(looked) <= MAX_LOOKS
    assert set(found.guessed + found.demanded + found.written) == {0.0}
