"""Builds deltas over small snapshots, as `lazymem snapshot --delta` leaves them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lazymem.digests import TreeShape
from lazymem.pages import PAGE_SIZE, runs
from lazymem.snapshot.delta import settle
from lazymem.snapshot.deltaindex import INDEX_NAME, DeltaIndex, encode
from lazymem.snapshot.manifest import (
    DELTA_NAME,
    DIGESTS_NAME,
    MANIFEST_NAME,
    RAM_BLOCK,
    VMSTATE_NAME,
    Block,
    Emulator,
    Manifest,
    Parent,
    VmState,
    vmstate_digest,
)
from lazymem.snapshot.reader import SnapshotReader, open_snapshot
from lazymem.snapshot.writer import new_ram_id


class _Tree:
    """The parent's digests, as the mount gives them."""

    def __init__(self, reader: SnapshotReader) -> None:
        self.leaf = reader.leaf
        self.upper = reader.upper(0, reader.shape.leaves)


def make_delta(
    folder: Path, parent: Path, written: Mapping[int, bytes], parents: tuple[Path, ...] = (), vmstate: bytes = b"later"
) -> DeltaIndex:
    """Write a delta into the new `folder`: over the snapshot (or delta) `parent`, with these pages by number."""
    folder.mkdir()
    with open_snapshot(parent, parents) as reader, open(folder / DELTA_NAME, "xb+") as file:
        shape = TreeShape(reader.ram_bytes)
        file.write(b"".join(written[page] for page in sorted(written)))
        file.flush()
        digests = folder / DIGESTS_NAME
        index, root = settle(file.fileno(), runs(written), _Tree(reader), shape, digests, lambda _: None)
        assert os.fstat(file.fileno()).st_size == index.pages * PAGE_SIZE
        identity = reader.identity
    (folder / VMSTATE_NAME).write_bytes(vmstate)
    manifest = Manifest(
        emulator=Emulator("test", "0"),
        blocks=(Block(RAM_BLOCK, DELTA_NAME, shape.size_bytes),),
        ram_id=new_ram_id(),
        ram_root=root,
        vmstate=VmState(VMSTATE_NAME, len(vmstate), vmstate_digest(vmstate)),
        parent=Parent(identity.hex()),
    )
    (folder / INDEX_NAME).write_bytes(encode(index, manifest.identity))
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return index
