"""A test that stands in the kernel, where no signal reaches it, ends all the same, and where it stood is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import watchdog
from tests.support.mounts import WAIT_SECONDS, Stage, wait_until
from tests.support.snapshots import BuiltSnapshot
from tests.support.stopping import stop

pytestmark = pytest.mark.system

TOUCH = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    print(mapped[0])
"""


def test_who_stands_on_a_page_is_freed(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, "--prefetch", "none")
    stop(server.pid)
    stands = subprocess.Popen([sys.executable, "-c", TOUCH, mount.ram_path], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: mount.status()["demand_faults"] >= 1, "it stands on a page")
        report = _watched(stands.pid, f"0.1 {mounts.folder} that test\n")
        assert stands.wait(WAIT_SECONDS) == -signal.SIGBUS
    finally:
        stands.kill()
        stands.wait()
        os.kill(server.pid, signal.SIGCONT)
    assert "that test does not end" in report
    assert f"{stands.pid}/{stands.pid} " in report
    assert f"aborted: ['{mount.path}']" in report


def test_who_stands_elsewhere_is_killed(tmp_path: Path) -> None:
    sleeps = subprocess.Popen(["sleep", "1000"])
    report = _watched(sleeps.pid, f"0.1 {tmp_path} that test\n", "0.1")
    assert sleeps.wait(WAIT_SECONDS) == -signal.SIGKILL
    assert "aborted: []" in report


def test_a_test_that_ends_is_left_alone(tmp_path: Path) -> None:
    dog = watchdog.Watchdog()
    dog.folder = tmp_path
    for _ in range(3):
        with dog.over("a test", 60):
            pass
    dog.close()


def _watched(pid: int, test: str, *grace: str) -> str:
    """What the watchdog says of `test`, which goes on until that process ends."""
    dog = subprocess.Popen(
        [sys.executable, watchdog.__file__, str(pid), *grace],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert dog.stdin is not None
    dog.stdin.write(test)
    dog.stdin.flush()
    wait_until(lambda: not _is_running(pid), "it has ended")
    _, report = dog.communicate(timeout=WAIT_SECONDS)
    assert dog.returncode == 0
    return report


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
