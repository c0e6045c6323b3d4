"""The host's crash, as a disk sees it: ext4 below a real mount is cut off in the midst of its work, and mounted again.

EXT4_IOC_SHUTDOWN without writing anything out is what the file system's own crash tests do (xfstests' `godown`).
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path

import pytest

from lazymem.nowait import lies_in_memory
from lazymem.pages import PAGE_SIZE
from tests.support.guestwriter import GuestWriter, expected_ram
from tests.support.mounts import Stage, kill_daemon, stage, wait_until
from tests.support.smalldisks import mount_again, small_disk
from tests.support.snapshots import BuiltSnapshot

pytestmark = [pytest.mark.system, pytest.mark.needs_root]

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_NOTHING_IS_WRITTEN_OUT = 2

SYNCED, REWRITTEN, LATER = range(20, 120), range(100, 120), range(600, 700)
"""Pages. The second ones are written once more after the sync, with the last ones."""

LATE = b"L" * PAGE_SIZE


def cut_off(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NOTHING_IS_WRITTEN_OUT))
    finally:
        os.close(fd)


def run_until_the_crash(mounts: Stage, server: str, snapshot: BuiltSnapshot, disk: Path) -> bytes:
    """Everything is fetched; some pages are written and synced, then more are written. Returns what was synced."""
    mount = mounts.mount(server, "--state", disk / "state", "--no-supervisor")
    wait_until(lambda: bool(mount.status()["pages_held"] == snapshot.pages), "all fetched")
    writer = GuestWriter(mount, SYNCED, seed=1)
    writer.finish()
    fd = os.open(mount.ram_path, os.O_WRONLY)
    for page in (*REWRITTEN, *LATER):
        os.pwrite(fd, LATE, page * PAGE_SIZE)
    os.close(fd)
    assert mount.status()["pages_written"] == len(SYNCED) + len(LATER)
    if not lies_in_memory(disk.stat().st_dev):
        cut_off(disk)
    kill_daemon(mount)
    return writer.data


def as_after_another_start(disk: Path) -> None:
    """The record names this start of the host, which did not really end."""
    path = disk / "state" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))


def test_after_a_crash_what_was_synced_is_there(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The cache lies on the same disk, and is believed page by page."""
    server = mounts.serve(snapshot.folder).address
    with small_disk(tmp_path / "small", 48 << 20, request.node) as disk:
        with stage(tmp_path / "small") as before:
            before.cache = disk / "cache"
            synced = run_until_the_crash(before, server, snapshot, disk)
        mount_again(disk)
        as_after_another_start(disk)
        with stage(tmp_path / "small") as after:
            after.cache = disk / "cache"
            mount = after.mount(server, "--state", disk / "state")
            assert mount.status()["pages_written"] == len(SYNCED)
            assert "the host ended while" in mount.result.stderr + mount.log.read_text()
            found = mount.ram_path.read_bytes()
    expected = bytearray(expected_ram(snapshot, (SYNCED, synced)))
    for page in REWRITTEN:
        at = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        assert found[at] in (expected[at], LATE)
        expected[at] = found[at]
    assert found == expected
