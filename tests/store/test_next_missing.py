"""`next_missing`: what guesses begin with. Held and written pages are skipped, and nothing behind the asked pages is
looked at, since a fault of a large RAM would otherwise wait for a pass over all of its map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.cachefolder import open_cache
from lazymem.store.origin import RamOrigin
from lazymem.store.pagemap import SET, UNSET, PageMap
from lazymem.store.pristine import PristinePages
from lazymem.store.statefolder import open_private_state

PAGES = 300

Place = tuple[PristinePages, PageMap, PageMap]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An unhashed RAM of which nothing is here, its held and its written map."""
    origin = RamOrigin(bytes(32), PAGES * PAGE_SIZE, None)
    cache, state = open_cache(tmp_path, origin), open_private_state(tmp_path, origin)
    pristine = PristinePages(origin, cache, b"", state.written)
    yield pristine, cache.held, state.written
    pristine.close()
    state.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    held=st.sets(st.integers(0, PAGES - 1)),
    written=st.sets(st.integers(0, PAGES - 1)),
    start=st.integers(0, PAGES + 40),
    count=st.integers(1, PAGES + 40),
    limit=st.integers(1, 100),
)
def test_the_first_run_within_the_pages(
    place: Place, held: set[int], written: set[int], start: int, count: int, limit: int
) -> None:
    """Of any pages, also of such as reach beyond the RAM: the borders of a recorded set's blocks do."""
    pristine, *maps = place
    for page in range(PAGES):
        for numbers, page_map in zip((held, written), maps, strict=True):
            page_map.set(PageRange(page, 1), SET if page in numbers else UNSET)
    missing = [page for page in range(start, min(start + count, PAGES)) if page not in held | written]
    expected = missing[: next((n for n, page in enumerate(missing) if page != missing[0] + n), len(missing))][:limit]
    found = pristine.next_missing(PageRange(start, count), limit)
    assert ([] if found is None else list(range(found.start, found.end))) == expected


def test_nothing_behind_the_pages_is_looked_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pristine, held, _ = place
    held.set(PageRange(0, PAGES), SET)
    ends: list[int] = []
    first_unset = PageMap.first_unset

    def noted(page_map: PageMap, start: int, end: int) -> int:
        ends.append(end)
        return first_unset(page_map, start, end)

    monkeypatch.setattr(PageMap, "first_unset", noted)
    assert pristine.next_missing(PageRange(10, 7), 100) is None
    assert ends
    assert max(ends) == 17
