"""Full disks below a real mount: what the guest wrote is never lost, and goes on by itself once there is room."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support import skips
from tests.support.guestwriter import GuestWriter, expected_ram
from tests.support.mounts import Stage, drop_kernel_cache, wait_until
from tests.support.smalldisks import fill_up, small_disk
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = [pytest.mark.system, pytest.mark.needs_root]


DISK_BYTES = 48 << 20
RAM_PAGES = 3072


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with small_disk(tmp_path / "small", DISK_BYTES, request.node) as made:
        yield made


@pytest.fixture
def full_ram(tmp_path: Path) -> BuiltSnapshot:
    """12 MiB without a zero page, and no two alike."""
    ram = random.Random(5).randbytes(RAM_PAGES * PAGE_SIZE)
    return make_snapshot(tmp_path / "snap", ram=ram)


@pytest.fixture
def mounts(disk: Path, mounts: Stage) -> Stage:
    """Taken down before the disk is."""
    return mounts


def test_fetched_pages_make_room_for_written_ones(mounts: Stage, full_ram: BuiltSnapshot, disk: Path) -> None:
    mounts.cache = disk / "cache"
    server = mounts.serve(full_ram.folder)
    options = ("--state", disk / "state", "--reserve", "0")
    mount = mounts.mount(server.address, *options)
    wait_until(lambda: bool(mount.status()["pages_held"] == RAM_PAGES), "all fetched")
    fill_up(disk / "others")
    pages = range(1024, 3072)
    writer = GuestWriter(mount, pages, seed=1)
    writer.finish()
    store = mount.status()["store"]
    assert store["shed_pages"] >= len(pages)
    assert store["waiting_writes"] == 0
    assert "fetched pages are given up" in mount.log.read_text()
    drop_kernel_cache(mount.ram_path)
    expected = expected_ram(full_ram, (pages, writer.data))
    assert mount.ram_path.read_bytes() == expected, "what was given up came again"
    mount.unmount()
    (disk / "others").unlink()
    assert mounts.mount(server.address, *options).ram_path.read_bytes() == expected


def test_what_is_brought_ahead_goes_on_once_there_is_room(
    mounts: Stage, full_ram: BuiltSnapshot, disk: Path, tmp_path: Path
) -> None:
    """A guest that was handed over must not need its source for ever because its disk was full for a moment."""
    mounts.cache = disk / "cache"
    server = mounts.serve(full_ram.folder)
    mounts.mount(server.address, "--prefetch", "none", "--state", tmp_path / "state").unmount()  # the folders are made
    fill_up(disk / "others")
    mount = mounts.mount(server.address, "--state", tmp_path / "state")
    wait_until(lambda: mount.status()["not_kept_because"] is not None, "nothing can be kept")
    assert mount.log.read_text().count("cannot be kept") == 1
    assert mount.status()["pages_held"] < RAM_PAGES
    assert mount.ram_path.read_bytes() == expected_ram(full_ram), "its reader has all of it, at once"
    (disk / "others").unlink()
    wait_until(lambda: bool(mount.status()["pages_held"] == RAM_PAGES), "all is held")
    assert mount.status()["not_kept_because"] is None
    assert "kept again" in mount.log.read_text()


def test_with_nothing_left_a_write_waits_and_goes_on_by_itself(
    mounts: Stage, full_ram: BuiltSnapshot, disk: Path
) -> None:
    """A cache on another disk cannot make room on this one."""
    server = mounts.serve(full_ram.folder)
    mount = mounts.mount(server.address, "--state", disk / "state", "--reserve", "0")
    wait_until(lambda: bool(mount.status()["pages_held"] == RAM_PAGES), "all fetched")
    fill_up(disk / "others")
    pages = range(2048)
    writer = GuestWriter(mount, pages, seed=2)
    wait_until(lambda: bool(mount.status()["store"]["waiting_writes"]), "a write waits")
    assert writer.waits
    assert f"make room on the disk of {disk / 'state'}" in mount.log.read_text()
    assert mount.status()["store"]["shed_pages"] == 0
    with open(mount.ram_path, "rb") as file:
        file.seek(2500 * PAGE_SIZE)
        assert file.read(PAGE_SIZE) == full_ram.page(2500), "reads go on"
    (disk / "others").unlink()
    writer.finish()
    assert "any more" in mount.log.read_text()
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected_ram(full_ram, (pages, writer.data))


@skips.needs_resend
def test_a_daemon_that_is_killed_while_its_disk_is_full(mounts: Stage, full_ram: BuiltSnapshot, disk: Path) -> None:
    """The next one starts on the full disk, gets the write again, and waits on."""
    server = mounts.serve(full_ram.folder)
    mount = mounts.mount(server.address, "--state", disk / "state", "--reserve", "0", "--prefetch", "none")
    fill_up(disk / "others")
    pages = range(2048)
    writer = GuestWriter(mount, pages, seed=6)
    wait_until(lambda: bool(mount.status()["store"]["waiting_writes"]), "a write waits")
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: mount.status()["pid"] != mount.pid, "another daemon answers")
    wait_until(lambda: bool(mount.status()["store"]["waiting_writes"]), "a write waits again")
    assert writer.waits
    (disk / "others").unlink()
    writer.finish()
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected_ram(full_ram, (pages, writer.data))


def test_what_was_reserved_is_the_guests(mounts: Stage, full_ram: BuiltSnapshot, disk: Path) -> None:
    server = mounts.serve(full_ram.folder)
    mount = mounts.mount(server.address, "--state", disk / "state", "--reserve", "6M")
    assert mount.status()["store"]["reserved_bytes"] == 6 << 20
    fill_up(disk / "others")
    first = range(1400)
    writer = GuestWriter(mount, first, seed=3)
    writer.finish()
    assert mount.status()["store"]["reserved_bytes"] < 1 << 20
    assert "takes what was reserved" in mount.log.read_text()
    second = range(1400, 2000)
    more = GuestWriter(mount, second, seed=4)
    wait_until(lambda: bool(mount.status()["store"]["waiting_writes"]), "the reserve is used up")
    (disk / "others").unlink()
    more.finish()
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected_ram(full_ram, (first, writer.data), (second, more.data))


def test_a_reserve_for_all_of_the_ram_is_never_short(mounts: Stage, full_ram: BuiltSnapshot, disk: Path) -> None:
    server = mounts.serve(full_ram.folder)
    mount = mounts.mount(server.address, "--state", disk / "state", "--reserve", "all")
    fill_up(disk / "others")
    pages = range(RAM_PAGES)
    writer = GuestWriter(mount, pages, seed=5)
    writer.finish()
    assert "full" not in mount.log.read_text()
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == writer.data


@pytest.mark.parametrize("size", ["1G", "all"])
def test_a_reserve_that_cannot_be_had_is_refused_at_the_start(
    mounts: Stage, full_ram: BuiltSnapshot, disk: Path, size: str
) -> None:
    server = mounts.serve(full_ram.folder)
    fill_up(disk / "others")
    with open(disk / "others", "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - (2 << 20))
    free = os.statvfs(disk).f_bavail
    mount = mounts.mount(server.address, "--state", disk / "state", "--reserve", size, check=False)
    assert mount.result.returncode == 15
    assert "cannot reserve" in mount.result.stderr
    assert "--reserve with less" in mount.result.stderr
    assert not os.path.ismount(mount.path)
    assert os.statvfs(disk).f_bavail > free - 64, "nothing of it was kept"
    assert mounts.mount(server.address, "--state", disk / "state").ram_path.read_bytes() == full_ram.ram
