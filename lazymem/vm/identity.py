"""Rule 6: a device state is bound to its RAM. What is checked beside a RAM file before a guest may use it.

Three places a RAM file can be in:

- on a lazymem mount: the mount says by an extended attribute which RAM it is and whether this run wrote to it;
- in a snapshot's own folder (a manifest beside it): its bytes must stay, so only private maps, and only while the bytes
  are the manifest's;
- alone: nothing is known, and nothing can be checked but the sizes.

Caveat: a raw QEMU asks none of this.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, TreeShape, leaf_digest, page_digest, root_digest
from lazymem.errors import IdentityError, RamFileError, SnapshotError
from lazymem.nowait import lies_in_memory
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Block,
    Manifest,
    parse,
    vmstate_digest,
)

RUN_ATTRIBUTE = "user.lazymem.run"

_NO_SUCH_ATTRIBUTE = frozenset(
    {errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}
)
"""Not a lazymem mount, or a file that opening will say more about. A mount that is dead or broken is no such case."""


class MountRun(Struct, frozen=True):
    """What a lazymem mount says of a RAM file. `identity` hex; `template`: many map it privately, none may write."""

    identity: str
    written_pages: int
    template: bool


def maybe_mount_run(ram: Path) -> MountRun | None:
    """None: not on a lazymem mount.

    Raises:
        IdentityError: the attribute is there and makes no sense: never taken for "not a mount".
    """
    try:
        raw = os.getxattr(ram, RUN_ATTRIBUTE)
    except OSError as error:
        if error.errno in _NO_SUCH_ATTRIBUTE:
            return None
        raise IdentityError(f"{ram}: cannot ask which RAM it is: {error.strerror}") from error
    try:
        told = json.loads(raw)
        return MountRun(str(told["identity"]), int(told["written_pages"]), told["template"] is True)
    except (ValueError, KeyError, TypeError) as error:
        raise IdentityError(f"{ram}: its mount's {RUN_ATTRIBUTE} cannot be read: {error}") from error


def maybe_manifest(ram: Path, block: str) -> Manifest | None:
    """The manifest beside `ram`, when it is about this very file.

    Raises:
        SnapshotError: there is one and it is broken.
    """
    try:
        with (ram.parent / MANIFEST_NAME).open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"cannot read {ram.parent / MANIFEST_NAME}: {error.strerror}") from error
    manifest = parse(text)
    return manifest if any(entry.file == ram.name and entry.name == block for entry in manifest.blocks) else None


def check_may_share(ram: Path, block: str) -> None:
    """Whether a guest may write to `ram` (share=on). Asked before the file is opened.

    Raises:
        RamFileError: it is a snapshot's own (or nobody can say, since the manifest beside it cannot be read), or a
            template.
    """
    ram = ram.resolve()
    run = maybe_mount_run(ram)
    if run is not None:
        if run.template:
            raise RamFileError(f"{ram} is a template for many guests: use share=off")
        return
    try:
        if maybe_manifest(ram, block) is None:
            return
    except SnapshotError as error:
        if isinstance(error.__cause__, OSError):
            raise RamFileError(f"{ram} may be a snapshot's own {block}, which cannot be found out: {error}") from error
        # A broken manifest protects too.
    raise RamFileError(
        f"{ram} is a snapshot's own {block}, and a guest with share=on would destroy the snapshot: "
        "use share=off, a lazymem-mount of it, or a copy of the file elsewhere"
    )


def check_unwritten(ram: Path) -> MountRun | None:
    """Whether a run has written to RAM on a lazymem mount, so that no saved state belongs to it.

    May wait for the mount.

    Raises:
        IdentityError: it has.
    """
    run = maybe_mount_run(ram)
    if run is not None:
        # What another mapper (a raw QEMU) has dirtied is in the kernel's cache only, and the mount knows nothing of it.
        _write_out(ram)
        run = maybe_mount_run(ram)
    if run is not None and run.written_pages:
        raise IdentityError(
            f"a guest has written {run.written_pages} pages of {ram} in this run, so the saved state is of other RAM: "
            "mount the snapshot anew"
        )
    return run


def check_state_belongs(ram: Path, block: str, stream: bytes, notice: Callable[[str], None]) -> None:
    """Whether the device state `stream` belongs to `ram` as it is now. May read all of `ram`: not on trio's thread.

    `notice` gets lines that a person should read on each resume.

    Raises:
        IdentityError: another snapshot's RAM, or RAM that was written since.
        SnapshotError: the manifest beside it is broken.
    """
    ram = ram.resolve()
    run = check_unwritten(ram)
    manifest = maybe_manifest(ram, block)
    if manifest is None:
        return
    if run is not None and run.identity != manifest.identity.hex():
        raise IdentityError(f"{ram} is RAM of another snapshot than the manifest beside it")
    if manifest.parent is not None:
        raise IdentityError(f"{ram} is a delta's, which is not all of the RAM: run guests from a lazymem-mount of it")
    _check_stream(manifest, stream)
    entry = next(entry for entry in manifest.blocks if entry.name == block)
    maybe_reason = _maybe_doubt(ram) if run is None else None
    if maybe_reason is not None:
        notice(f"{ram} {maybe_reason}: reading all of it against its digests")
        _verify_all(ram, manifest, entry)
    for line in manifest.resume_notices:
        notice(line)


def _write_out(ram: Path) -> None:
    try:
        if os.access(ram, os.W_OK):
            # The kernel gives the mount all that is dirty before a descriptor is closed that could write. An fsync
            # would wait for the mount's disk, too, and a guest that is handed over stands meanwhile.
            os.close(os.open(ram, os.O_WRONLY | os.O_CLOEXEC))
            return
        fd = os.open(ram, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise IdentityError(f"{ram}: cannot see whether a guest has written to it: {error.strerror}") from error


def _check_stream(manifest: Manifest, stream: bytes) -> None:
    if manifest.vmstate is None:
        raise IdentityError("the snapshot beside the RAM file has no device state, so this one is not its")
    if len(stream) != manifest.vmstate.size or vmstate_digest(stream) != manifest.vmstate.digest:
        raise IdentityError(
            "the device state is not that of the snapshot beside the RAM file "
            f"(made {manifest.created or 'at an unknown time'}): it is another one's, or was altered"
        )


def _maybe_doubt(ram: Path) -> str | None:
    """Why the RAM file may not be as it was made; it was finished before its manifest was written."""
    try:
        found = os.stat(ram)
        if found.st_mtime_ns > os.stat(ram.parent / MANIFEST_NAME).st_mtime_ns:
            return "is newer than its manifest"
        return "lies in memory, where a mapped write moves no time" if lies_in_memory(found.st_dev) else None
    except OSError as error:
        raise SnapshotError(f"cannot stat the snapshot of {ram}: {error.strerror}") from error


def _verify_all(ram: Path, manifest: Manifest, entry: Block) -> None:
    shape = TreeShape(entry.size)
    digests_path = ram.parent / DIGESTS_NAME
    try:
        digests = digests_path.read_bytes() if digests_path.stat().st_size == shape.file_bytes else b""
        leaves = digests[shape.upper_offset :]
        if not digests or root_digest(entry.size, leaves).hex() != manifest.ram_root:
            raise IdentityError(f"{digests_path} is not the digest tree of the snapshot's manifest")
        with ram.open("rb", buffering=0) as file:
            for leaf in range(shape.leaves):
                _verify_leaf(ram, file.read(shape.leaf_pages(leaf) * PAGE_SIZE), leaf, leaves)
    except OSError as error:
        raise SnapshotError(f"cannot read the snapshot of {ram}: {error.strerror}") from error


def _verify_leaf(ram: Path, data: bytes, leaf: int, leaves: bytes) -> None:
    pages = b"".join(page_digest(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE))
    if leaf_digest(pages) != leaves[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES]:
        first = leaf * LEAF_PAGES * PAGE_SIZE
        raise IdentityError(
            f"{ram} was written since the snapshot was made (in the MiB at {first:#x}): the saved state is of other RAM"
        )
