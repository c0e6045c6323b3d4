"""The RAM of a guest that leaves: published under its hand-over's id, and served once the guest stands."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from lazymem.errors import IdentityError
from lazymem.handover.departure import PageServer
from lazymem.handover.loadreads import load_reads
from lazymem.snapshot.liveram import LiveRam, Served

_IDENTITY_BYTES = 32


class LeavingRam:
    """One source's. Nothing is served before `publish`."""

    def __init__(self, pages: PageServer) -> None:
        self._pages = pages
        self._ram: LiveRam | None = None
        self._path = Path()
        self.load_reads: list[int] = []

    def publish(self, path: Path, handover: str) -> None:
        """Take clients for it under that id; what they ask for waits.

        Raises:
            LazymemError: it cannot be read.
        """
        self._path = path
        self._ram = LiveRam(path, blake3(bytes.fromhex(handover)).digest(_IDENTITY_BYTES))
        self._pages.publish(handover, self._ram)

    def look_for_load_reads(self) -> None:
        """Which pages a load of the guest's state will read. Blocking, some 0.1 ms."""
        self.load_reads = load_reads(self._path)

    def freeze(self) -> list[int]:
        """The guest stands: what somebody waits for is served, once `look_again` is called. Any thread may call this.
        Returns the signature of the file as it has to stay."""
        assert self._ram is not None
        signature = self._ram.freeze()
        self._ram.serve(Served.DEMANDS)
        return signature

    def look_again(self) -> None:
        """Answer what waits and may be answered now."""
        self._pages.look_again()

    def serve(self, how_much: Served) -> None:
        if self._ram is not None:
            self._ram.serve(how_much)
            self._pages.look_again()

    def serve_again(self, path: str, signature: list[int]) -> None:
        """In a process that was started anew.

        Raises:
            IdentityError: it is not what it was when it was frozen.
        """
        assert self._ram is not None
        if not self._ram.is_as(signature):
            raise IdentityError(f"{path} was changed since its guest was given away: not served")
        self._ram.freeze()
        self.serve(Served.ALL)
