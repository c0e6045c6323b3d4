"""Open requests of one connection, and what may answer each. Both ends keep this table and so agree on every id.

An answer comes in ascending order and covers what was asked exactly: the next PAGES frame starts where the last ended.
A cancelled request stays open until the peer's last word on it.
"""

from __future__ import annotations

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.wire import limits
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Capability,
    Digests,
    Error,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    FileStored,
    Level,
    Packed,
    Pages,
    ReadFile,
    StoreFile,
    Welcome,
)

Request = Fetch | FetchDigests | ReadFile | StoreFile
Answer = Pages | Packed | Digests | FileData | FileStored | Cancelled | Error


class _OpenFetch:
    """How far the answer to a FETCH is."""

    __slots__ = ("_hashed", "_index", "_last_leaf", "_next", "cancelled", "request")

    def __init__(self, request: Fetch, hashed: bool) -> None:
        self.request = request
        self.cancelled = False
        self._hashed = hashed
        self._index = 0
        self._next = request.ranges[0].start
        self._last_leaf = -1

    @property
    def untouched(self) -> bool:
        """Nothing came yet, no digests either."""
        return not self._index and self._next == self.request.ranges[0].start and self._last_leaf < 0

    def problem(self, answer: Answer) -> str | None:
        if type(answer) is Pages:
            return self._pages_problem(answer)
        if type(answer) is Packed:
            return self._packed_problem(answer)
        if type(answer) is Digests:
            return self._digests_problem(answer)
        return f"{type(answer).__name__} for a FETCH"

    def _pages_problem(self, answer: Pages) -> str | None:
        pages, ranges = answer.pages, self.request.ranges
        if self._index == len(ranges) or pages.start != self._next:
            return f"pages from {pages.start}, which is not where the answer stands"
        here = ranges[self._index]
        end, range_end = pages.start + pages.count, here.start + here.count
        if end > range_end:
            return f"pages up to {end}, more than were asked for"
        index = self._index + (end == range_end)
        if answer.final is not (index == len(ranges)):
            return "an answer whose final mark is not on its last pages"
        if self._hashed and answer.digests:
            return "page digests for a hashed snapshot"
        if not self._hashed and not answer.digests and len(answer.data):
            return "pages of an unhashed snapshot without their digests"
        if index == self._index:
            self._next = end
        else:
            self._index = index
            self._next = ranges[index].start if index < len(ranges) else -1
        return None

    def _packed_problem(self, answer: Packed) -> str | None:
        ranges, index, start, left = self.request.ranges, self._index, self._next, answer.count
        if not self.request.flags & FetchFlag.PACKED:
            return "PACKED for a FETCH that does not allow it"
        if index == len(ranges) or answer.first != start:
            return f"pages from {answer.first}, which is not where the answer stands"
        while left and index < len(ranges):
            taken = min(left, ranges[index].start + ranges[index].count - start)
            left -= taken
            start += taken
            if start == ranges[index].start + ranges[index].count:
                index += 1
                start = ranges[index].start if index < len(ranges) else -1
        if left:
            return f"{left} packed pages more than were asked for"
        if answer.final is not (index == len(ranges)):
            return "an answer whose final mark is not on its last pages"
        self._index, self._next = index, start
        return None

    def _digests_problem(self, answer: Digests) -> str | None:
        if not self.request.flags & FetchFlag.WANT_DIGESTS or answer.level != Level.LEAF or answer.final:
            return "digests that the FETCH did not ask for"
        first, end = answer.index * LEAF_PAGES, (answer.index + 1) * LEAF_PAGES
        touched = any(pages.start < end and first < pages.end for pages in self.request.ranges[self._index :])
        if answer.index <= self._last_leaf or not touched:
            return f"leaf {answer.index}, which the FETCH does not touch or which came already"
        self._last_leaf = answer.index
        return None


