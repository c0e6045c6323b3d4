"""Pre-copy at the destination: PAGES frames of a guest that still runs elsewhere, to whoever keeps candidates.

Whatever ends it (the source, the link, a full disk, nonsense from the source), the hand-over goes on with what came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio
from msgspec import Struct

from lazymem.errors import LazymemError, RemoteProtocolError
from lazymem.handover.channel import Stream
from lazymem.pages import PageRun
from lazymem.wire.frame import Role
from lazymem.wire.messages import Pages
from lazymem.wire.pagedata import decode_pages
from lazymem.wire.receivebuffer import ReceiveBuffer

_CHUNK_BYTES = 256 * 1024

_GRACE_SECONDS = 30.0
"""For what was on its way when the source's time was over; a source that takes longer is not waited for."""

Write = Callable[[Sequence[PageRun]], int]
"""Keep them, in a thread; returns how many pages had bytes. Raises LazymemError when no more can be kept."""


class Warmed(Struct):
    """What came: bytes over the wire, pages with bytes (again and again counts each time), and why no more, if that is
    no ordinary end."""

    received_bytes: int = 0
    pages: int = 0
    seconds: float = 0.0
    complaint: str = ""


async def take(stream: Stream, write: Write, seconds: float, warmed: Warmed) -> None:
    """All that comes, into `write`, for `seconds` and a little; `warmed` is told as it goes. Never raises for what the
    other side, the link or the disk does."""
    began = trio.current_time()
    buffer = ReceiveBuffer(Role.SERVER)
    try:
        with trio.fail_after(seconds + _GRACE_SECONDS):
            while data := await stream.receive_some(_CHUNK_BYTES):
                warmed.received_bytes += len(data)
                warmed.pages += await trio.to_thread.run_sync(_store, buffer, bytes(data), write)
                warmed.seconds = trio.current_time() - began
    except (LazymemError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        warmed.complaint = str(error) or "the connection broke"
    except trio.TooSlowError:
        warmed.complaint = "the source goes on for longer than it said"
    warmed.seconds = trio.current_time() - began


def _store(buffer: ReceiveBuffer, data: bytes, write: Write) -> int:
    buffer.feed(data)
    runs: list[PageRun] = []
    while (message := buffer.next_message()) is not None:
        if not isinstance(message, Pages):
            raise RemoteProtocolError(f"a {type(message).__name__} among the pages that come ahead of the guest")
        runs.append(PageRun(message.pages, decode_pages(message)))
    return write(runs) if runs else 0
