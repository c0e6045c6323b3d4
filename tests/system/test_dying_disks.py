"""A disk below a real mount that gives EIO for a while: nothing the guest wrote is lost, and it goes on by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support import skips
from tests.support.failingdisk import FailingDisk
from tests.support.guestwriter import GuestWriter, expected_ram
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, drop_kernel_cache, wait_until
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
    wait_until(lambda: "cannot be kept" in mount.log.read_text(), "it is said")  # which the reader did not wait for
    pages = range(50, 300)
    writer = GuestWriter(mount, pages, seed=2)
    writer.finish()
    disk.dying = False
    drop_kernel_cache(mount.ram_path)
    assert mount.ram_path.read_bytes() == expected_ram(snapshot, (pages, writer.data))


GUEST = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
mapped[:4] = b"kept"
mapped.flush(0, mmap.PAGESIZE)
print("written", flush=True)
sys.stdin.readline()
sys.stdout.buffer.write(mapped[500 * mmap.PAGESIZE:501 * mmap.PAGESIZE])
"""
MISSING = 500


@contextlib.contextmanager
def a_guest(mount: Mounted) -> Iterator[subprocess.Popen[bytes]]:
    """It has written to page 0, and touches page `MISSING` at a word. In a process of its own: it may get SIGBUS."""
    guest = subprocess.Popen(
        [sys.executable, "-c", GUEST, str(mount.ram_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert guest.stdout is not None
        assert guest.stdout.readline() == b"written\n"
        yield guest
    finally:
        guest.kill()
        mount.clean_up()  # first, or it could not end
        guest.communicate()


def kill_and_see_it_tried(mount: Mounted, guest: subprocess.Popen[bytes], complaint: str) -> None:
    """The guest touches a page that is not here once the daemon is dead. Next daemons die of `complaint`."""
    os.kill(mount.pid, signal.SIGKILL)
    assert guest.stdin is not None
    guest.stdin.write(b"\n")
    guest.stdin.flush()
    wait_until(lambda: mount.log.read_text().count("ended before it was ready") >= 2, "next daemons are tried")
    assert complaint in mount.log.read_text()
    assert guest.poll() is None


def finish(guest: subprocess.Popen[bytes], expected: bytes) -> None:
    assert guest.communicate(timeout=WAIT_SECONDS)[0] == expected
    assert guest.returncode == 0


@skips.needs_resend
def test_a_daemon_killed_over_a_dying_disk_is_waited_for(
    mounts: Stage, snapshot: BuiltSnapshot, disk: FailingDisk
) -> None:
    """No next daemon can open the folder; once the disk is mended one can, and the guest never knew."""
    state = disk.path / "state"
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--state", state, "--prefetch", "none")
    with a_guest(mount) as guest:
        disk.dying = True
        kill_and_see_it_tried(mount, guest, f"the disk does not give {state / 'state.json'} back")
        disk.dying = False
        finish(guest, snapshot.page(MISSING))
        assert mount.ram_path.read_bytes() == b"kept" + snapshot.ram[4:]


@skips.needs_resend
def test_a_cut_map_of_written_pages_is_waited_out(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """No daemon goes on without the only word on what the guest wrote; with it back, the next one does."""
    written = tmp_path / "state" / "written"
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--state", written.parent, "--prefetch", "none")
    with a_guest(mount) as guest:
        whole = written.read_bytes()
        os.truncate(written, 10)
        kill_and_see_it_tried(mount, guest, str(written))
        with written.open("r+b") as file:
            file.write(whole)
        finish(guest, snapshot.page(MISSING))
        assert mount.ram_path.read_bytes() == b"kept" + snapshot.ram[4:]
