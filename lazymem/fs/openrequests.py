"""READs and WRITEs of the RAM that are not answered yet, and their ends where whoever waits is killed meanwhile.

The kernel says that a thread was interrupted, and never again that it is now being killed; so those are looked at until
they are answered. All state belongs to trio's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import trio

from lazymem.fs import fuseabi, readers

SEEN_AGAIN_SECONDS = 1.0
"""A reader may be killed after it was merely interrupted, and the kernel does not tell of that: look this often."""


class OpenWrite:
    """A WRITE that is not answered. `thread`: who waits for it and may be let go of; 0: nobody, its bytes are in no
    other place than this request and the kernel's memory (write-back). `scope`: to take it back by."""

    __slots__ = ("is_storing", "offset", "scope", "size", "thread")

    def __init__(self, offset: int, size: int, thread: int) -> None:
        self.offset = offset
        self.size = size
        self.thread = thread
        self.scope = trio.CancelScope()
        self.is_storing = False

    def begin_storing(self) -> None:
        """From here on it cannot be taken back."""
        self.is_storing = True


class OpenRequests:
    """`reads`: unique number to the thread that waits. `writes`: unique number to the write.

    `is_unseen`: as `channelends.RamFile.is_unseen`. `send`: gives the kernel an answer. `on_let_go`: told when a
    killed reader was let go of.
    """

    def __init__(
        self,
        is_unseen: Callable[[int, int], bool],
        send: Callable[[tuple[bytes | memoryview, ...]], None],
        on_let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self.reads: dict[int, int] = {}
        self.writes: dict[int, OpenWrite] = {}
        self._is_unseen = is_unseen
        self._send = send
        self._on_let_go = on_let_go
        self._interrupted: set[int] = set()

    def interrupt(self, unique: int, nursery: trio.Nursery | None) -> bool:
        """Whether it is one of ours. Only a request whose thread is being killed is ended by it: any other signal finds
        its thread when the page has come, as with memory that is here."""
        if unique not in self.reads and unique not in self.writes:
            return False
        if nursery is not None and not self._let_go_if_killed(unique):
            self._interrupted.add(unique)
            if len(self._interrupted) == 1:
                nursery.start_soon(self._look_again)
        return True

    def _let_go_if_killed(self, unique: int) -> bool:
        """False: it may still be killed."""
        if unique in self.writes:
            return self._take_back_if_killed(self.writes[unique])
        if unique in self.reads and not readers.is_killed(self.reads[unique]):
            return False
        if self.reads.pop(unique, None) is not None:
            self._send((fuseabi.error_answer(unique, errno.EINTR),))
            self._on_let_go()
        return True

    def _take_back_if_killed(self, write: OpenWrite) -> bool:
        """It waits for a page to fill up, say, and its server is away. Not if the kernel may have one of its pages: it
        would no longer believe its own, which somebody else may have changed through a map. (No READ of a page that is
        being written is out: the kernel has the page locked for either.)"""
        if write.thread == 0 or write.is_storing:
            return True
        if not readers.is_killed(write.thread):
            return False
        if self._is_unseen(write.offset, write.size):
            write.scope.cancel()
        return True

    async def _look_again(self) -> None:
        while self._interrupted:
            await trio.sleep(SEEN_AGAIN_SECONDS)
            self._interrupted = {unique for unique in self._interrupted if not self._let_go_if_killed(unique)}
