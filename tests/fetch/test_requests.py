"""A request over several connections: what came is not asked for again, and stands at its own pages."""

from __future__ import annotations

from lazymem.fetch.requests import FetchRequest
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.messages import Encoding, Limits, Packed


def bytes_of(*ranges: PageRange) -> bytes:
    return b"".join(bytes([page]) * PAGE_SIZE for pages in ranges for page in range(pages.start, pages.end))


def packed(*ranges: PageRange, final: bool = False) -> Packed:
    count = sum(pages.count for pages in ranges)
    return Packed(1, ranges[0].start, count, Encoding.RAW, bytes_of(*ranges), final)


def test_packed_pages_after_a_loss_in_two_parts() -> None:
    """Both parts were answered in part, so what is left has a gap where the request has none."""
    request = FetchRequest([PageRange(0, 10), PageRange(20, 10)], False, True, lambda *_: None)
    assert len(request.parts(Limits(max_request_pages=10, max_request_ranges=8, max_requests=8))) == 2
    request.take(packed(PageRange(0, 4)))
    request.take(packed(PageRange(20, 5)))
    left = (PageRange(4, 6), PageRange(25, 5))
    assert request.parts(Limits(max_request_pages=16, max_request_ranges=8, max_requests=8)) == [left]
    assert request.take(packed(*left, final=True))
    assert request.parts(Limits(max_request_pages=16, max_request_ranges=8, max_requests=8)) == []
    runs = request.fetched().runs
    assert [run.pages for run in runs] == [PageRange(0, 4), PageRange(4, 6), PageRange(20, 5), PageRange(25, 5)]
    assert b"".join(run.data or b"" for run in runs) == bytes_of(PageRange(0, 10), PageRange(20, 10))
