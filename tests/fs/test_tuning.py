"""The kernel's knobs: only this mount's own files are written."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.fs import tuning


def _sysfs(root: Path, *, minor: int) -> Path:
    for folder in (f"class/bdi/0:{minor}", f"fs/fuse/connections/{minor}"):
        (root / folder).mkdir(parents=True)
    for knob in tuning.knobs(0, minor, sysfs=root):
        knob.path.write_text("untouched")
    return root


def test_every_knob_of_this_mount_and_no_other(tmp_path: Path) -> None:
    _sysfs(tmp_path, minor=39)
    _sysfs(tmp_path, minor=40)
    assert tuning.apply(tuning.knobs(0, 39, sysfs=tmp_path)) == []
    assert (tmp_path / "class/bdi/0:39/strict_limit").read_text() == "0"
    assert (tmp_path / "class/bdi/0:39/max_ratio").read_text() == "100"
    assert {knob.path.read_text() for knob in tuning.knobs(0, 40, sysfs=tmp_path)} == {"untouched"}


def test_what_is_not_permitted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = tuning.knobs(0, 39, sysfs=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert tuning.apply(wanted) == wanted
    assert "dirty throttle stays on" in caplog.text
    assert "run as root" in caplog.text


def test_threads_started_later_are_io_flushers_too() -> None:
    """In a process of its own, since it stays so for life. Where the capability is missing, that is all it says."""
    code = """
import ctypes, threading
from lazymem.fs import tuning

PR_GET_IO_FLUSHER = 58
libc = ctypes.CDLL(None, use_errno=True)
found = []
done = tuning.become_io_flusher()
thread = threading.Thread(target=lambda: found.append(libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0)))
thread.start()
thread.join()
print(done, found[0])
"""
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert text.split() in (["True", "1"], ["False", "-1"])
