"""Whether a thread is being killed: by real ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from lazymem.fs import readers


def test_a_living_thread_is_not_killed() -> None:
    assert not readers.is_killed(os.getpid())


def test_one_that_nobody_can_see_is_not_killed() -> None:
    assert not readers.is_killed(0)


def test_one_that_is_gone_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert readers.is_killed(child.pid)


def test_another_pending_signal_is_not_a_kill() -> None:
    script = (
        "import os, signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]);"
        "os.kill(os.getpid(), signal.SIGUSR1); print(flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        pending = Path(f"/proc/{child.pid}/status").read_text()
        assert f"ShdPnd:\t{1 << (signal.SIGUSR1 - 1):016x}" in pending
        assert not readers.is_killed(child.pid)
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
