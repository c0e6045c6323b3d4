"""What a mount's run tells of itself as files: the snapshot's digest tree, and which pages were written.

Whoever makes a snapshot of a guest that runs from the mount reads them: what was written is all that has to be saved
(`.pc.ram.written`), and the digests of the rest are the snapshot's own (`.pc.ram.digests`).
"""

from __future__ import annotations

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import VerificationError
from lazymem.pages import PageRange
from lazymem.store.pagemap import PageMap
from lazymem.store.pristine import PristinePages
from lazymem.store.source import PageDemand

_LEAF_BYTES = LEAF_PAGES * DIGEST_BYTES


class RunFiles:
    """Parts of both files. Offsets and lengths in bytes; what is asked for lies inside the file."""

    def __init__(self, pristine: PristinePages, maybe_written: PageMap | None, demand: PageDemand) -> None:
        self._pristine = pristine
        self._maybe_written = maybe_written
        self._demand = demand

    @property
    def tree_bytes(self) -> int:
        """Size of the digest tree, laid out as `pc.ram.digests`; 0 for a snapshot that has none."""
        return self._pristine.shape.file_bytes if self._pristine.maybe_upper is not None else 0

    @property
    def written_bytes(self) -> int:
        """Size of the map of written pages: a byte for each, 0 where the page is the snapshot's."""
        return self._pristine.total_pages

    async def read_written(self, offset: int, length: int) -> bytes:
        """A part of that map, as it is now."""
        pages = PageRange(offset, length)
        return self._maybe_written.states(pages) if self._maybe_written is not None else bytes(length)

    async def read_tree(self, offset: int, length: int) -> bytes:
        """A part of the digest tree, verified. What is not here is fetched, with the first page of its leaf.

        Raises:
            VerificationError, DeadlineError: it does not come.
        """
        shape, upper = self._pristine.shape, self._pristine.maybe_upper
        if upper is None:
            raise VerificationError("this snapshot has no digest tree")
        end = offset + length
        parts = []
        at = offset
        while at < min(end, shape.upper_offset):
            leaf, inside = divmod(at, _LEAF_BYTES)
            digests = await self._leaf(leaf)
            part = digests[inside : inside + end - at]
            parts.append(part)
            at += len(part)
        parts.append(upper[at - shape.upper_offset : end - shape.upper_offset] if end > at else b"")
        return b"".join(parts)

    async def _leaf(self, leaf: int) -> bytes:
        found = self._pristine.maybe_leaf(leaf)
        if found is None:
            await self._demand.demand(PageRange(leaf * LEAF_PAGES, 1))
            found = self._pristine.maybe_leaf(leaf)
        if found is None:
            raise VerificationError(f"leaf {leaf} of the digest tree did not come with a page of it")
        return found
