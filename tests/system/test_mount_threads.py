"""A mount whose daemon gets no thread any more: what the guest writes and syncs waits, and nothing of it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.memorygroup import control_group
from lazymem.pages import PAGE_SIZE
from tests.support import privileges
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.skips import MOUNTS, skip_without
from tests.support.snapshots import BuiltSnapshot

pytestmark = pytest.mark.system

_SYNC = """
import os, sys
os.fsync(os.open(sys.argv[1], os.O_RDWR))
"""

_WRITE = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
ram = mmap.mmap(fd, 0)
ram[4096:8192] = b"w" * 4096
assert not ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 7)
os.fsync(fd)
"""
"""fsync alone would wait for the other one's in the kernel, and ask for nothing to be written before."""


@contextmanager
def no_more_tasks(pid: int) -> Iterator[None]:
    """The limit that a unit's TasksMax= and a container's are: the process can start no thread within the block."""
    with control_group("lazymem-tasks", "pids") as group:
        if isinstance(group, str):
            if privileges.root_may_mount():
                pytest.fail(group)
            skip_without(MOUNTS, group)
        folder = group[0]
        try:
            (folder / "cgroup.procs").write_text(str(pid))
            (folder / "pids.max").write_text("1")
            yield
        finally:
            (folder / "pids.max").write_text("max")
            (folder.parent / "cgroup.procs").write_text(str(pid))


def idle_threads(pid: int) -> list[str]:
    """Those that trio keeps for the next work, for ten seconds each."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text())
        except OSError:  # it ended
            continue
    return [name for name in names if name.startswith("Trio thread")]


def started(mount: Mounted, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, str(mount.ram_path)])


@pytest.mark.needs_root
def test_a_write_and_a_sync_wait_for_a_thread(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, "--prefetch", "none", "--no-supervisor", "--state", tmp_path / "state")
    descriptor = os.open(mount.ram_path, os.O_RDWR)
    guests: list[subprocess.Popen[bytes]] = []
    try:
        os.pwrite(descriptor, b"f" * PAGE_SIZE, 0)
        os.fsync(descriptor)
        with no_more_tasks(mount.pid):
            wait_until(lambda: not idle_threads(mount.pid), "no thread to be left for what comes")
            guests.append(started(mount, _SYNC))
            wait_until(lambda: "a sync waits" in mount.log.read_text(), "it to wait for a thread")
            guests.append(started(mount, _WRITE))
            wait_until(lambda: mount.status()["store"]["waiting_writes"] > 0, "the write to wait, too")
            assert [guest.poll() for guest in guests] == [None, None]
        assert [guest.wait(60) for guest in guests] == [0, 0]
    finally:
        for guest in guests:
            guest.kill()
            guest.wait()
        os.close(descriptor)
    assert "the sync that waited for a thread goes on" in mount.log.read_text()
    mount.unmount()
    again = mounts.mount(server.address, "--prefetch", "none", "--state", tmp_path / "state", name="again")
    assert again.ram_path.read_bytes()[: 2 * PAGE_SIZE] == b"f" * PAGE_SIZE + b"w" * PAGE_SIZE
