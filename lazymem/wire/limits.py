"""Upper bounds of the wire protocol, each with its reason. A server may allow less (`Limits` in its Welcome)."""

from __future__ import annotations

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.pages import PAGE_SIZE

MAX_FRAME_PAGES = 256
"""Pages of one PAGES frame: 1 MiB, one leaf of the digest tree, and a frame that a 1 Gb/s link sends in 9 ms."""

MAX_PAGE_DATA_BYTES = MAX_FRAME_PAGES * PAGE_SIZE

MAX_FILE_DATA_BYTES = 1 << 20
"""One FILE_DATA frame: as large as the largest PAGES frame, so that the receive buffer has one bound."""

MAX_STORED_BYTES = 1 << 20
"""A file that a client may have the server keep: what `snapshot.workingset` makes (a test holds the two equal)."""

MAX_STORE_PIECE_BYTES = 12 * 1024 - 16
"""Of one STORE_FILE, which so is no longer than the longest FETCH: a server's buffers grow for nobody."""

MAX_LEAF_BYTES = LEAF_PAGES * DIGEST_BYTES
"""Page digests of one leaf (1 MiB of RAM): 4 KiB."""

MAX_UPPER_DIGESTS = 65536
"""Leaf digests of one DIGESTS frame: 1 MiB, the whole upper level of 64 GiB of RAM."""

MAX_DIGESTS_BYTES = MAX_UPPER_DIGESTS * DIGEST_BYTES

MAX_DIGEST_LEAVES = 4096
"""Leaves of one FETCH_DIGESTS request at level LEAF: 16 MiB of answers, 4 GiB of RAM."""

MAX_RANGES = 1024
"""Ranges of one FETCH: 12 KiB. A server so needs no more than 16 KiB to hold any frame of a client."""

MAX_REQUEST_PAGES = 1 << 20
"""Pages of one FETCH, whatever a server's Welcome allows: 4 GiB."""

MAX_NAME_BYTES = 255
"""A snapshot's name is a folder's base name, and those end here on every Linux file system."""

MAX_TEXT_BYTES = 1024
"""An error's or a goodbye's text: one line for a terminal."""

MAX_MANIFEST_BYTES = 256 * 1024
"""What `snapshot.manifest` reads at most (a test holds the two equal)."""

MAX_PAGES = 1 << 34
"""Page numbers end here: 64 TiB, as `snapshot.manifest` has it; sums of two stay far inside 64 bits."""

MAX_FILE_OFFSET = 1 << 46
"""Published files end here too."""

MAX_PINGS = 8
"""Unanswered PINGs of one side. One is enough to see whether a peer lives; each costs it an answer."""

MAX_UNREAD_BYTES = 4 << 20
"""Received bytes that nobody asked for as events yet: two of the largest frames and a socket's read, then the caller
forgot to drain."""
