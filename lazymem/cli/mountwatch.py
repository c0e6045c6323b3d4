"""Who is told of the kernel's requests for the RAM: the filler of its page cache, which knows its own, and touches."""

from __future__ import annotations

import trio

from lazymem.cli.mountrecording import MountRecording
from lazymem.fs import mountinfo
from lazymem.fs.channel import Taken, Written
from lazymem.fs.pagecache import PageCache
from lazymem.store.touches import Touches


class Watch:
    """`maybe_touches`: only where somebody wants to know of them, since each READ pays for it."""

    def __init__(
        self,
        maybe_page_cache: PageCache | None,
        maybe_touches: Touches | None,
        maybe_recording: MountRecording | None,
    ) -> None:
        self._maybe_page_cache = maybe_page_cache
        self._maybe_recording = maybe_recording
        self._is_gone = False
        self.maybe_on_read = _on_read(maybe_page_cache, maybe_touches)
        self.maybe_on_write: Written | None = maybe_touches.written if maybe_touches is not None else None

    async def run(self, mounted: mountinfo.Mount, wish_to_end: trio.Event) -> None:
        """While the mount is there."""
        async with trio.open_nursery() as nursery:
            if self._maybe_recording is not None:
                nursery.start_soon(self._maybe_recording.run)
                await self._maybe_recording.over.wait()
            if self._maybe_page_cache is not None and not self._is_gone:
                nursery.start_soon(self._maybe_page_cache.run, mounted, wish_to_end)

    async def finish(self) -> None:
        """The mount is gone."""
        self._is_gone = True
        if self._maybe_recording is not None:
            await self._maybe_recording.finish()


def _on_read(maybe_page_cache: PageCache | None, maybe_touches: Touches | None) -> Taken | None:
    if maybe_touches is None:
        return maybe_page_cache.takes if maybe_page_cache is not None else None
    touched = maybe_touches.read
    if maybe_page_cache is None:

        def guests(thread: int, offset: int, size: int) -> bool:
            touched(offset, size)
            return False

        return guests
    is_ours = maybe_page_cache.takes

    def told(thread: int, offset: int, size: int) -> bool:
        if is_ours(thread, offset, size):
            return True
        touched(offset, size)
        return False

    return told
