"""A mount's small files: the manifest and the vmstate, as the server sent them and as far as they can be verified."""

from __future__ import annotations

import contextlib
import logging
from time import perf_counter

import trio

from lazymem.errors import LazymemError, VerificationError
from lazymem.fetch.client import Client
from lazymem.fs.tree import MANIFEST_INODE
from lazymem.snapshot.manifest import Manifest, parse, vmstate_digest
from lazymem.wire.messages import PublishedFile, Welcome

log = logging.getLogger(__name__)

MAX_VMSTATE_BYTES = 256 << 20
"""Device state and unbacked blocks are a few MiB; it is kept in memory while the mount lives."""

AHEAD_BYTES = 1 << 20
AHEAD_SECONDS = 0.01
"""A vmstate that is no larger is fetched before it is read, over a link with round trips below this. Over a slower one
the few pages that an emulator touches at its start would stand behind it (at 20 ms, 100 Mb/s for 26 ms)."""

AHEAD_PIECE_BYTES = 32 << 10
AHEAD_PIECE_SECONDS = 0.002
"""So much at a time, which a demand may meet on the wire: 0.3 ms of 1 Gb/s. A piece that takes two round trips and so
much more comes over a slow link, whatever its round trips (10 Mb/s: 26 ms), and is the last."""


def maybe_manifest(welcome: Welcome) -> Manifest | None:
    """The manifest that the server sent, if the snapshot is hashed and it is this RAM's.

    Raises:
        SnapshotError, VerificationError: it is broken, or not about what the server says it serves.
    """
    if not welcome.hashed:
        return None
    manifest = parse(welcome.manifest)
    if manifest.identity != welcome.identity or manifest.ram.size != welcome.ram_bytes:
        raise VerificationError("the server's manifest is not about the RAM that it says it serves")
    return manifest


def vmstate_bytes(welcome: Welcome, manifest: Manifest | None) -> int:
    """0: there is none. Of a hashed snapshot only the one that its manifest names can be verified (rule 3).

    Raises:
        VerificationError: the server has another one than the manifest names.
    """
    if manifest is None or not welcome.vmstate_bytes:
        return welcome.vmstate_bytes
    if manifest.vmstate is None:
        log.warning("the server has a vmstate that the snapshot's manifest does not name: not shown")
        return 0
    if manifest.vmstate.size != welcome.vmstate_bytes:
        raise VerificationError("the server's vmstate is not the one that the manifest names: it has another size")
    return manifest.vmstate.size


class SmallFiles:
    """The mount's small files, whole: the manifest as the server sent it; the vmstate, once it was sent."""

    def __init__(self, client: Client, manifest: Manifest | None) -> None:
        self._client = client
        self._manifest = manifest
        self._vmstate: bytes | None = None
        self._begun = b""  # of it
        self._lock = trio.Lock()

    async def read(self, inode: int) -> bytes:
        """Raises VerificationError when the vmstate is not the manifest's."""
        if inode == MANIFEST_INODE:
            return self._client.welcome.manifest
        async with self._lock:
            if self._vmstate is None:
                begun, self._begun = self._begun, b""  # if something is wrong with it, it is not had again
                rest = await self._client.read_file(PublishedFile.VMSTATE, MAX_VMSTATE_BYTES, len(begun))
                self._vmstate = self._checked(begun + rest)
            return self._vmstate

    async def fetch_ahead(self, vmstate_bytes: int) -> None:
        """What whoever resumes a guest reads first, while his emulator starts; `vmstate_bytes`: its size, 0 if there is
        none. In pieces, behind which demands stand for no longer than behind guesses; a reader has the rest at once.
        What hinders that, its reader meets again."""
        if not (0 < vmstate_bytes <= AHEAD_BYTES and self._client.best_round_trip_seconds < AHEAD_SECONDS):
            return
        with contextlib.suppress(LazymemError):
            while await self._fetch_piece(vmstate_bytes):
                pass

    async def _fetch_piece(self, vmstate_bytes: int) -> bool:
        """Whether another one is to follow."""
        async with self._lock:
            if self._vmstate is not None:
                return False
            began, at = perf_counter(), len(self._begun)
            length = min(AHEAD_PIECE_BYTES, vmstate_bytes - at)
            self._begun += await self._client.read_file_piece(PublishedFile.VMSTATE, at, length)
            seconds = perf_counter() - began
            if len(self._begun) == vmstate_bytes:
                begun, self._begun = self._begun, b""
                self._vmstate = self._checked(begun)
                return False
            return seconds < 2 * self._client.best_round_trip_seconds + AHEAD_PIECE_SECONDS

    def _checked(self, data: bytes) -> bytes:
        expected = self._manifest.vmstate if self._manifest else None
        if expected is not None and (len(data) != expected.size or vmstate_digest(data) != expected.digest):
            raise VerificationError("the server's vmstate is not the one that the manifest names")
        return data
