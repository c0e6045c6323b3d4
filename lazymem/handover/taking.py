"""A guest taken by hand at its destination: asked for by the user, and refused while anybody answers at its source's.

As `reclaiming` at the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import trio

from lazymem.handover import requests
from lazymem.handover.polling import until
from lazymem.handover.source_link import SourceLink
from lazymem.handover.states import DECIDED, Destination

_ANSWER_SECONDS = 5.0
"""For a source that lives to answer a new lazymem receive."""


class Takeable(Protocol):
    """A destination, as far as it matters here."""

    @property
    def state(self) -> Destination: ...

    @property
    def link(self) -> SourceLink: ...

    async def let_be_taken(self) -> None:
        """Have it done, and return when it is, or is not to be done any more."""
        ...


class Taking:
    """The requests that come for one destination, through the folder of its journal."""

    def __init__(self, destination: Takeable, folder: Path) -> None:
        self._destination = destination
        self.asked = requests.Asked(folder, "take", self.take)

    async def take_when_alone(self) -> tuple[bool, str]:
        """As `take`, in a process that has just been started: the source gets its time to answer first."""
        found = self._destination
        with trio.move_on_after(_ANSWER_SECONDS):
            await until(lambda: found.link.connected or found.state not in (Destination.ASKED, Destination.LOADED))
        return await self.take()

    async def take(self) -> tuple[bool, str]:
        """Let the guest run here by hand; whether, and a word."""
        found, link = self._destination, self._destination.link
        # What was heard of the source may be older than what the user knows.
        tried = link.tries_begun + 1
        with trio.move_on_after(_ANSWER_SECONDS):
            await until(lambda: link.connected or link.tries_ended >= tried)
        if link.connected:
            return False, "the source answers, and decides by itself"
        if link.objection and found.state is Destination.LOADED:
            return False, (
                f"at {link.endpoint} somebody answers ({link.objection}), so the guest may run there: it is taken only "
                "while nobody does"
            )
        if found.state is not Destination.LOADED:
            return False, f"the guest cannot be taken: it is {found.state.value!r} here"
        await found.let_be_taken()
        warning = "; its source knew nothing of this hand-over: see that it does not run there, too"
        return found.state in DECIDED, f"the guest is {found.state.value!r} here{warning if link.let_go else ''}"
