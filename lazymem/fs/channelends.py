"""What the channel stands between: the guest's RAM, the link that pages come over, and who is told of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lazymem.errors import LazymemError

Answer = Callable[[bytes | memoryview | LazymemError | None], None]

Taken = Callable[[int, int, int], bool]
"""Told of each READ's thread, offset and size; True: it is read-ahead to be refused (`readahead`)."""

Written = Callable[[int, int], None]
"""Told of each WRITE: offset and size in bytes."""


class RamFile(Protocol):
    """What the channel needs of the guest's RAM. Offsets and lengths in bytes."""

    def read_soon(self, offset: int, length: int, done: Answer) -> bytes | bool:
        """The bytes, if they are at hand; True: they were asked for, and `done` is called once, later, with them, or
        why there are none, or None where `read` must be asked; False: nothing was begun, ask `read`."""
        ...

    async def read(self, offset: int, length: int) -> bytes: ...

    async def write(self, offset: int, data: bytes, storing: Callable[[], None]) -> None:
        """`storing` is called once nothing of it can be taken back any more: up to there it may be cancelled."""
        ...

    def is_unseen(self, offset: int, length: int) -> bool:
        """Whether none of these pages was ever read through us."""
        ...


class Link(Protocol):
    """Where demanded pages come from, to be looked at while we do not give up the processor."""

    def fileno(self) -> int:
        """Readable when something came; -1: not connected."""
        ...

    def receive_nowait(self) -> bool:
        """Act on what came; whether there was something."""
        ...

    def watch(self) -> None:
        """From now until `unwatch` no other task runs, and before anything but `read_soon` and `receive_nowait` is
        done `settle` is called."""
        ...

    def unwatch(self) -> None:
        """Others run from now on."""
        ...

    def settle(self) -> None:
        """Something else is done now, though an answer is not here."""
        ...

    @property
    def best_answer_seconds(self) -> float:
        """The shortest time that an answer took."""
        ...