class _OpenDigests:
    __slots__ = ("_end", "_next", "cancelled", "request")

    def __init__(self, request: FetchDigests) -> None:
        self.request = request
        self.cancelled = False
        self._next = request.first
        self._end = request.first + request.count

    def problem(self, answer: Answer) -> str | None:
        if type(answer) is not Digests or answer.level != self.request.level:
            return f"{type(answer).__name__} for a FETCH_DIGESTS"
        if answer.index != self._next:
            return f"digests from leaf {answer.index}, which is not where the answer stands"
        end = self._next + (1 if answer.level == Level.LEAF else len(answer.data) // DIGEST_BYTES)
        if end > self._end or answer.final is not (end == self._end):
            return "more digests than were asked for, or a final mark that is not on the last"
        self._next = end
        return None


class _OpenRead:
    __slots__ = ("cancelled", "request")

    def __init__(self, request: ReadFile) -> None:
        self.request = request
        self.cancelled = False

    def problem(self, answer: Answer) -> str | None:
        if type(answer) is not FileData or len(answer.data) > self.request.length:
            return f"{type(answer).__name__} for a READ_FILE, or more bytes than asked for"
        return None


class _OpenStore:
    __slots__ = ("cancelled", "request")

    def __init__(self, request: StoreFile) -> None:
        self.request = request
        self.cancelled = False

    def problem(self, answer: Answer) -> str | None:
        return None if type(answer) is FileStored else f"{type(answer).__name__} for a STORE_FILE"


class OpenRequests:
    """Every function returns what is wrong and has noted nothing, or None and has noted the message."""

    def __init__(self, welcome: Welcome) -> None:
        self._limits = welcome.limits
        self._hashed = welcome.hashed
        self._learns = bool(welcome.capabilities & Capability.LEARN)
        self._packs = welcome.hashed and bool(welcome.capabilities & Capability.PACKED)
        self._vouches = not welcome.hashed and bool(welcome.capabilities & Capability.VOUCH)
        self._total_pages = welcome.ram_bytes >> 12
        self._open: dict[int, _OpenFetch | _OpenDigests | _OpenRead | _OpenStore] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def may_open(self, request_id: int, start: int, count: int) -> bool:
        """Whether `note_request` would take a FETCH of this one range."""
        if request_id in self._open or len(self._open) >= self._limits.max_requests:
            return False
        return count <= self._limits.max_request_pages and start + count <= self._total_pages

    def open_lone(self, request: Fetch) -> None:
        """Note a FETCH that `may_open` allows."""
        self._open[request.id] = _OpenFetch(request, self._hashed)

    def take_lone(self, request_id: int, start: int, count: int, zero: bool) -> bool:
        """Whether PAGES of this one range, final and without digests, is the whole answer of an open FETCH that was
        not cancelled and got nothing so far; if so that is closed."""
        entry = self._open.get(request_id)
        if type(entry) is not _OpenFetch or entry.cancelled or not (self._hashed or zero):
            return False
        ranges = entry.request.ranges
        if len(ranges) != 1 or ranges[0].start != start or ranges[0].count != count or not entry.untouched:
            return False
        del self._open[request_id]
        return True

    def note_request(self, request: Request) -> str | None:
        if request.id in self._open:
            return f"a request with id {request.id}, which is open"
        if len(self._open) >= self._limits.max_requests:
            return f"more than the {self._limits.max_requests} open requests that are allowed"
        if type(request) is Fetch:
            wrong = self._fetch_problem(request)
            if wrong is not None:
                return wrong
            self._open[request.id] = _OpenFetch(request, self._hashed)
        elif type(request) is FetchDigests:
            leaves = -(-self._total_pages // LEAF_PAGES)
            told = self._hashed or (self._vouches and request.level == Level.LEAF)
            if not told or request.first + request.count > leaves:
                return f"a request for digests that the snapshot does not have ({leaves} leaves)"
            self._open[request.id] = _OpenDigests(request)
        elif type(request) is StoreFile:
            if not self._learns:
                return "a file to be stored, where none is taken"
            self._open[request.id] = _OpenStore(request)
        else:
            assert isinstance(request, ReadFile)
            self._open[request.id] = _OpenRead(request)
        return None

    def _fetch_problem(self, request: Fetch) -> str | None:
        ranges, allowed = request.ranges, self._limits
        if request.flags & FetchFlag.PACKED and not self._packs:
            return "a FETCH that allows packed answers, where none are given"
        if ranges[-1].end > self._total_pages:
            return f"a request up to page {ranges[-1].end} of {self._total_pages}"
        if len(ranges) > min(allowed.max_request_ranges, limits.MAX_RANGES):
            return f"a request with {len(ranges)} ranges, allowed are {allowed.max_request_ranges}"
        count = ranges[0].count if len(ranges) == 1 else sum([pages.count for pages in ranges])
        if count > allowed.max_request_pages:
            return f"a request for {count} pages, allowed are {allowed.max_request_pages}"
        return None

    def note_answer(self, answer: Answer) -> str | None:
        entry = self._open.get(answer.id)
        if entry is None:
            return f"{type(answer).__name__} for id {answer.id}, which is not open"
        kind = type(answer)
        if kind is Cancelled:
            if not entry.cancelled:
                return f"CANCELLED for id {answer.id}, which was not cancelled"
            del self._open[answer.id]
            return None
        if kind is not Error:
            wrong = entry.problem(answer)
            if wrong is not None:
                return wrong
        if kind is Error or kind is FileData or kind is FileStored or answer.final:  # type: ignore[union-attr]  # the rest have it
            del self._open[answer.id]
        return None

    def note_cancel_sent(self, cancel: Cancel) -> str | None:
        """Our own CANCEL: only of what is open, and once."""
        entry = self._open.get(cancel.id)
        if entry is None or entry.cancelled:
            return f"CANCEL of id {cancel.id}, which is not open or cancelled already"
        entry.cancelled = True
        return None

    def note_cancel_received(self, cancel: Cancel) -> bool:
        """The peer's CANCEL: whether there is still something to cancel (the answer may have crossed it)."""
        entry = self._open.get(cancel.id)
        if entry is None:
            return False
        entry.cancelled = True
        return True
