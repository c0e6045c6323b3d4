"""One request that is out, and whether an answer is the one that it asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import trio

from lazymem.digests import DIGEST_BYTES
from lazymem.errors import RemoteProtocolError
from lazymem.fetch.guesses import Asked
from lazymem.fetch.inflight import Want, cut_runs
from lazymem.fetch.plan import merged
from lazymem.fetch.starter import Handle
from lazymem.pages import Fetched, PageRange


class Flight:
    """`bytes_before`, `pages_before`: what had been received in all when this was sent. `maybe_asked`: whose it is."""

    __slots__ = (
        "background",
        "bytes_before",
        "handle",
        "maybe_asked",
        "pages",
        "pages_before",
        "ranges",
        "sent_at",
        "wants",
    )

    def __init__(
        self, wants: Sequence[Want], background: bool, bytes_before: int, pages_before: int, maybe_asked: Asked | None
    ) -> None:
        self.wants = tuple(wants)
        self.ranges = (wants[0].pages,) if len(wants) == 1 else merged(want.pages for want in wants)
        self.pages = sum([pages.count for pages in self.ranges])
        self.background = background
        self.handle: Handle | None = None
        self.sent_at = trio.current_time()
        self.bytes_before = bytes_before
        self.pages_before = pages_before
        self.maybe_asked = maybe_asked


def check_cover(fetched: Fetched, flight: Flight) -> None:
    """A source that brings other pages than the asked ones must not leave holes in what readers get.

    Raises:
        RemoteProtocolError: it did.
    """
    asked, runs = flight.ranges, fetched.runs
    brought = (runs[0].pages,) if len(runs) == 1 else merged(run.pages for run in runs)
    if brought != asked:
        raise RemoteProtocolError(f"the source brought other pages than the asked ones (from page {asked[0].start} on)")


def pieces(fetched: Fetched, max_pages: int) -> Iterator[Fetched]:
    """The same answer in parts of one run each, of at most so many pages; leaves go with the first."""
    leaves = fetched.leaves
    for run in fetched.runs:
        for pages in run.pages.pieces(max_pages):
            (cut,) = cut_runs((run,), pages)
            yield Fetched((cut,), leaves, _cut_digests(fetched.page_digests, run.pages, pages))
            leaves = {}


def _cut_digests(digests: Mapping[int, bytes], whole: PageRange, part: PageRange) -> dict[int, bytes]:
    if whole.start not in digests:
        return {}
    first = (part.start - whole.start) * DIGEST_BYTES
    return {part.start: digests[whole.start][first : first + part.count * DIGEST_BYTES]}
