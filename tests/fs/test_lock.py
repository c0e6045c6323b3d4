"""One daemon a mount point."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.errors import BusyError, EnvironmentRefusedError
from lazymem.fs.lock import MountLock


def test_second_daemon_waits_then_gives_up(tmp_path: Path) -> None:
    first, second = MountLock("/mnt/ram", tmp_path), MountLock("/mnt/ram", tmp_path)
    first.acquire(0)
    with pytest.raises(BusyError, match=r"/mnt/ram is still storing"):
        second.acquire(0.05)
    first.release()
    second.acquire(0)
    second.release()


def test_other_mount_points_are_free(tmp_path: Path) -> None:
    first, other = MountLock("/mnt/a", tmp_path), MountLock("/mnt/b", tmp_path)
    first.acquire(0)
    other.acquire(0)
    first.release()
    other.release()


def test_no_file_is_left_behind(tmp_path: Path) -> None:
    """Locks of mount points that come and go would fill /run."""
    for path in ("/mnt/a", "/mnt/b", "/mnt/a"):
        lock = MountLock(path, tmp_path)
        lock.acquire(0)
        assert len(os.listdir(tmp_path)) == 1
        lock.release()
        assert not os.listdir(tmp_path)


def test_never_two_at_once_whoever_removes_the_file(tmp_path: Path) -> None:
    """Whoever waited for a file that is removed takes the lock of the next one, or waits for that."""
    program = (
        "import pathlib, sys; from lazymem.fs.lock import MountLock\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for _ in range(150):\n"
        "    lock = MountLock('/mnt/ram', folder / 'locks'); lock.acquire(60)\n"
        "    (folder / 'alone').mkdir(); (folder / 'alone').rmdir()\n"
        "    lock.release()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]


def test_a_dead_daemon_holds_nothing(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from lazymem.fs.lock import MountLock
MountLock("/mnt/ram", pathlib.Path({str(tmp_path)!r})).acquire(0)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    lock = MountLock("/mnt/ram", tmp_path)
    lock.acquire(0)
    lock.release()


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        folder = Path("/usr")  # root's
    with pytest.raises(EnvironmentRefusedError, match=r"not this user's own"):
        MountLock("/mnt/ram", folder).acquire(0)


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path) -> None:
    """XDG_RUNTIME_DIR of another user, or none that exists: not a trace, and not at the first fault (rule 10)."""
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentRefusedError, match="Not a directory"):
        MountLock("/mnt/ram", tmp_path / "file" / "lazymem").acquire(0)
