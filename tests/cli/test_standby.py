"""The process beside a command, whatever the command was started with. What it takes back is in test_snapshot.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.vmprocess import WAIT_SECONDS, wait_until

COMMAND = """
import os, sys
from pathlib import Path
from msgspec import Struct
from lazymem.cli.standby import Standby

class Change(Struct, frozen=True):
    file: str

done, then = Path(sys.argv[1]), sys.argv[2]
ours = os.getpid()
try:
    with Standby(Change, lambda change: Path(change.file).write_text("taken back"), print) as standby:
        standby.note(Change(str(done)))
        if then == "killed":
            os.kill(ours, 9)
    done.write_text("by itself")
finally:
    if os.getpid() != ours:
        done.with_name("two").touch()
"""


def run(file: Path, then: str, start: Callable[[], object]) -> int:
    """What the command ended with."""
    command = [sys.executable, "-c", COMMAND, str(file), then]
    with subprocess.Popen(command, preexec_fn=start) as process:
        try:
            return process.wait(WAIT_SECONDS)
        finally:
            process.kill()


@pytest.mark.parametrize("closed", [[2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
def test_without_standard_streams(tmp_path: Path, closed: list[int]) -> None:
    """The pipe between the two has their numbers then."""

    def close() -> None:
        for number in closed:
            os.close(number)

    done = tmp_path / "done"
    assert run(done, "ends", close) == 0
    assert done.read_text() == "by itself"
    assert not (tmp_path / "two").exists(), "the command's code goes on in one process"
    assert run(done, "killed", close) == -signal.SIGKILL
    wait_until(lambda: done.read_text() == "taken back", "it is taken back")


def test_where_nobody_waits_for_children(tmp_path: Path) -> None:
    """Whoever starts a command so has the kernel wait for them, and there is none left to wait for."""
    assert run(tmp_path / "done", "ends", lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)) == 0
    assert (tmp_path / "done").read_text() == "by itself"
