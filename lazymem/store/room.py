"""Room for what a guest writes, on a disk that has none left: fetched pages go first, then what was reserved.

When both are used up, or the disk is not full but dying, the write waits: its bytes are in the kernel, which forgets
them once it is told of a failure.
"""

from __future__ import annotations

import errno
import logging
import os

import trio

from lazymem.errors import StoreError
from lazymem.store.cachefolder import CacheFolder
from lazymem.store.mendable import is_out_of_room, what_to_do
from lazymem.store.pagefile import in_thread
from lazymem.store.shedding import Shedder
from lazymem.store.statefolder import StateFolder

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""Freed at a time: four of the largest writes, and small against what guests fetch."""


class Room:
    """Of one run. Takes nothing over."""

    def __init__(self, state: StateFolder, cache: CacheFolder) -> None:
        self._state = state
        self._lock = trio.Lock()
        self._givers = trio.CapacityLimiter(1)
        self._waiting = 0
        self._making_was_told = False
        self._reserve_was_told = False
        self._shedder = Shedder(cache, state.written)
        self._sheds = _device(cache.pages.fileno()) == _device(state.ram.fileno())
        self.made = 0
        """How often room was made: whoever failed before the last time tries again first."""

    @property
    def waiting_writes(self) -> int:
        """Writes that wait for room, or for a disk that refuses them."""
        return self._waiting

    @property
    def shed_pages(self) -> int:
        return self._shedder.shed_pages

    async def make(self, error: StoreError, made_before: int) -> bool:
        """A write failed with `error`, begun when `made` was `made_before`. Whether it is worth a try at once."""
        if not is_out_of_room(error):
            return False
        async with self._lock:
            if self.made == made_before and not await self._shed() and not await self._give():
                return False
            if self.made == made_before:
                self.made += 1
            return True

    async def _shed(self) -> bool:
        if not self._sheds:
            return False
        try:
            freed = await self._shedder.shed(STEP_BYTES)
        except StoreError as error:
            self._sheds = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EAGAIN
            log.warning("fetched pages cannot make room for what the guest writes: %s", error)
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
            log.warning("the reserve in %s cannot be used: %s", self._state.path, error)
            return False
        if given and not self._reserve_was_told:
            self._reserve_was_told = True
            log.warning(
                "the disk of %s is full: what the guest writes takes what was reserved for it; make room there",
                self._state.path,
            )
        return given > 0

    def begin_waiting(self, error: StoreError) -> None:
        """A write waits from here on."""
        if not self._waiting:
            log.error(
                "%s: what the guest writes waits, and soon the guest too; %s: it goes on by itself then",
                error,
                what_to_do(error, str(self._state.path)),
            )
        self._waiting += 1

    def end_waiting(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            log.warning("nothing the guest wrote waits for its disk any more")


def _device(fd: int) -> int:
    return os.fstat(fd).st_dev
