"""Messages of every kind: a fixed sample of each, and Hypothesis strategies for all legal ones."""

from __future__ import annotations

from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire import limits
from lazymem.wire.frame import Role
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Capability,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    FileStored,
    Goodbye,
    Hello,
    Level,
    Limits,
    Message,
    Packed,
    Pages,
    Ping,
    Pong,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)

WELCOME = Welcome(
    version=1,
    capabilities=Capability.ZSTD,
    limits=Limits(max_request_pages=512, max_request_ranges=8, max_requests=4),
    name="web",
    identity=bytes(range(32)),
    ram_bytes=1024 * PAGE_SIZE,
    hashed=True,
    manifest=b'{"format": "lazymem-snapshot"}',
    vmstate_bytes=5000,
    working_set_bytes=70,
)

SAMPLES: list[tuple[Role, Message]] = [
    (Role.CLIENT, Hello("web")),
    (Role.CLIENT, Hello("", 1, 3, Capability.NONE)),
    (Role.SERVER, WELCOME),
    (Role.CLIENT, Fetch(1, (PageRange(5, 2),))),
    (Role.CLIENT, Fetch(2**64 - 1, (PageRange(0, 1), PageRange(7, 9)), FetchFlag.BACKGROUND | FetchFlag.WANT_DIGESTS)),
    (Role.SERVER, Pages(1, PageRange(5, 1), Encoding.RAW, b"x" * PAGE_SIZE)),
    (Role.SERVER, Pages(1, PageRange(5, 2), Encoding.ZSTD, b"compressed", b"d" * 32, final=True)),
    (Role.SERVER, Pages(1, PageRange(5, 256), Encoding.ZERO, final=True)),
    (Role.SERVER, Pages(1, PageRange(0, 256), Encoding.RAW, b"z" * limits.MAX_PAGE_DATA_BYTES)),
    (Role.CLIENT, FetchDigests(3, Level.UPPER, 0, 4)),
    (Role.SERVER, Digests(3, Level.UPPER, 0, b"u" * 64, final=True)),
    (Role.SERVER, Digests(3, Level.LEAF, 9, b"l" * limits.MAX_LEAF_BYTES)),
    (Role.CLIENT, ReadFile(4, PublishedFile.VMSTATE, 100, 200)),
    (Role.SERVER, FileData(4, b"state")),
    (Role.SERVER, FileData(4, b"")),
    (Role.CLIENT, StoreFile(5, PublishedFile.WORKING_SET, 0, 5, b"first")),
    (Role.CLIENT, StoreFile(6, PublishedFile.WORKING_SET, 7, 1 << 20, b"x" * limits.MAX_STORE_PIECE_BYTES)),
    (Role.SERVER, FileStored(5)),
    (Role.SERVER, Packed(1, 5, 1, Encoding.RAW, b"x" * PAGE_SIZE)),
    (Role.SERVER, Packed(1, 7, 256, Encoding.ZSTD, b"compressed", final=True)),
    (Role.SERVER, Packed(1, 0, 256, Encoding.RAW, b"z" * limits.MAX_PAGE_DATA_BYTES)),
    (Role.CLIENT, Cancel(1)),
    (Role.SERVER, Cancelled(1)),
    (Role.SERVER, Error(1, ErrorCode.PAGE_CHANGED, "page 7 is not what it was")),
    (Role.SERVER, Error(0, ErrorCode.BUSY, "")),
    (Role.CLIENT, Ping(1)),
    (Role.SERVER, Pong(1)),
    (Role.CLIENT, Goodbye("")),
    (Role.SERVER, Goodbye("the server is ending")),
]

_ids = st.integers(1, 2**64 - 1)
_page_numbers = st.integers(0, limits.MAX_PAGES - limits.MAX_FRAME_PAGES)
_printable = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], include_characters=" ")).filter(
    str.isprintable
)
_names = st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/"), max_size=60).filter(str.isprintable)
_texts = _printable.filter(lambda text: len(text.encode()) <= limits.MAX_TEXT_BYTES)
_capabilities = st.integers(0, 3).map(Capability)
_counts = st.integers(1, 2**32 - 1)


@st.composite
def _hellos(draw: st.DrawFn) -> Hello:
    low = draw(st.integers(1, 65535))
    return Hello(draw(_names), low, draw(st.integers(low, 65535)), draw(_capabilities))


