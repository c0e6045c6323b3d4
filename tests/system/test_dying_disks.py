"""A disk below a real mount that gives EIO for a while: nothing the guest wrote is lost, and it goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support.failingdisk import FailingDisk
from tests.support.guestwriter import GuestWriter, expected_ram
from tests.support.mounts import Stage, drop_kernel_cache, wait_until
from tests.support.snapshots import BuiltSnapshot

pytestmark = [pytest.mark.system, pytest.mark.needs_root]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FailingDisk]:
    with FailingDisk(tmp_path / "failing") as made:
        yield made


@pytest.fixture
def mounts(disk: FailingDisk, mounts: Stage) -> Stage:
    """Taken down before the disk is."""
    return mounts


def test_what_a_guest_writes_waits_for_a_dying_disk(mounts: Stage, snapshot: BuiltSnapshot, disk: FailingDisk) -> None:
    server = mounts.serve(snapshot.folder)
    options = ("--state", disk.path / "state")
    mount = mounts.mount(server.address, *options)
    wait_until(lambda: bool(mount.status()["pages_held"] == snapshot.pages), "all fetched")
    disk.dying = True
    pages = range(100, 400)
    writer = GuestWriter(mount, pages, seed=1)
    wait_until(lambda: bool(mount.status()["store"]["waiting_writes"]), "a write waits")
    assert writer.waits
    assert f"look after the disk of {disk.path / 'state'}" in mount.log.read_text()
    with open(mount.ram_path, "rb") as file:
        file.seek(500 * PAGE_SIZE)
        assert file.read(PAGE_SIZE) == snapshot.page(500), "what is elsewhere can be read"
    disk.dying = False
    writer.finish()
    drop_kernel_cache(mount.ram_path)
    expected = expected_ram(snapshot, (pages, writer.data))
    assert mount.ram_path.read_bytes() == expected
    mount.unmount()
    assert mounts.mount(server.address, *options).ram_path.read_bytes() == expected


def test_a_dying_disk_below_the_cache_costs_fetches_only(
    mounts: Stage, snapshot: BuiltSnapshot, disk: FailingDisk, tmp_path: Path
) -> None:
    mounts.cache = disk.path / "cache"
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, "--state", tmp_path / "state", "--prefetch", "none")
    with open(mount.ram_path, "rb") as file:
        assert file.read(100 * PAGE_SIZE) == snapshot.ram[: 100 * PAGE_SIZE]
    disk.dying = True
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == snapshot.ram
    assert "cannot be kept" in mount.log.read_text()
    pages = range(50, 300)
    writer = GuestWriter(mount, pages, seed=2)
    writer.finish()
    disk.dying = False
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected_ram(snapshot, (pages, writer.data))
