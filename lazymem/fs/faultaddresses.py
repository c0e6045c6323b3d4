"""Which page of the RAM each thread of an emulator touched last, by the kernel's counters of page faults.

When a READ of a thread comes, its newest fault is the page that it waits for. Who may not count (`faultcounter`), and
whose faults are not counted (KVM's guests, whose faults no instruction of the emulator makes), is served as if there
were none of this. Each fault of a thread that is counted costs it half a microsecond, so it ends when nothing of the
RAM is missing.

To look at a process, or to begin to count, may wait for locks that one of its threads holds while it waits for us. So
that is done in a thread, which shares nothing with trio's: `_look`. Records are read in trio's thread, without a system
call. See record 0035.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar, TypeVarTuple

import trio

from lazymem.fs.faultcounter import FaultCounter
from lazymem.fs.readorder import Touch
from lazymem.fs.tree import RAM_INODE
from lazymem.pages import PAGE_SHIFT

log = logging.getLogger(__name__)

A = TypeVarTuple("A")
R = TypeVar("R")

MOST_THREADS = 32
"""Counted at a time: 8 KiB of memory each, which is half of what the kernel allows a user that is not root."""

FIRST_LOOK_SECONDS = 0.005
LOOK_SECONDS = 1.0
"""An emulator opens the RAM, then maps it, then starts its vCPUs' threads: it is looked at again after the first of
these times, then after twice as long each time, up to the second. Who comes later tells by
a READ of its own, or opens the RAM."""


_NOBODY = 0
"""The process of a thread that is not there, or that we cannot see."""


class _Map(NamedTuple):
    """Addresses, and in bytes where in the file the first one is."""

    start: int
    end: int
    offset: int


class _Watched(NamedTuple):
    """A thread. None: it cannot be counted, or need not be."""

    process: int
    maybe_counter: FaultCounter | None


class _Seen(NamedTuple):
    """What one look found: where processes have the RAM, and threads that were not known."""

    maps: dict[int, list[_Map]]
    threads: dict[int, _Watched]


class FaultAddresses:
    """As `readorder.Touched`, while `run` runs; else nothing is known.

    `device`: the mount's, as in the mount table. `pays`: whether it is worth it to watch somebody now.
    """

    def __init__(self, device: str, pays: Callable[[], bool]) -> None:
        major, minor = (int(part) for part in device.split(":"))
        self._device = b"%02x:%02x" % (major, minor)
        self._pays = pays
        self._runs = False
        self._limiter = trio.CapacityLimiter(1)  # a thread that stands is nobody else's
        self._asked: set[int] = set()
        self._somebody = trio.Event()
        self._maps: dict[int, list[_Map]] = {}  # by process
        self._threads: dict[int, _Watched] = {}

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Until cancelled, or until it is over."""
        self._runs = True
        maybe_first = None
        try:
            if not self._pays():
                await self._somebody.wait()
            # While there is one, the next ones take the kernel no time.
            maybe_first = await self._maybe_in_thread(_maybe_counter, 0)
            if maybe_first is not None:
                await self._look_until(is_over)
        finally:
            self._runs = False
            self._asked.clear()
            self._forget(list(self._threads))
            if maybe_first is not None:
                maybe_first.close()

    async def _look_until(self, is_over: Callable[[], bool]) -> None:
        seconds = LOOK_SECONDS
        while not is_over():
            with trio.move_on_after(seconds):
                await self._somebody.wait()
                self._somebody = trio.Event()
                seconds = FIRST_LOOK_SECONDS / 2
            self._forget([thread for thread in self._threads if _has_ended(thread)])
            if self._asked or seconds < LOOK_SECONDS:  # later nothing is expected, and a thread would be kept for it
                await self._look()
                seconds = min(2 * seconds, LOOK_SECONDS)

    async def _look(self) -> None:
        asked, self._asked = self._asked, set()
        known = {thread: watched.process for thread, watched in self._threads.items()}
        maybe_seen = await self._maybe_in_thread(_look, asked, known, self._device)
        if maybe_seen is None:
            self._asked |= asked
        else:
            self._maps = maybe_seen.maps
            self._threads |= maybe_seen.threads

    async def _maybe_in_thread(self, work: Callable[[*A], R], *arguments: *A) -> R | None:
        """None: this host has no thread for us."""
        try:
            return await trio.to_thread.run_sync(work, *arguments, abandon_on_cancel=True, limiter=self._limiter)
        except RuntimeError as error:  # threading's word for it
            log.debug("nobody looks which page somebody touches: %s", error)
            return None

    def watch(self, thread: int) -> None:
        """All threads of its process, from a moment on, if that pays. (0 stands for one that we cannot see.)"""
        if self._runs and thread > 0 and len(self._threads) + len(self._asked) < MOST_THREADS and self._pays():
            self._asked.add(thread)
            self._somebody.set()

    def maybe_latest(self, thread: int) -> Touch | None:
        """What that thread touched last; one that was not known is watched from a moment on."""
        maybe_watched = self._threads.get(thread)
        if maybe_watched is None:
            self.watch(thread)
            return None
        return self._maybe_touch(thread, maybe_watched)

    def latest(self) -> list[Touch]:
        """Of all threads that touched the RAM last."""
        touches = (self._maybe_touch(thread, watched) for thread, watched in self._threads.items())
        return [touch for touch in touches if touch is not None]

    def _maybe_touch(self, thread: int, watched: _Watched) -> Touch | None:
        if watched.maybe_counter is None:
            return None
        maps = self._maps.get(watched.process)
        if not maps:
            self._asked.add(thread)  # it has mapped the RAM since, or merely reads it: in a second at most it is seen
            return None
        stamp, address = watched.maybe_counter.newest()
        for start, end, offset in maps:
            if start <= address < end:
                return Touch(thread, (address - start + offset) >> PAGE_SHIFT, stamp)
        return None

    def _forget(self, threads: list[int]) -> None:
        for thread in threads:
            maybe_counter = self._threads.pop(thread).maybe_counter
            if maybe_counter is not None:
                maybe_counter.close()


