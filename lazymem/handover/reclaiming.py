"""A guest taken back by hand: asked for by the user, and refused while its destination answers."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import trio

from lazymem.handover import requests
from lazymem.handover.polling import until
from lazymem.handover.receivers import Receivers
from lazymem.handover.states import Source

_ANSWERS_SECONDS = 5.0
"""For a destination to answer before the guest may be taken back by hand."""

_REFUSED = {
    Source.OURS: "the guest is here: nothing was given away",
    Source.MOVING: "the guest is here, and on its way: end lazymem send, and it goes on",
    Source.GONE: "the destination has said that the guest runs there, so it is not taken back. The emulator here "
    "stands as it was at the hand-over: its monitor's cont goes on from there, once you know that the other is dead",
    Source.RELEASED: "the destination has all of the guest, and the emulator here was ended",
}


class Reclaimable(Protocol):
    """A source, as far as it matters here."""

    @property
    def state(self) -> Source: ...

    @property
    def receivers(self) -> Receivers: ...

    @property
    def stands(self) -> str | None:
        """Why a guest that is here does not go on."""
        ...

    async def take_back(self) -> None:
        """Have it done, and return when it is, or is not to be done any more."""
        ...


class Reclaiming:
    """The requests that come for one source, through the folder of its journal."""

    def __init__(self, source: Reclaimable, folder: Path) -> None:
        self._source = source
        self.asked = requests.Asked(folder, "reclaim", lambda: self.reclaim(0.0))

    async def reclaim(self, seconds: float) -> tuple[bool, str]:
        """Take the guest back, unless the destination answers, or comes back within so long; whether, and a word."""
        found = self._source
        with trio.move_on_after(seconds):
            await until(lambda: found.receivers.peer is not None or found.state is not Source.GIVEN)
        answers = False
        with trio.move_on_after(_ANSWERS_SECONDS):
            answers = found.state is Source.GIVEN and await found.receivers.answers()
        if found.state is not Source.GIVEN:
            return False, _REFUSED[found.state]
        if answers:
            return False, "the destination answers, and decides by itself: nothing is taken back from it"
        await found.take_back()
        if (state := Source(found.state)) is not Source.OURS:
            return False, _REFUSED[state]
        return found.stands is None, found.stands or "the guest goes on here"
