"""Which page of the RAM each thread of an emulator touched last, by the kernel's counters of page faults.

When a READ of a thread comes, its newest fault is the page that it waits for. Who may not count (`faultcounter`), and
whose faults are not counted (KVM's guests, whose faults no instruction of the emulator makes), is served as if there
were none of this. Each fault of a thread that is counted costs it a third of a microsecond, so it ends when nothing of
the RAM is missing. State belongs to trio's thread. See record 0035.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import trio

from lazymem.fs.faultcounter import FaultCounter
from lazymem.fs.readorder import Touch
from lazymem.fs.tree import RAM_INODE
from lazymem.pages import PAGE_SHIFT

log = logging.getLogger(__name__)

MOST_THREADS = 32
"""Counted at a time: 8 KiB of memory each, which is half of what the kernel allows a user that is not root."""

MOST_LOOKS = 16
"""At the maps of a process, as long as it has none of the RAM."""

FIRST_LOOK_SECONDS = 0.005
LOOK_SECONDS = 1.0
"""An emulator opens the RAM, and starts its vCPUs' threads then: new threads are looked for after the first of these
times, then after twice as long each time, up to the second."""


class _Process:
    """Where it has the RAM. `device`: as in its table of maps."""

    def __init__(self, device: bytes) -> None:
        self._device = device
        self._looks = 0
        self._maps: list[tuple[int, int, int]] = []

    def maybe_page(self, thread: int, address: int) -> int | None:
        """`thread`: any of the process."""
        if not self._maps and self._looks < MOST_LOOKS:
            self._looks += 1
            with contextlib.suppress(OSError):  # it has ended
                self._maps = list(_ram_maps(thread, self._device))
        for start, end, offset in self._maps:
            if start <= address < end:
                return (address - start + offset) >> PAGE_SHIFT
        return None


def _ram_maps(thread: int, device: bytes) -> Iterator[tuple[int, int, int]]:
    """First address, end, and the first byte's place in the file."""
    with open(f"/proc/{thread}/maps", "rb") as file:
        for line in file:
            place, _, offset, where, inode, *_ = line.split(maxsplit=5)
            if where == device and int(inode) == RAM_INODE:
                start, end = place.split(b"-")
                yield int(start, 16), int(end, 16), int(offset, 16)


class _Watched(NamedTuple):
    counter: FaultCounter
    process: _Process


class FaultAddresses:
    """As `readorder.Touched`, while `run` runs; else nothing is known. `device`: the mount's, as in the mount table."""

    def __init__(self, device: str) -> None:
        major, minor = (int(part) for part in device.split(":"))
        self._device = b"%02x:%02x" % (major, minor)
        self._maybe_first: FaultCounter | None = None
        self._threads: dict[int, _Watched | None] = {}  # None: it cannot be counted, or need not
        self._somebody = trio.Event()

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Until cancelled, or until it is over."""
        try:
            # While there is one, the next ones take no time, and those are opened in trio's thread.
            self._maybe_first = await trio.to_thread.run_sync(FaultCounter, 0)
        except OSError as error:
            log.debug("which page somebody touches is not known: %s", error)
            return
        try:
            await self._look_until(is_over)
        finally:
            self._forget(list(self._threads))
            self._maybe_first.close()
            self._maybe_first = None

    async def _look_until(self, is_over: Callable[[], bool]) -> None:
        seconds = LOOK_SECONDS
        while not is_over():
            with trio.move_on_after(seconds):
                await self._somebody.wait()
                self._somebody = trio.Event()
                seconds = FIRST_LOOK_SECONDS / 2
            seconds = min(2 * seconds, LOOK_SECONDS)
            self._forget([thread for thread in self._threads if _has_ended(thread)])
            watched = {each.process: thread for thread, each in self._threads.items() if each is not None}
            for process, thread in watched.items():
                self._watch(_threads_of(thread), process)

    def watch(self, thread: int) -> None:
        """All threads of its process, from their next faults on. (0 stands for one that we cannot see.)"""
        if self._maybe_first is None or thread <= 0 or thread in self._threads:
            return
        threads = _threads_of(thread)
        if os.getpid() in threads:  # what we have the kernel read ourselves
            threads = []
        self._watch(threads, _Process(self._device))
        if thread not in self._threads and len(self._threads) < MOST_THREADS:
            self._threads[thread] = None  # not to be looked at with each of its READs
        self._somebody.set()

    def _watch(self, threads: list[int], process: _Process) -> None:
        for thread in threads:
            if thread not in self._threads and len(self._threads) < MOST_THREADS:
                self._threads[thread] = _maybe_watched(thread, process)

    def maybe_latest(self, thread: int) -> Touch | None:
        """What that thread touched last; one that was not known is watched from now on."""
        if thread not in self._threads:
            self.watch(thread)
        maybe_watched = self._threads.get(thread)
        return _maybe_touch(thread, maybe_watched) if maybe_watched is not None else None

    def latest(self) -> list[Touch]:
        """Of all threads that touched the RAM last."""
        touches = (_maybe_touch(thread, watched) for thread, watched in self._threads.items() if watched is not None)
        return [touch for touch in touches if touch is not None]

    def _forget(self, threads: list[int]) -> None:
        for thread in threads:
            maybe_watched = self._threads.pop(thread)
            if maybe_watched is not None:
                maybe_watched.counter.close()


def _has_ended(thread: int) -> bool:
    return not os.path.exists(f"/proc/{thread}")


def _threads_of(thread: int) -> list[int]:
    """All of its process; none if it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{thread}/task")]
    except OSError:
        return []


def _maybe_watched(thread: int, process: _Process) -> _Watched | None:
    try:
        return _Watched(FaultCounter(thread), process)
    except OSError as error:
        log.debug("which page thread %d touches is not known: %s", thread, error)
        return None


def _maybe_touch(thread: int, watched: _Watched) -> Touch | None:
    stamp, address = watched.counter.newest()
    maybe_page = watched.process.maybe_page(thread, address) if stamp else None
    return Touch(thread, maybe_page, stamp) if maybe_page is not None else None