def _look(asked: Collection[int], known: Mapping[int, int], device: bytes) -> _Seen:
    """At the processes of all these threads. `known`: thread to process. Blocking, for a thread."""
    seen = _Seen({}, {})
    for thread in asked:
        if _is_our_own(thread):  # what we have the kernel read ourselves
            seen.threads[thread] = _Watched(os.getpid(), None)
    others = (_maybe_process(thread) for thread in asked if thread not in seen.threads)
    for process in {*known.values(), *(other for other in others if other is not None)} - {_NOBODY, os.getpid()}:
        for thread in _threads_of(process):
            if thread not in known and len(known) + len(seen.threads) < MOST_THREADS:
                seen.threads[thread] = _Watched(process, _maybe_counter(thread))
        seen.maps[process] = _ram_maps(process, device)
    for thread in asked:
        if thread not in known:
            seen.threads.setdefault(thread, _Watched(_NOBODY, None))  # not to be looked for at each of its READs
    return seen


def _has_ended(thread: int) -> bool:
    """Waits for nobody."""
    return not os.path.exists(f"/proc/{thread}")


def _is_our_own(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")


def _maybe_process(thread: int) -> int | None:
    """None: it has ended."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"Tgid:"))
    except (OSError, StopIteration):
        return None


def _threads_of(process: int) -> list[int]:
    """None if it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    except OSError:
        return []


def _ram_maps(process: int, device: bytes) -> list[_Map]:
    """None if it has ended, or is not ours to see."""
    try:
        with open(f"/proc/{process}/maps", "rb") as file:
            lines = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    found = []
    for place, _, offset, where, inode, *_ in lines:
        if where == device and int(inode) == RAM_INODE:
            start, end = place.split(b"-")
            found.append(_Map(int(start, 16), int(end, 16), int(offset, 16)))
    return found


def _maybe_counter(thread: int) -> FaultCounter | None:
    try:
        return FaultCounter(thread)
    except OSError as error:
        log.debug("which page thread %d touches is not known: %s", thread, error)
        return None