_welcomes = st.builds(
    Welcome,
    version=st.integers(1, 65535),
    capabilities=_capabilities,
    limits=st.builds(Limits, _counts, _counts, _counts),
    name=_names,
    identity=st.binary(min_size=32, max_size=32),
    ram_bytes=st.integers(1, limits.MAX_PAGES).map(lambda pages: pages * PAGE_SIZE),
    hashed=st.booleans(),
    manifest=st.binary(min_size=1, max_size=300),
    vmstate_bytes=st.integers(0, limits.MAX_FILE_OFFSET),
    working_set_bytes=st.integers(0, limits.MAX_FILE_OFFSET),
)


@st.composite
def _fetches(draw: st.DrawFn) -> Fetch:
    ranges = []
    at = draw(st.integers(0, limits.MAX_PAGES // 2))
    for _ in range(draw(st.integers(1, 8))):
        at += draw(st.integers(0, 1000))
        count = draw(st.integers(1, 1000))
        ranges.append(PageRange(at, count))
        at += count
    return Fetch(draw(_ids), tuple(ranges), FetchFlag(draw(st.integers(0, 7))))


@st.composite
def _pages(draw: st.DrawFn) -> Pages:
    encoding = draw(st.sampled_from(Encoding))
    count = draw(st.integers(1, 256 if encoding == Encoding.ZERO else 4))
    pages = PageRange(draw(_page_numbers), count)
    data, digests = b"", b""
    if encoding == Encoding.RAW:
        data = draw(st.binary(min_size=1, max_size=9)) * (count * PAGE_SIZE)
        data = data[: count * PAGE_SIZE]
    elif encoding == Encoding.ZSTD:
        data = draw(st.binary(min_size=1, max_size=count * PAGE_SIZE - 1))
    if encoding != Encoding.ZERO and draw(st.booleans()):
        digests = draw(st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)) * count
    return Pages(draw(_ids), pages, encoding, data, digests, draw(st.booleans()))


@st.composite
def _packed(draw: st.DrawFn) -> Packed:
    raw, count = draw(st.booleans()), draw(st.integers(1, 4))
    data = draw(st.binary(min_size=1, max_size=9)) * (count * PAGE_SIZE)
    size = count * PAGE_SIZE if raw else draw(st.integers(1, count * PAGE_SIZE - 1))
    encoding = Encoding.RAW if raw else Encoding.ZSTD
    return Packed(draw(_ids), draw(_page_numbers), count, encoding, data[:size], draw(st.booleans()))


@st.composite
def _store_files(draw: st.DrawFn) -> StoreFile:
    data = draw(st.binary(min_size=1, max_size=300))
    offset = draw(st.integers(0, limits.MAX_STORED_BYTES - len(data)))
    total = draw(st.integers(offset + len(data), limits.MAX_STORED_BYTES))
    return StoreFile(draw(_ids), PublishedFile.WORKING_SET, offset, total, data)


CLIENT_MESSAGES: st.SearchStrategy[Message] = st.one_of(
    _hellos(),
    _fetches(),
    st.builds(
        FetchDigests,
        _ids,
        st.sampled_from(Level),
        st.integers(0, limits.MAX_PAGES - limits.MAX_DIGEST_LEAVES),
        st.integers(1, limits.MAX_DIGEST_LEAVES),
    ),
    st.builds(
        ReadFile,
        _ids,
        st.sampled_from(PublishedFile),
        st.integers(0, limits.MAX_FILE_OFFSET),
        st.integers(1, limits.MAX_FILE_DATA_BYTES),
    ),
    _store_files(),
    st.builds(Cancel, _ids),
    st.builds(Ping, _ids),
    st.builds(Pong, _ids),
    st.builds(Goodbye, _texts),
)

SERVER_MESSAGES: st.SearchStrategy[Message] = st.one_of(
    _welcomes,
    _pages(),
    _packed(),
    st.builds(
        Digests,
        _ids,
        st.sampled_from(Level),
        st.integers(0, limits.MAX_PAGES),
        st.integers(1, 256).map(lambda count: b"0123456789abcdef" * count),
        st.booleans(),
    ),
    st.builds(FileData, _ids, st.binary(max_size=300)),
    st.builds(FileStored, _ids),
    st.builds(Cancelled, _ids),
    st.builds(Error, st.integers(0, 2**64 - 1), st.sampled_from(ErrorCode), _texts),
    st.builds(Ping, _ids),
    st.builds(Pong, _ids),
    st.builds(Goodbye, _texts),
)
