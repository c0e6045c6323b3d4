"""What makes one message legal by itself. Asked before a message is sent and after one was received; no state.

Each function returns what is wrong in words, or None. The caller knows whose fault that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lazymem.digests import DIGEST_BYTES
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange
from lazymem.wire import limits
from lazymem.wire.messages import (
    Digests,
    Encoding,
    Fetch,
    FetchDigests,
    FileData,
    Hello,
    Level,
    Message,
    Packed,
    Pages,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)


def problem(message: Message) -> str | None:
    """What is wrong with `message`, or None."""
    rule = _RULES.get(type(message))
    return None if rule is None else rule(message)


def name_problem(name: str) -> str | None:
    """A snapshot's name, or the empty one: at most 255 bytes of printable UTF-8, no slash."""
    if "/" in name or not name.isprintable():
        return f"the snapshot name {name!r} has a slash or unprintable characters"
    if len(name.encode()) > limits.MAX_NAME_BYTES:
        return f"a snapshot name of more than {limits.MAX_NAME_BYTES} bytes"
    return None


def _hello(message: Hello) -> str | None:
    if not 0 < message.version_min <= message.version_max:
        return f"versions {message.version_min} to {message.version_max} are no range"
    return name_problem(message.name)


def _welcome(message: Welcome) -> str | None:
    allowed = message.limits
    if min(allowed.max_request_pages, allowed.max_request_ranges, allowed.max_requests, message.version) < 1:
        return "a WELCOME with a version or limit of 0"
    if message.ram_bytes % PAGE_SIZE or not 0 < message.ram_bytes <= limits.MAX_PAGES << PAGE_SHIFT:
        return f"a WELCOME for RAM of {message.ram_bytes} bytes"
    if max(message.vmstate_bytes, message.working_set_bytes) > limits.MAX_FILE_OFFSET:
        return "a WELCOME with a file beyond any size"
    if len(message.identity) != 32:
        return f"an identity of {len(message.identity)} bytes"
    if message.hashed and not message.manifest:
        return "a hashed snapshot without a manifest"
    return name_problem(message.name)


def ranges_problem(ranges: Sequence[PageRange]) -> str | None:
    """Ascending, not overlapping, inside the page numbers, few enough."""
    end = 0
    for pages in ranges:
        if pages.start < end:
            return f"ranges not ascending at page {pages.start}"
        end = pages.start + pages.count
    if end > limits.MAX_PAGES:
        return f"a range to page {end}, beyond any RAM"
    if not 1 <= len(ranges) <= limits.MAX_RANGES:
        return f"a request with {len(ranges)} ranges"
    return None


def _fetch(message: Fetch) -> str | None:
    wrong = ranges_problem(message.ranges)
    if wrong is None and sum([pages.count for pages in message.ranges]) > limits.MAX_REQUEST_PAGES:
        return f"a request for more than {limits.MAX_REQUEST_PAGES} pages"
    return wrong


def _pages(message: Pages) -> str | None:
    count = message.pages.count
    if count > limits.MAX_FRAME_PAGES or message.pages.start + count > limits.MAX_PAGES:
        return f"PAGES with {count} pages from {message.pages.start}"
    length, encoding, whole = len(message.data), message.encoding, count * PAGE_SIZE
    if encoding == Encoding.RAW:
        good = length == whole
    elif encoding == Encoding.ZSTD:
        good = 0 < length < whole
    else:
        good = length == 0 and not message.digests
    if not good:
        return f"{count} {encoding.name} pages with {length} bytes"
    if message.digests and len(message.digests) != count * DIGEST_BYTES:
        return f"{count} pages with {len(message.digests)} bytes of digests"
    return None


def _packed(message: Packed) -> str | None:
    length, whole = len(message.data), message.count * PAGE_SIZE
    if not 1 <= message.count <= limits.MAX_FRAME_PAGES or message.first >= limits.MAX_PAGES:
        return f"PACKED with {message.count} pages from {message.first}"
    good = {Encoding.RAW: length == whole, Encoding.ZSTD: 0 < length < whole}
    if not good.get(message.encoding, False):
        return f"{message.count} packed {message.encoding.name} pages with {length} bytes"
    return None


def _fetch_digests(message: FetchDigests) -> str | None:
    most = limits.MAX_DIGEST_LEAVES if message.level == Level.LEAF else limits.MAX_UPPER_DIGESTS
    if not 1 <= message.count <= most or message.first + message.count > limits.MAX_PAGES:
        return f"digests of {message.count} leaves from {message.first}"
    return None


def _digests(message: Digests) -> str | None:
    most = limits.MAX_LEAF_BYTES if message.level == Level.LEAF else limits.MAX_DIGESTS_BYTES
    if not DIGEST_BYTES <= len(message.data) <= most or len(message.data) % DIGEST_BYTES:
        return f"a {message.level.name} block of {len(message.data)} bytes"
    if message.index > limits.MAX_PAGES:
        return f"a leaf number {message.index}"
    return None


def _read_file(message: ReadFile) -> str | None:
    if not 1 <= message.length <= limits.MAX_FILE_DATA_BYTES or message.offset > limits.MAX_FILE_OFFSET:
        return f"a read of {message.length} bytes at {message.offset}"
    return None


def _file_data(message: FileData) -> str | None:
    return None if len(message.data) <= limits.MAX_FILE_DATA_BYTES else f"{len(message.data)} bytes of a file"


def _store_file(message: StoreFile) -> str | None:
    count, total = len(message.data), message.total_bytes
    if message.file is not PublishedFile.WORKING_SET:
        return f"a {message.file.name} to be stored"
    if not 1 <= count <= limits.MAX_STORE_PIECE_BYTES or not message.offset + count <= total <= limits.MAX_STORED_BYTES:
        return f"a piece of {count} bytes at {message.offset} of {total} to be stored"
    return None


_RULES: dict[type, Callable[[Any], str | None]] = {
    Hello: _hello,
    Welcome: _welcome,
    Fetch: _fetch,
    Pages: _pages,
    Packed: _packed,
    FetchDigests: _fetch_digests,
    Digests: _digests,
    ReadFile: _read_file,
    FileData: _file_data,
    StoreFile: _store_file,
}
