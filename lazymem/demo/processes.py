"""Child processes of the demo and the system tests: started, watched, and ended by their own id in every case."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazymem.errors import EnvironmentRefusedError, MonitorError
from lazymem.vm.qmpclient import QmpClient

_END_SECONDS = 5.0


@contextmanager
def child(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running process whose output goes to the file `log`; ended on the way out, by force when it must be."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("ab") as output, uninterrupted():
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        yield process
    finally:
        if process is not None:
            end(process)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until its end: what is started within is known to whoever has to end it.

    Only in the main thread, where Python runs its signal handlers; in others nothing has to be held back.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda caught, _frame: held.append(caught))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, some seconds, SIGKILL; no matter whether it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_for_path(path: Path, process: subprocess.Popen[bytes], log: Path, timeout_seconds: float = 30) -> None:
    """Waits until the process has made `path` (a socket, a file).

    Raises:
        EnvironmentRefusedError: the process ended, or the time is up; with the last lines of its log.
    """
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if process.poll() is not None:
            raise EnvironmentRefusedError(f"{process.args!r} ended with {process.returncode}: {tail(log)}")
        if time.monotonic() > deadline:
            raise EnvironmentRefusedError(f"{process.args!r} did not make {path} in time: {tail(log)}")
        time.sleep(0.002)


def open_monitor(path: Path, process: subprocess.Popen[bytes], log: Path, timeout_seconds: float = 30) -> QmpClient:
    """The emulator's monitor, as soon as it listens.

    Raises:
        LazymemError: the emulator ended, or the time is up.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        wait_for_path(path, process, log, max(0.0, deadline - time.monotonic()))
        try:
            return QmpClient(path)
        except MonitorError as error:
            # Between bind(2) and listen(2) the socket has its name and refuses.
            if not isinstance(error.__cause__, ConnectionRefusedError) or time.monotonic() > deadline:
                raise


def tail(log: Path, characters: int = 2000) -> str:
    """The end of a log, for an error's text."""
    return log.read_text(errors="replace")[-characters:].strip() or "(it said nothing)"
