"""The messages of the wire protocol, as records. `docs/wire.md` gives each one's bytes; `codec` turns them into those.

A request (client to server) carries an `id` of the client's choice, unused among its open requests; every answer
carries the same. Replies come in any order. A `Fetch` is answered by any number of `Pages` or `Packed` (and `Digests`)
frames whose pages are exactly the asked ones in ascending order; the last one is marked `final`. An `Error` with the
request's id ends it too.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from lazymem.pages import PageRange

WIRE_VERSION = 1


class Capability(enum.IntFlag):
    """What both sides must say for either to use."""

    NONE = 0
    ZSTD = 1
    LEARN = 2
    """The client can send a working set; from the server: it takes one for this snapshot, which has none."""
    PACKED = 4
    """A FETCH may allow `Packed` answers."""
    VOUCH = 8
    """Of an unhashed snapshot, leaves may be asked for: from the server, it gives the digests that it vouches for."""
    SUMS = 16
    """`PublishedFile.SUMS` may be asked for: from the server, this snapshot has it."""


class FetchFlag(enum.IntFlag):
    NONE = 0
    BACKGROUND = 1
    """Guessed, not demanded: the server lets every demand of this client go first."""
    WANT_DIGESTS = 2
    """Hashed snapshot: send the leaf block of every leaf that the ranges touch, before the pages below it.
    Unhashed: `Pages` carry their page digests in any case."""
    PACKED = 4
    """The answer may have `Packed` frames. Of a hashed snapshot only, and where both sides said `Capability.PACKED`."""


class Encoding(enum.IntEnum):
    ZERO = 0
    """All pages are zero; no data follows."""
    RAW = 1
    ZSTD = 2
    """One zstd frame that holds its content size, which is `count` pages."""


class Level(enum.IntEnum):
    LEAF = 0
    """`index` is the leaf's number, data its page digests."""
    UPPER = 1
    """`index` is the first leaf's number, data leaf digests one after the other."""


class PublishedFile(enum.IntEnum):
    """Small whole files beside the RAM."""

    MANIFEST = 0
    VMSTATE = 1
    WORKING_SET = 2
    SUMS = 3
    """The leaves' sums, 16 bytes each. After a WELCOME with `Capability.SUMS`."""


class ErrorCode(enum.IntEnum):
    """Whose fault: 1xx the client's, 2xx the server's or its host's. The numbers are the wire's."""

    BAD_REQUEST = 100
    NO_SUCH_SNAPSHOT = 101
    UNSUPPORTED_VERSION = 102
    TOO_MANY_REQUESTS = 103
    NO_SUCH_FILE = 104
    NOT_WANTED = 105
    """A file that the server does not take, or not any more."""
    IO_ERROR = 200
    PAGE_CHANGED = 201
    """The published file is not what it was: the page's bytes are refused."""
    BUSY = 202
    """Too many clients."""
    SHUTTING_DOWN = 203


class Hello(Struct, frozen=True):
    """First frame of the client. An empty name means: the only snapshot."""

    name: str
    version_min: int = WIRE_VERSION
    version_max: int = WIRE_VERSION
    capabilities: Capability = (
        Capability.ZSTD | Capability.LEARN | Capability.PACKED | Capability.VOUCH | Capability.SUMS
    )


class Limits(Struct, frozen=True):
    """What the server takes from one connection; the client stays below."""

    max_request_pages: int
    max_request_ranges: int
    max_requests: int
    """Open requests at a time."""


class Welcome(Struct, frozen=True):
    """First frame of the server. `manifest` is manifest.json's bytes, empty for an unhashed snapshot (no manifest).

    `identity`: 32 bytes, equal for equal RAM only (`Manifest.identity`; unhashed: that server's own).
    `vmstate_bytes` 0: there is none. `working_set_bytes` likewise.
    """

    version: int
    capabilities: Capability
    limits: Limits
    name: str
    identity: bytes
    ram_bytes: int
    hashed: bool
    manifest: bytes
    vmstate_bytes: int
    working_set_bytes: int = 0


class Fetch(Struct, frozen=True):
    id: int
    ranges: tuple[PageRange, ...]
    flags: FetchFlag = FetchFlag.NONE


class Pages(Struct, frozen=True):
    """`data` is as on the wire (encoded). `digests`: 16 bytes a page from an unhashed snapshot's server, else empty.
    Zero pages (`Encoding.ZERO`) have neither: their digest is known."""

    id: int
    pages: PageRange
    encoding: Encoding
    data: bytes | memoryview = b""
    digests: bytes = b""
    final: bool = False


class Packed(Struct, frozen=True):
    """The next `count` asked pages of a `Fetch`, from page `first` on, over the ends of its ranges: many short ranges
    are then few frames. `data` is as in `Pages`, but never `Encoding.ZERO`: zero pages among them stand there."""

    id: int
    first: int
    count: int
    encoding: Encoding
    data: bytes | memoryview
    final: bool = False


class FetchDigests(Struct, frozen=True):
    """Ask for digests without pages: `count` leaves from `first` on, of one level. Of an unhashed snapshot only
    leaves, and only with `Capability.VOUCH`."""

    id: int
    level: Level
    first: int
    count: int


class Digests(Struct, frozen=True):
    """Of an unhashed snapshot's leaf: a page that the server does not have at hand has a digest of 16 zero bytes, and
    a leaf whose pages all have the same one is told by that one alone."""

    id: int
    level: Level
    index: int
    data: bytes
    final: bool = False


class ReadFile(Struct, frozen=True):
    id: int
    file: PublishedFile
    offset: int
    length: int


class FileData(Struct, frozen=True):
    """Answers `ReadFile`, one frame, shorter than asked only at the file's end."""

    id: int
    data: bytes


class StoreFile(Struct, frozen=True):
    """A piece of a file that the server is to keep: `data` stands at `offset` of `total_bytes`. Pieces come in order
    from 0 on; the one that ends the file is answered when the file was found good. Only with `Capability.LEARN`."""

    id: int
    file: PublishedFile
    offset: int
    total_bytes: int
    data: bytes


class FileStored(Struct, frozen=True):
    """Answers `StoreFile`."""

    id: int


class Cancel(Struct, frozen=True):
    """The client no longer waits for request `id`. Frames already on their way still come; the server's last word on
    that id is `Cancelled`, or the ordinary final frame if that was sent first."""

    id: int


class Cancelled(Struct, frozen=True):
    """The server's last word on a cancelled request; nothing with its id follows."""

    id: int


class Error(Struct, frozen=True):
    """`id` 0: about the connection, which ends after it."""

    id: int
    code: ErrorCode
    text: str


class Ping(Struct, frozen=True):
    id: int


class Pong(Struct, frozen=True):
    id: int


class Goodbye(Struct, frozen=True):
    """No new requests; the connection closes once open ones are answered."""

    reason: str = ""


Message = (
    Hello
    | Welcome
    | Fetch
    | Pages
    | Packed
    | FetchDigests
    | Digests
    | ReadFile
    | FileData
    | StoreFile
    | FileStored
    | Cancel
    | Cancelled
    | Error
    | Ping
    | Pong
    | Goodbye
)
