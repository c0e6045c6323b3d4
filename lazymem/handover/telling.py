"""What of the device state has arrived, told to the source now and then, which follows its link by that (`pace`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from lazymem.handover.messages import Arrived, Message

EACH_BYTES = 64 * 1024
"""Told of at once: half of what is under way on a link of 1 Gb/s and 1 ms."""

_LATEST_SECONDS = 0.002
"""Less is told of after so long: a source that waits for it sends no more."""


class Telling:
    """One connection's. What comes while an earlier word is on its way is told with the next one."""

    def __init__(self, say: Callable[[Message], Awaitable[None]]) -> None:
        self._say = say
        self._arrived = self._told = 0
        self._some, self._much = trio.Event(), trio.Event()

    def arrived(self, total: int) -> None:
        """So many bytes have come."""
        self._arrived = total
        self._some.set()
        if total - self._told >= EACH_BYTES:
            self._much.set()

    async def run(self) -> None:
        """Until cancelled, which a word that is on its way comes before."""
        while True:
            await self._some.wait()
            with trio.move_on_after(_LATEST_SECONDS):
                await self._much.wait()
            self._some, self._much = trio.Event(), trio.Event()
            self._told = self._arrived
            with trio.CancelScope(shield=True):  # half a word would be the end of the connection; its time is bounded
                await self._say(Arrived(self._told))
