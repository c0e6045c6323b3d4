"""Rule 3 on a real mount: wrong bytes on the wire, in the cache, on the server's disk. Named, fetched again or refused;
whatever a reader is shown is the snapshot's."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lazymem.cli import verify
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE
from lazymem.store import cachefolder
from tests.cli.test_verify import flip
from tests.support import skips
from tests.support.corruptingwire import CorruptingWire
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, command, drop_kernel_cache, wait_until
from tests.support.patientreader import PatientReaders
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


def read_page(mount: Mounted, page: int) -> bytes:
    fd = os.open(mount.ram_path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)
    finally:
        os.close(fd)


def waits_then_gets(mount: Mounted, page: int, named: str, mend: Callable[[], object]) -> bytes | OSError:
    """What a reader of `page` gets who waits until the log has `named`, and longer, until it is mended."""
    reader = PatientReaders(mount, [page])
    wait_until(lambda: named in mount.log.read_text(), f"{named} is named")
    assert not reader.found, "not the wrong bytes, and no error yet"
    mend()
    return reader.finish()[page]


def full_page(snapshot: BuiltSnapshot, start: int) -> int:
    """One whose digest is no other page's."""
    pages = [snapshot.page(page) for page in range(snapshot.pages)]
    return next(page for page in range(start, snapshot.pages) if any(pages[page]) and pages.count(pages[page]) == 1)


# ---- the wire


@pytest.fixture
def wire(mounts: Stage, snapshot: BuiltSnapshot) -> Iterator[CorruptingWire]:
    made = CorruptingWire(mounts.serve(snapshot.folder).address, seed=3)
    yield made
    made.close()


@pytest.mark.parametrize("prefetch", ["none", "all"])
def test_a_wire_that_flips_bits(mounts: Stage, snapshot: BuiltSnapshot, wire: CorruptingWire, prefetch: str) -> None:
    """Frames that are none any more, pages that are others, digests that are wrong: nothing of it is shown, readers
    wait, and all of them are shown the right bytes when the wire is right."""
    wire.spoiling = True
    wire.spared = 1  # with that a mount begins; what it guesses comes over others, and could be here before we look
    mount = mounts.mount(wire.address, "--prefetch", prefetch)
    wire.spared = wire.spoilt = 0
    readers = PatientReaders(mount, random.Random(1).sample(range(snapshot.pages), 12))
    wait_until(lambda: wire.spoilt > 12, "bits were flipped")
    wire.spoiling = False
    assert readers.finish() == {page: snapshot.page(page) for page in readers.found}
    assert len(readers.found) == 12
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == snapshot.ram


# ---- the cache


@pytest.mark.parametrize("name", [cachefolder.PAGES_NAME, cachefolder.MAP_NAME, cachefolder.DIGESTS_NAME])
def test_somebody_writes_into_the_cache_of_a_mount(mounts: Stage, snapshot: BuiltSnapshot, name: str) -> None:
    """Again and again while it is read; and what is found wrong is named by the status."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address)
    wait_until(lambda: bool(mount.status()["pages_held"] == snapshot.pages), "all fetched")
    path = mounts.cache / snapshot.identity.hex() / name
    choose = random.Random(name)
    for _ in range(3):
        with open(path, "r+b") as file:
            for _ in range(40):
                os.pwrite(file.fileno(), choose.randbytes(100), choose.randrange(path.stat().st_size - 100))
        drop_kernel_cache(mount.ram_path)
        assert mount.ram_path.read_bytes() == snapshot.ram
    if name == cachefolder.PAGES_NAME:
        assert mount.status()["store"]["dropped_pages"] > 0
    mount.unmount()
    with open(path, "r+b") as file:
        file.write(choose.randbytes(path.stat().st_size))
    assert mounts.mount(server.address).ram_path.read_bytes() == snapshot.ram


@skips.needs_resend
def test_a_cache_map_that_is_cut_short_below_a_mount_costs_a_daemon(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """It looks at the map through a mapping, and beyond the end of a file that is SIGBUS. The next daemon begins the
    cache again; the guest waits."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    assert read_page(mount, 700) == snapshot.page(700)
    before = mount.pid
    os.truncate(mounts.cache / snapshot.identity.hex() / cachefolder.MAP_NAME, 0)
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == snapshot.ram
    after = mount.status()
    assert after["pid"] != before
    assert after["survival"]["restarts"] == 1
    assert list(mounts.cache.glob("*.set-aside-*"))


# ---- the server's disk


def test_a_page_that_changes_on_the_servers_disk_is_refused_and_named(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    page = full_page(snapshot, 100)

    def flip_one() -> None:
        flip(snapshot.folder / "pc.ram", page * PAGE_SIZE + 77)

    flip_one()
    assert waits_then_gets(mount, page, f"page {page} ", flip_one) == snapshot.page(page)
    for other in (page - 1, page + 1):
        assert read_page(mount, other) == snapshot.page(other)


def test_digests_that_change_on_the_servers_disk_are_refused(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """With a page to match."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    page = full_page(snapshot, 3 * 256)

    def flip_both() -> None:
        flip(snapshot.folder / "pc.ram.digests", page * 16)
        flip(snapshot.folder / "pc.ram", page * PAGE_SIZE)

    flip_both()
    assert waits_then_gets(mount, page, "leaf 3", flip_both) == snapshot.page(page)


def test_a_snapshot_whose_tree_was_changed_is_not_served(snapshot: BuiltSnapshot) -> None:
    """The upper level, which the manifest's root is over, before the server starts."""
    flip(snapshot.folder / "pc.ram.digests", snapshot.pages * 16 + 3)
    serve = command("lazymem_server.app", snapshot.folder, "--listen", "127.0.0.1:0")
    found = subprocess.run(serve, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)
    assert found.returncode == 5
    assert "is not the digest tree that manifest.json names" in found.stderr


def test_an_unhashed_snapshot_that_changes_is_refused(mounts: Stage, tmp_path: Path) -> None:
    """What a page was when it was first read, it stays."""
    snapshot = make_snapshot(tmp_path / "plain", pages=1024, seed=8, hashed=False)
    page = full_page(snapshot, 200)
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    assert read_page(mount, page) == snapshot.page(page)
    mount.wait_kept()
    flip(mounts.cache / mount.status()["identity"] / cachefolder.PAGES_NAME, page * PAGE_SIZE)
    flip(snapshot.folder / "pc.ram", page * PAGE_SIZE)
    drop_kernel_cache(mount.ram_path)
    mended = partial(flip, snapshot.folder / "pc.ram", page * PAGE_SIZE)
    assert waits_then_gets(mount, page, f"page {page} ", mended) == snapshot.page(page), (
        "not the changed one, of either"
    )


# ---- lazymem verify beside a mount


def test_verify_of_a_mount_touches_nothing(
    mounts: Stage, snapshot: BuiltSnapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    page = full_page(snapshot, 50)
    read_page(mount, page)
    mount.wait_kept()
    reads, held = mount.requests(), mount.status()["pages_held"]
    assert verify.main([str(mount.path)]) == 0
    assert f"{held} of {snapshot.pages} pages are here" in capsys.readouterr().out
    flip(mounts.cache / snapshot.identity.hex() / cachefolder.PAGES_NAME, page * PAGE_SIZE)
    assert verify.main([str(mount.path)]) == VerificationError.exit_code
    assert f"1 wrong pages, which a mount fetches again: {page}" in capsys.readouterr().out
    assert mount.requests() == reads
    assert mount.status()["pages_held"] == held
