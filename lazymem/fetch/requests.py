"""Requests that outlive connections: what is still to be asked for, what came, what to do at the end. Pure.

A lane asks a request for its `parts` (each one wire request inside the server's limits), builds the message of each
under an id, hands over what comes, and ends it once no part is open. After a lost connection it asks for the parts
again and gets only what has not come yet. The wire's connection has already checked that an answer is for what was
asked, in order and complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lazymem.digests import LEAF_PAGES
from lazymem.errors import (
    LazymemError,
    LocalProtocolError,
    RemoteProtocolError,
    ServerRefusedError,
    VerificationError,
)
from lazymem.fetch.plan import split
from lazymem.pages import Fetched, PageRange, PageRun, spanned
from lazymem.wire.limits import MAX_STORE_PIECE_BYTES
from lazymem.wire.messages import (
    Capability,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    Level,
    Limits,
    Message,
    Packed,
    Pages,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.pagedata import decode_data, decode_pages

OnEarly = Callable[[Fetched], object]

Part = tuple[PageRange, ...]
"""What one wire request asks for; its meaning is its request's (pages, leaves, bytes)."""

_AGAIN = frozenset({ErrorCode.IO_ERROR, ErrorCode.BUSY, ErrorCode.SHUTTING_DOWN, ErrorCode.TOO_MANY_REQUESTS})
"""Errors that somebody on the other side may put right, while the guest waits (rule 7)."""

_REFUSED = frozenset({ErrorCode.NO_SUCH_SNAPSHOT, ErrorCode.UNSUPPORTED_VERSION, ErrorCode.NO_SUCH_FILE})


_FLAGS = {
    (want_leaves, background, packed): FetchFlag(
        want_leaves * FetchFlag.WANT_DIGESTS | background * FetchFlag.BACKGROUND | packed * FetchFlag.PACKED
    )
    for want_leaves in (False, True)
    for background in (False, True)
    for packed in (False, True)
}


class Request(Protocol):
    """What a lane needs of a request."""

    background: bool
    open_parts: int
    """Parts that were handed out and are not answered yet; the lane counts."""

    def parts(self, limits: Limits) -> list[Part]:
        """What has not come yet, cut to the server's limits. Empty: everything is here."""
        ...

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message: ...

    def take(self, answer: Message) -> bool:
        """Note an answer; whether it was its part's last."""
        ...

    def end(self, maybe_error: LazymemError | None) -> None:
        """Called once: all is here, or nothing more will come."""
        ...


