"""`lazymem receive` before the guest stands: its pages come ahead of it (`lazymem send --warm`), as candidates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from lazymem.errors import LazymemError, StoreError
from lazymem.handover.arrival import Arriving
from lazymem.handover.messages import Offer
from lazymem.handover.source_link import SourceLink
from lazymem.handover.warmed import Warmed, take
from lazymem.settings import default_cache_dir
from lazymem.store.candidatewriter import PREFIX, CandidateWriter, remove_candidates

_TELL_SECONDS = 5.0


class Ahead:
    """Of one hand-over. Where the source offers nothing of the kind, each step does nothing."""

    def __init__(self, offer: Offer, maybe_cache: Path | None, say: Callable[[str], None]) -> None:
        self._offer = offer
        self._cache = maybe_cache or default_cache_dir()
        self._say = say
        self.maybe_writer: CandidateWriter | None = None

    @property
    def folder(self) -> str:
        """For the journal: what a killed process may leave. Empty: nothing."""
        return str(self._cache / f"{PREFIX}{self._offer.handover}") if self._offer.warm_seconds else ""

    def make(self) -> None:
        """Blocking. A disk that refuses is none of the hand-over's business."""
        if self._offer.warm_seconds:
            try:
                self.maybe_writer = CandidateWriter(self._cache, self._offer.handover, self._offer.ram_bytes)
            except StoreError as error:
                self._say(f"no pages come ahead of the guest: {error}")

    async def take(self, link: SourceLink, arriving: Arriving) -> None:
        """What the source has, for as long as it says. `arriving` gets the figures."""
        writer = self.maybe_writer
        if writer is None:
            return
        warmed = Warmed()
        self._say(
            f"the guest runs on there, for {self._offer.warm_seconds:g} s at most, while its pages come ahead of it"
        )
        try:
            stream = await link.open_warm()
        except LazymemError as error:
            self._say(f"no pages come ahead of the guest: {error}")
            return
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, warmed)
            nursery.start_soon(self._end_with_source, link, warmed, nursery.cancel_scope)
            await take(stream, writer.write, self._offer.warm_seconds, warmed)
            nursery.cancel_scope.cancel()
        arriving.warmed_bytes, arriving.warmed_seconds = warmed.received_bytes, warmed.seconds
        self._say(f"{_figures(warmed)}{': ' if warmed.complaint else ''}{warmed.complaint}")

    async def _end_with_source(self, link: SourceLink, warmed: Warmed, scope: trio.CancelScope) -> None:
        """A link that breaks says nothing over a connection that only brings, and the time may be an hour."""
        await link.wait_lost()
        warmed.complaint = "the source is gone, or silent"
        scope.cancel()

    async def _tell(self, warmed: Warmed) -> None:
        while True:
            await trio.sleep(_TELL_SECONDS)
            self._say(_figures(warmed))

    def close(self) -> None:
        """What came is the mount's, and there is no trace of it."""
        if self.maybe_writer is not None:
            self.maybe_writer.close()


def clear_away(before: Arriving) -> None:
    """What an earlier process left."""
    if before.candidates:
        remove_candidates(Path(before.candidates))


def _figures(warmed: Warmed) -> str:
    received = warmed.received_bytes / (1 << 20)
    return f"{received:.1f} MiB came ahead of the guest in {warmed.seconds:.1f} s, {warmed.pages} pages"
