"""From the first request to the last: serve until the mount is gone, and never take it from under a guest (rule 13).

A wish to end (SIGTERM, ctrl-C) tries to unmount. While somebody holds the file the kernel refuses; the daemon then
says who, serves on, and tries again when a descriptor goes. Only an abort of the connection ends it earlier.
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

from lazymem.errors import MountError
from lazymem.fs import holders, session
from lazymem.fs.channel import Channel

log = logging.getLogger(__name__)

MAX_LIBRARY_REQUESTS = 64
"""Requests of pyfuse3's at a time: names, attributes, fsync. A guest's page faults are the channel's."""

RETRY_SECONDS = 1.0
"""Somebody who merely stood in the folder leaves without a word to us, so the unmount is tried again this often."""


class Lifetime:
    """Serves the attached session of the mount at `path`, with device number `device` ("MAJ:MIN"), over `descriptor`,
    by `channel` and pyfuse3.

    `wish_to_end` is set by a signal: unmount as soon as nobody holds the file.
    """

    def __init__(self, path: str, device: str, descriptor: int, channel: Channel, wish_to_end: trio.Event) -> None:
        self._path = path
        self._descriptor = descriptor
        self._channel = channel
        self._device = device
        self._wish = wish_to_end
        self._changed = trio.Event()

    def released(self) -> None:
        """A descriptor of the RAM file has gone: an unmount may work now."""
        self._changed.set()

    async def serve(self) -> None:
        """Return once the mount is gone, whoever unmounted it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unmount_when_asked)
            nursery.start_soon(self._channel.run)
            nursery.start_soon(self._answer_requests)
            # Not the library's word: it waits for every request, also for one whose page cannot come and whose reader
            # is dead. What is still unanswered when the mount has gone has nobody who waits for it.
            await trio.to_thread.run_sync(session.wait_gone, self._descriptor, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    async def _answer_requests(self) -> None:
        await pyfuse3.main(max_tasks=MAX_LIBRARY_REQUESTS)

    async def _unmount_when_asked(self) -> None:
        await self._wish.wait()
        told: list[holders.Holder] = []
        while True:
            try:
                if await trio.to_thread.run_sync(self._maybe_unmount, abandon_on_cancel=True):
                    return
                told = await trio.to_thread.run_sync(self._tell, told, abandon_on_cancel=True)
            except RuntimeError as error:  # no thread for us, says trio; and a guest may still be there
                log.error("cannot unmount %s now: %s; serving on", self._path, error)
            with trio.move_on_after(RETRY_SECONDS):
                await self._changed.wait()
            self._changed = trio.Event()

    def _maybe_unmount(self) -> bool:
        try:
            return session.unmount(self._path, apart=True)
        except MountError as error:
            log.error("%s; serving on", error)
            return False

    def _tell(self, told: list[holders.Holder]) -> list[holders.Holder]:
        """Say who holds the mount, once each time the list changes."""
        found = holders.find_holders(self._device, self._path)
        if found != told:
            who = ", ".join(str(holder) for holder in found) or "somebody"
            log.warning("%s is still in use: %s; serving on until they end", self._path, who)
        return found
