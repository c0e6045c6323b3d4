"""Builds small snapshot folders, and says what is in them.

The bytes depend on `pages` and `seed` only. Among them are holes, zero pages that are written out, pages that differ in
one byte, and pages that repeat, so that every kind of run occurs.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from lazymem.digests import (
    DIGEST_BYTES,
    LEAF_PAGES,
    TreeShape,
    leaf_digest,
    leaf_sum,
    page_digest,
    root_digest,
    sums_digest,
)
from lazymem.pages import PAGE_SIZE, ZERO_PAGE
from lazymem.snapshot.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    RAM_BLOCK,
    RAM_NAME,
    SUMS_NAME,
    VMSTATE_NAME,
    Block,
    Emulator,
    Manifest,
    VmState,
    vmstate_digest,
)


@dataclass(frozen=True, slots=True)
class BuiltSnapshot:
    """A snapshot folder and what it holds, kept apart from the code under test.

    `digests`: 16 bytes a page, in order; `upper` and `sums`: 16 bytes a leaf. `manifest` is None for an unhashed one.
    """

    folder: Path
    ram: bytes
    digests: bytes
    upper: bytes
    manifest: Manifest | None
    identity: bytes
    vmstate: bytes
    sums: bytes

    @property
    def pages(self) -> int:
        return len(self.ram) // PAGE_SIZE

    @property
    def root(self) -> bytes | None:
        return bytes.fromhex(self.manifest.ram_root) if self.manifest else None

    def page(self, number: int) -> bytes:
        return self.ram[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    def leaf(self, number: int) -> bytes:
        return self.digests[number * LEAF_PAGES * DIGEST_BYTES : (number + 1) * LEAF_PAGES * DIGEST_BYTES]


LEAF_BYTES = LEAF_PAGES * PAGE_SIZE


def ram_bytes(pages: int, seed: int) -> bytes:
    """`pages` pages: about a quarter zero (in runs), a few that are zero but for one byte, the rest random."""
    choose = random.Random(f"{pages}:{seed}")
    parts: list[bytes] = []
    while len(parts) < pages:
        kind = choose.random()
        if kind < 0.15:
            parts.extend([ZERO_PAGE] * choose.randint(1, 4))
        elif kind < 0.25:
            at = choose.choice((0, PAGE_SIZE - 1, choose.randrange(PAGE_SIZE)))
            parts.append(bytes(at) + b"\x01" + bytes(PAGE_SIZE - 1 - at))
        elif kind < 0.35 and parts:
            parts.append(parts[choose.randrange(len(parts))])
        else:
            parts.append(choose.randbytes(PAGE_SIZE))
    return b"".join(parts[:pages])


def make_snapshot(
    folder: Path,
    pages: int = 64,
    seed: int = 0,
    *,
    hashed: bool = True,
    vmstate: bytes = b"device state",
    ram: bytes | None = None,
) -> BuiltSnapshot:
    """Write a snapshot into `folder` (made if missing): sparse pc.ram, vmstate, and when `hashed` digests and manifest.

    An empty `vmstate` leaves the file out. `ram`: what to hold, instead of `pages` pages from `seed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ram = ram_bytes(pages, seed) if ram is None else ram
    _write_sparse(folder / RAM_NAME, ram)
    if vmstate:
        (folder / VMSTATE_NAME).write_bytes(vmstate)
    digests = b"".join(page_digest(ram[at : at + PAGE_SIZE]) for at in range(0, len(ram), PAGE_SIZE))
    leaf_bytes = LEAF_PAGES * DIGEST_BYTES
    upper = b"".join(leaf_digest(digests[at : at + leaf_bytes]) for at in range(0, len(digests), leaf_bytes))
    sums = b"".join(_leaf_sum(ram[at : at + LEAF_BYTES]) for at in range(0, len(ram), LEAF_BYTES))
    manifest = _manifest(len(ram), upper, sums, seed, vmstate) if hashed else None
    if manifest:
        (folder / SUMS_NAME).write_bytes(sums)
        (folder / DIGESTS_NAME).write_bytes(digests + upper)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
        assert TreeShape(len(ram)).file_bytes == len(digests + upper)
    identity = manifest.identity if manifest else random.Random(f"identity:{pages}:{seed}").randbytes(32)
    return BuiltSnapshot(folder, ram, digests, upper, manifest, identity, vmstate, sums)


def _leaf_sum(data: bytes) -> bytes:
    pages = (data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE))
    return leaf_sum(page for page in pages if page != ZERO_PAGE)


def _manifest(size: int, upper: bytes, sums: bytes, seed: int, vmstate: bytes) -> Manifest:
    return Manifest(
        emulator=Emulator("test", "0"),
        blocks=(Block(RAM_BLOCK, RAM_NAME, size),),
        ram_id=random.Random(f"id:{seed}").randbytes(16).hex(),
        ram_root=root_digest(size, upper).hex(),
        ram_sums=sums_digest(sums).hex(),
        vmstate=VmState(VMSTATE_NAME, len(vmstate), vmstate_digest(vmstate)) if vmstate else None,
    )


def _write_sparse(path: Path, ram: bytes) -> None:
    """Every second zero page becomes a hole, the others are written out."""
    zeros = 0
    with open(path, "wb") as file:
        for at in range(0, len(ram), PAGE_SIZE):
            page = ram[at : at + PAGE_SIZE]
            if page == ZERO_PAGE:
                zeros += 1
                if zeros % 2:
                    file.seek(PAGE_SIZE, os.SEEK_CUR)
                    continue
            file.write(page)
        file.truncate(len(ram))
