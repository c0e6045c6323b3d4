"""Child processes: ended in every case, and an interrupt never falls between their start and their being known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazymem.demo import processes
from lazymem.demo.processes import child, uninterrupted, wait_for_path
from lazymem.errors import EnvironmentRefusedError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_child_is_ended_with_its_context(tmp_path: Path) -> None:
    with child(SLEEP, tmp_path / "log") as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_SECONDS", 0.01)
    deaf = "import signal, time, pathlib, sys; signal.signal(15, signal.SIG_IGN); pathlib.Path(sys.argv[1]).touch()"
    command = [sys.executable, "-c", f"{deaf}; time.sleep(600)", str(tmp_path / "ready")]
    with child(command, tmp_path / "log") as process:
        wait_for_path(tmp_path / "ready", process, tmp_path / "log")
    assert process.returncode == -signal.SIGKILL


def test_interrupts_wait(tmp_path: Path) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where it is raised is the point
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("inside")
        reached.append("behind")
    assert reached == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_during_the_start_does_not_lose_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **more: object) -> None:
            super().__init__(*arguments, **more)  # type: ignore[call-overload]
            made.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt), child(SLEEP, tmp_path / "log"):
        pytest.fail("the interrupt was lost")
    assert made[0].returncode == -signal.SIGTERM


def test_waiting_for_one_that_ended_tells_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with child(command, tmp_path / "log") as process, pytest.raises(EnvironmentRefusedError, match="no such thing"):
        wait_for_path(tmp_path / "never", process, tmp_path / "log")
