"""Who is told of the kernel's requests for the RAM: the filler of its page cache, which knows its own; then who refuses
read-ahead; then touches."""

from __future__ import annotations

import trio

from lazymem.cli.mountrecording import MountRecording
from lazymem.fs import mountinfo
from lazymem.fs.channelends import Taken, Written
from lazymem.fs.pagecache import PageCache
from lazymem.fs.readahead import ReadAheads
from lazymem.fs.refused import Refused
from lazymem.store.touches import Touches


class Watch:
    """All of it only where somebody wants it, since each READ pays for it."""

    def __init__(
        self,
        maybe_page_cache: PageCache | None,
        maybe_read_aheads: ReadAheads | None,
        maybe_refused: Refused | None,
        maybe_touches: Touches | None,
        maybe_recording: MountRecording | None,
    ) -> None:
        self._maybe_page_cache = maybe_page_cache
        self._maybe_recording = maybe_recording
        self._is_gone = False
        self._maybe_read_aheads = maybe_read_aheads
        self._maybe_refused = maybe_refused
        self._maybe_touches = maybe_touches
        nobody = maybe_page_cache is None and maybe_read_aheads is None and maybe_touches is None
        self.maybe_on_read: Taken | None = None if nobody else self._on_read
        self.maybe_on_write: Written | None = maybe_touches.written if maybe_touches is not None else None

    async def run(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> None:
        """While the mount is there."""
        async with trio.open_nursery() as nursery:
            if self._maybe_recording is not None:
                nursery.start_soon(self._maybe_recording.run)
                if self._maybe_read_aheads is not None:
                    self._maybe_read_aheads.refuse_everything(True)
                await self._maybe_recording.over.wait()
                if self._maybe_read_aheads is not None:
                    self._maybe_read_aheads.refuse_everything(False)
            if self._maybe_page_cache is not None and not self._is_gone:
                nursery.start_soon(self._maybe_page_cache.run, mounted, wish_to_end)
            if self._maybe_refused is not None and not self._is_gone:
                nursery.start_soon(self._maybe_refused.run, mounted)

    async def finish(self) -> None:
        """The mount is gone."""
        self._is_gone = True
        if self._maybe_recording is not None:
            await self._maybe_recording.finish()

    def _on_read(self, thread: int, offset: int, size: int) -> bool:
        """As `Taken`."""
        if self._maybe_refused is not None and self._maybe_refused.takes(thread, offset, size):
            return False
        if self._maybe_page_cache is not None and self._maybe_page_cache.takes(thread, offset, size):
            if self._maybe_refused is not None:
                self._maybe_refused.given(offset, size)
            return False
        if self._maybe_read_aheads is not None and self._maybe_read_aheads.refuses(offset, size):
            return True
        if self._maybe_refused is not None:
            self._maybe_refused.touched(offset, size)
        if self._maybe_touches is not None:
            self._maybe_touches.read(offset, size)
        return False
