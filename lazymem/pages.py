"""Page numbers, ranges and runs of pages. Pure; every other room counts in these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

PAGE_SIZE = 4096
"""Bytes. x86's base page, and the unit of fetching, holding and verifying."""

PAGE_SHIFT = 12

ZERO_PAGE = bytes(PAGE_SIZE)

_ZEROS_BYTES = 16 * PAGE_SIZE
_ZEROS = bytes(_ZEROS_BYTES)


class PageRange(Struct, frozen=True, order=True):
    """Pages ``start`` to ``start + count - 1``; never empty."""

    start: int
    count: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.count < 1:
            raise ValueError(f"not a page range: start {self.start}, count {self.count}")

    @property
    def end(self) -> int:
        """First page behind the range."""
        return self.start + self.count

    @property
    def offset_bytes(self) -> int:
        return self.start << PAGE_SHIFT

    @property
    def length_bytes(self) -> int:
        return self.count << PAGE_SHIFT

    def pieces(self, max_pages: int) -> Iterator[PageRange]:
        """The range cut into ranges of at most `max_pages`, in order."""
        for start in range(self.start, self.end, max_pages):
            yield PageRange(start, min(max_pages, self.end - start))

    def __contains__(self, page: int) -> bool:
        return self.start <= page < self.end


class PageRun(Struct, frozen=True):
    """Consecutive pages with their bytes (``count * 4096``), or None where all are zero."""

    pages: PageRange
    data: bytes | memoryview | None


class Fetched(Struct, frozen=True):
    """What one answer of a page source brought, not yet verified.

    `runs` cover what was asked for exactly, in ascending order. `leaves`: leaf number to its page digests, those that
    came along. `page_digests`: start page to 16 bytes a page, what an unhashed snapshot's server vouches for.
    """

    runs: tuple[PageRun, ...]
    leaves: Mapping[int, bytes] = field(default_factory=dict)
    page_digests: Mapping[int, bytes] = field(default_factory=dict)


def covering(offset_bytes: int, length_bytes: int) -> PageRange:
    """The pages that hold any of ``length_bytes`` (at least 1) bytes from ``offset_bytes`` on."""
    first = offset_bytes >> PAGE_SHIFT
    last = (offset_bytes + length_bytes - 1) >> PAGE_SHIFT
    return PageRange(first, last - first + 1)


def spanned(ranges: Sequence[PageRange], first: int, count: int) -> list[PageRange]:
    """The `count` pages of ascending `ranges` from page `first` on, which is in one of them; fewer where they end."""
    found: list[PageRange] = []
    for pages in ranges:
        if pages.end <= first:
            continue
        start = max(first, pages.start)
        taken = min(count, pages.end - start)
        found.append(PageRange(start, taken))
        count -= taken
        if not count:
            break
    return found


def runs(pages: Iterable[int]) -> list[PageRange]:
    """Page numbers in any order, repeated or not, as the fewest ranges in ascending order."""
    found: list[PageRange] = []
    start = end = -1
    for page in sorted(set(pages)):
        if page != end:
            if end > start:
                found.append(PageRange(start, end - start))
            start = page
        end = page + 1
    if end > start:
        found.append(PageRange(start, end - start))
    return found


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is zero. Compares copies of 64 KiB (memcmp): views compare byte by byte, 30 times slower."""
    view = memoryview(data)
    for at in range(0, len(view), _ZEROS_BYTES):
        piece = bytes(view[at : at + _ZEROS_BYTES])
        if piece != (_ZEROS if len(piece) == _ZEROS_BYTES else bytes(len(piece))):
            return False
    return True
