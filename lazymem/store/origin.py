"""Which RAM this is: what every cache and state folder is bound to. Pure."""

from __future__ import annotations

from msgspec import Struct

from lazymem.digests import ROOT_BYTES, TreeShape

IDENTITY_BYTES = 32


class RamOrigin(Struct, frozen=True):
    """The snapshot that a store holds pages of.

    `identity`: 32 bytes, equal for equal RAM only. `root`: 32 bytes, the digest tree's root from the manifest, or None
    for a snapshot that nobody hashed.
    """

    identity: bytes
    size_bytes: int
    root: bytes | None

    def __post_init__(self) -> None:
        if len(self.identity) != IDENTITY_BYTES:
            raise ValueError(f"identity of {len(self.identity)} bytes, not {IDENTITY_BYTES}")
        if self.root is not None and len(self.root) != ROOT_BYTES:
            raise ValueError(f"root of {len(self.root)} bytes, not {ROOT_BYTES}")
        TreeShape(self.size_bytes)  # refuses a size that is no RAM's

    @property
    def shape(self) -> TreeShape:
        return TreeShape(self.size_bytes)

    @property
    def pages(self) -> int:
        return self.shape.pages