class FetchRequest:
    """Pages by ranges. `on_done` is called once, with itself and maybe an error; `fetched` decodes what came."""

    def __init__(
        self,
        ranges: Sequence[PageRange],
        want_leaves: bool,
        background: bool,
        on_done: Callable[[FetchRequest, LazymemError | None], None],
        maybe_on_here: Callable[[bytes | None], None] | None = None,
    ) -> None:
        """`maybe_on_here`: gets the bytes (None: zeros) of a lone range that came in one frame; `on_done` is then not
        called."""
        self.ranges = tuple(ranges)
        self.maybe_on_here = maybe_on_here
        self.background = background
        self.cancelled = False
        self.open_parts = 0
        self._want_leaves = want_leaves
        self._on_done = on_done
        self._frames: list[Pages] = []
        self._asked: Sequence[PageRange] = self.ranges  # what `parts` last cut: a frame's pages follow each other there
        self._packed: list[tuple[Packed, list[PageRange]]] = []  # with the pages that it brought
        self._leaves: dict[int, bytes] = {}
        self._early: list[tuple[PageRange, OnEarly]] = []

    def parts(self, limits: Limits) -> list[Part]:
        rest = subtract(self.ranges, self._here()) if self._frames or self._packed else self.ranges
        self._asked = rest
        if len(rest) == 1 and rest[0].count <= limits.max_request_pages:
            return [rest]
        return split(rest, limits.max_request_pages, limits.max_request_ranges)

    def _here(self) -> list[PageRange]:
        """What has come, in any order."""
        found = [frame.pages for frame in self._frames]
        for _, brought in self._packed:
            found += brought
        return found

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message:
        packs = self.background and welcome.hashed and bool(welcome.capabilities & Capability.PACKED)
        return Fetch(request_id, part, _FLAGS[self._want_leaves, self.background, packs])

    def lone_message(self, request_id: int) -> Fetch:
        """As `message`, of the only range."""
        return Fetch(request_id, self.ranges, _FLAGS[self._want_leaves, self.background, False])

    def take_lone(self, start: int, count: int, maybe_data: bytes | None) -> None:
        """A whole part came in one frame; None: zeros."""
        if maybe_data is None:
            self._frames.append(Pages(0, PageRange(start, count), Encoding.ZERO, final=True))
        else:
            self._frames.append(Pages(0, PageRange(start, count), Encoding.RAW, maybe_data, final=True))

    def take(self, answer: Message) -> bool:
        if type(answer) is Pages:
            self._frames.append(answer)
            if self._early and not answer.final:
                self._give_early(answer, [answer.pages], self._early)
            return answer.final
        if type(answer) is Packed:
            brought = spanned(self._asked, answer.first, answer.count)
            self._packed.append((answer, brought))
            if self._early and not answer.final:
                self._give_early(answer, brought, self._early)
            return answer.final
        assert type(answer) is Digests
        self._leaves[answer.index] = answer.data
        return False

    def tell_early(self, pages: PageRange, on_early: OnEarly) -> None:
        """Frames with some of `pages` are decoded for `on_early` as they come; those that came, now. Of several calls
        the callbacks do the same: a frame is given to one."""
        asked = [(pages, on_early)]
        self._early += asked
        for frame in list(self._frames):
            self._give_early(frame, [frame.pages], asked)
        for packed, brought in list(self._packed):
            self._give_early(packed, brought, asked)

    def _give_early(
        self, frame: Pages | Packed, brought: Sequence[PageRange], asked: Sequence[tuple[PageRange, OnEarly]]
    ) -> None:
        """Once, whoever of them wants it. A frame that does not decode is an error at the end, as without this."""
        wanted = [on_early for pages, on_early in asked if any(_meet(pages, here) for here in brought)]
        if not wanted:
            return
        try:
            if type(frame) is Packed:
                runs = _unpacked(frame, brought)
            else:
                assert type(frame) is Pages
                runs = [PageRun(frame.pages, decode_pages(frame))]
        except RemoteProtocolError:
            return
        digests = {frame.pages.start: frame.digests} if type(frame) is Pages and frame.digests else {}
        leaves = range(runs[0].pages.start // LEAF_PAGES, (runs[-1].pages.end - 1) // LEAF_PAGES + 1)
        wanted[0](Fetched(tuple(runs), {leaf: self._leaves[leaf] for leaf in leaves if leaf in self._leaves}, digests))

    def end(self, maybe_error: LazymemError | None) -> None:
        self._on_done(self, maybe_error)

    def compressed_pages(self) -> int:
        """How many pages `fetched` has to decompress."""
        pages = sum([frame.pages.count for frame in self._frames if frame.encoding == Encoding.ZSTD])
        return pages + sum([packed.count for packed, _ in self._packed if packed.encoding == Encoding.ZSTD])

    def fetched(self) -> Fetched:
        """Decode. May run in a thread: nothing changes the request any more.

        Raises:
            RemoteProtocolError: compressed data that does not decode to its pages.
        """
        frames = self._frames  # not sorted in place: a reader who comes now looks at it (`tell_early`)
        if len(frames) > 1:
            frames = sorted(frames, key=lambda frame: frame.pages.start)
        runs = [PageRun(frame.pages, decode_pages(frame)) for frame in frames]
        if self._packed:
            for packed, brought in self._packed:
                runs += _unpacked(packed, brought)
            runs.sort(key=lambda run: run.pages.start)
        digests = {frame.pages.start: frame.digests for frame in frames if frame.digests}
        return Fetched(tuple(runs), self._leaves, digests)


def _meet(pages: PageRange, others: PageRange) -> bool:
    return pages.start < others.end and others.start < pages.end


def _unpacked(packed: Packed, brought: Sequence[PageRange]) -> list[PageRun]:
    """A run for each range of pages that the frame brought; views of one buffer."""
    data = memoryview(decode_data(packed.encoding, packed.data, packed.count))
    runs: list[PageRun] = []
    at = 0
    for pages in brought:
        runs.append(PageRun(pages, data[at : at + pages.length_bytes]))
        at += pages.length_bytes
    return runs


class DigestRequest:
    """Leaf digests (the upper level) from leaf 0 on; `data` once it ended without an error."""

    background = False

    def __init__(self, leaves: int, on_done: Callable[[LazymemError | None], None]) -> None:
        self.open_parts = 0
        self.data = bytearray()
        self._leaves = leaves
        self._on_done = on_done
        self._pieces: dict[int, bytes] = {}

    def parts(self, limits: Limits) -> list[Part]:
        self._pieces.clear()
        return [(piece,) for piece in PageRange(0, self._leaves).pieces(_UPPER_LEAVES)]

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message:
        return FetchDigests(request_id, Level.UPPER, part[0].start, part[0].count)

    def take(self, answer: Message) -> bool:
        assert type(answer) is Digests
        self._pieces[answer.index] = answer.data
        return answer.final

    def end(self, maybe_error: LazymemError | None) -> None:
        for index in sorted(self._pieces):
            self.data += self._pieces[index]
        self._on_done(maybe_error)


class LeafRequest:
    """The page digests of one leaf that an unhashed snapshot's server vouches for, as they came; a guess."""

    background = True

    def __init__(self, leaf: int, on_done: Callable[[LazymemError | None], None]) -> None:
        self.open_parts = 0
        self.data = b""
        self._leaf = leaf
        self._on_done = on_done

    def parts(self, limits: Limits) -> list[Part]:
        return [(PageRange(self._leaf, 1),)]

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message:
        return FetchDigests(request_id, Level.LEAF, self._leaf, 1)

    def take(self, answer: Message) -> bool:
        assert type(answer) is Digests
        self.data = answer.data
        return True

    def end(self, maybe_error: LazymemError | None) -> None:
        self._on_done(maybe_error)


_UPPER_LEAVES = 65536
"""1 MiB of leaf digests: the wire's largest frame of them."""


class FileRequest:
    """One piece of a published file; `data` once it ended without an error."""

    def __init__(
        self,
        file: PublishedFile,
        offset: int,
        length: int,
        on_done: Callable[[LazymemError | None], None],
        *,
        background: bool = False,
    ) -> None:
        self.background = background
        self.open_parts = 0
        self.data = b""
        self._file = file
        self._offset = offset
        self._length = length
        self._on_done = on_done

    def parts(self, limits: Limits) -> list[Part]:
        return [(PageRange(self._offset, self._length),)]

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message:
        return ReadFile(request_id, self._file, self._offset, self._length)

    def take(self, answer: Message) -> bool:
        assert type(answer) is FileData
        self.data = answer.data
        return True

    def end(self, maybe_error: LazymemError | None) -> None:
        self._on_done(maybe_error)


class StoreRequest:
    """A whole file that the server is to keep; after a lost connection it is sent from its beginning."""

    background = False

    def __init__(self, file: PublishedFile, data: bytes, on_done: Callable[[LazymemError | None], None]) -> None:
        self.open_parts = 0
        self._file = file
        self._data = data
        self._on_done = on_done

    def parts(self, limits: Limits) -> list[Part]:
        return [(piece,) for piece in PageRange(0, len(self._data)).pieces(MAX_STORE_PIECE_BYTES)]

    def message(self, request_id: int, part: Part, welcome: Welcome) -> Message:
        piece = part[0]
        data = self._data[piece.start : piece.end]
        return StoreFile(request_id, self._file, piece.start, len(self._data), data)

    def take(self, answer: Message) -> bool:
        return True

    def end(self, maybe_error: LazymemError | None) -> None:
        self._on_done(maybe_error)


def subtract(ranges: Sequence[PageRange], taken: Sequence[PageRange]) -> tuple[PageRange, ...]:
    """The parts of ascending `ranges` that are in none of `taken` (any order, each inside one of the ranges)."""
    rest: list[PageRange] = []
    taken = sorted(taken)
    for pages in ranges:
        start = pages.start
        for gone in taken:
            if gone.end <= start or gone.start >= pages.end:
                continue
            if gone.start > start:
                rest.append(PageRange(start, gone.start - start))
            start = gone.end
        if start < pages.end:
            rest.append(PageRange(start, pages.end - start))
    return tuple(rest)


def maybe_again(error: Error) -> bool:
    """Whether the same request may be answered better a little later."""
    return error.code in _AGAIN


def refusal(error: Error) -> LazymemError:
    """A server's error as ours, by whose fault it is; `temporary` where trying again may help."""
    text = error.text or error.code.name.lower().replace("_", " ")
    if error.code == ErrorCode.PAGE_CHANGED:
        return VerificationError(f"the server refuses bytes that changed: {text}")
    if error.code in _AGAIN or error.code in _REFUSED:
        refused = ServerRefusedError(f"the server says: {text}")
        refused.temporary = error.code in _AGAIN
        return refused
    if error.code == ErrorCode.BAD_REQUEST:
        return LocalProtocolError(f"the server calls a request of ours bad: {text}")
    return RemoteProtocolError(f"the server sent error {error.code}: {text}")
