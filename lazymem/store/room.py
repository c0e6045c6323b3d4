"""What a guest wrote, and the disk below it: makes room on a full one, and waits for a full or dying one.

Fetched pages go first, then what was reserved. When both are used up, or the disk is not full but dying, the write
waits: its bytes are in the kernel, which forgets them once it is told of a failure. So does a read of written pages,
since they are nowhere else.
"""

from __future__ import annotations

import errno
import logging
import math
import os

import trio

from lazymem.errors import DeadlineError, StoreError
from lazymem.pages import PageRange
from lazymem.store.cachefolder import CacheFolder
from lazymem.store.mendable import is_mendable, is_out_of_room, what_to_do
from lazymem.store.shedding import Shedder
from lazymem.store.statefiles import StateFolder
from lazymem.store.threads import in_thread

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""Freed at a time: four of the largest writes, and small against what guests fetch."""

RETRY_SECONDS = 0.5
"""Who waits tries again this often: soon for a person who mends the disk, rare for a disk."""

COMPLAIN_SECONDS = 60.0
"""Between two lines of what goes on."""


class Room:
    """Of one run. Takes nothing over. `deadline_seconds`: of each read; None waits for ever."""

    def __init__(self, state: StateFolder, cache: CacheFolder, deadline_seconds: float | None = None) -> None:
        self._state = state
        self._deadline_seconds = math.inf if deadline_seconds is None else deadline_seconds
        self._reads_waiting = 0
        self._lock = trio.Lock()
        self._givers = trio.CapacityLimiter(1)
        self._waiting = 0
        self._making_was_told = False
        self._reserve_was_told = False
        self._complain_at: dict[str, float] = {}
        self._shedder = Shedder(cache, state.written)
        self._files = cache.pages, state.ram
        self._maybe_sheds: bool | None = None  # not looked yet
        self._made = 0  # so often: whoever failed before the last time tries again first

    @property
    def waiting_writes(self) -> int:
        """Writes that wait for room, or for a disk that refuses them."""
        return self._waiting

    @property
    def shed_pages(self) -> int:
        return self._shedder.shed_pages

    async def store(self, pages: PageRange, offset: int, data: bytes) -> None:
        """As `StateFolder.store`; returns when it is done, however long that takes.

        Raises:
            StoreError: of a kind that time does not mend.
        """
        waited = False
        try:
            while True:
                made = self._made
                try:
                    await self._state.store(pages, offset, data)
                    return
                except StoreError as error:
                    if not is_mendable(error):
                        raise
                    if await self._make(error, made):
                        continue
                    if not waited:
                        waited = True
                        self._begin_waiting(error)
                await trio.sleep(RETRY_SECONDS)
        finally:
            if waited:
                self._end_waiting()

    async def read(self, pages: PageRange) -> bytes:
        """The bytes of written pages.

        Raises:
            DeadlineError: the disk refused for so long.
            StoreError: of a kind that time does not mend.
        """
        waited = False
        try:
            with trio.move_on_after(self._deadline_seconds):
                while True:
                    try:
                        return await self._state.ram.read(pages.offset_bytes, pages.length_bytes)
                    except StoreError as error:
                        if not is_mendable(error):
                            raise
                        if not self._reads_waiting:
                            log.error("%s: the guest waits for it; %s", error, self._what_to_do(error))
                        self._reads_waiting += not waited
                        waited = True
                    await trio.sleep(RETRY_SECONDS)
            raise DeadlineError(f"the disk did not give page {pages.start}, which the guest wrote, back in time")
        finally:
            self._reads_waiting -= waited

    def _what_to_do(self, error: StoreError) -> str:
        return what_to_do(error, str(self._state.path))

    async def _make(self, error: StoreError, made_before: int) -> bool:
        """A write failed with `error`, begun when `_made` was `made_before`. Whether it is worth a try at once."""
        if not is_out_of_room(error):
            return False
        async with self._lock:
            if self._made == made_before:
                if not await self._shed() and not await self._give():
                    return False
                self._made += 1
            return True

    async def _shed(self) -> bool:
        try:
            if self._maybe_sheds is None:
                self._maybe_sheds = len({os.fstat(file.fileno()).st_dev for file in self._files}) == 1
        except OSError:  # the disk does not say which it is: perhaps the next time
            return False
        if not self._maybe_sheds:
            return False
        try:
            freed = await self._shedder.shed(STEP_BYTES)
        except StoreError as error:
            self._maybe_sheds = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EAGAIN
            self._complain("fetched pages cannot make room for what the guest writes: %s", error)
            return False
        if freed and not self._making_was_told:
            self._making_was_told = True
            log.warning(
                "the disk of %s is full: fetched pages are given up for what the guest writes, and come again when they"
                " are touched; make room there",
                self._state.path,
            )
        return freed > 0

    async def _give(self) -> bool:
        if self._state.reserve is None:
            return False
        try:
            given = await in_thread(self._givers, self._state.reserve.give, STEP_BYTES)
        except OSError as error:
            self._complain("the reserve in %s cannot be used: %s", self._state.path, error)
            return False
        if given and not self._reserve_was_told:
            self._reserve_was_told = True
            log.warning(
                "the disk of %s is full: what the guest writes takes what was reserved for it; make room there",
                self._state.path,
            )
        return given > 0

    def _complain(self, text: str, *what: object) -> None:
        """Each of these is tried again as often as a write is."""
        now = trio.current_time()
        if now >= self._complain_at.get(text, -math.inf):
            self._complain_at[text] = now + COMPLAIN_SECONDS
            log.warning(text, *what)

    def _begin_waiting(self, error: StoreError) -> None:
        if not self._waiting:
            what = self._what_to_do(error)
            log.error(
                "%s: what the guest writes waits, and soon the guest too; %s: it goes on by itself then", error, what
            )
        self._waiting += 1

    def _end_waiting(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            log.warning("nothing the guest wrote waits for its disk any more")
