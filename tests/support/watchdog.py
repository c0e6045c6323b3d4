"""Ends a test that nothing else can end: one whose process stands in the kernel, on a page or a write of a mount.

pytest-timeout works by a signal, which such a process does not take, and a run that hangs says nothing of why. So a
process beside each pytest is told of each test's start and end. Of one that lasts too long it writes down where each
thread involved stands, and aborts the FUSE connections of its mounts: then the test fails, or its process dies of it,
which fails it too. If that does not help, it kills the process.

Run as a program, with a pid and perhaps other seconds for `GRACE_SECONDS`, it is that process: a line for each test,
its limit in seconds, the tests' folder and its name; an empty line is a test's end, and the end of the input its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lazymem.fs import mountinfo

GRACE_SECONDS = 45
"""After the test's own time-out, and again after the abort."""

CONNECTIONS = Path("/sys/fs/fuse/connections")


class Watchdog:
    """Beside this process, from now to its end or `close`."""

    def __init__(self) -> None:
        self.folder = Path("/nonexistent")
        """The tests' own: what is mounted below it is theirs."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,  # a ctrl-C is the tests'
        )

    @contextlib.contextmanager
    def over(self, test: str, limit_seconds: float) -> Iterator[None]:
        self._say(f"{limit_seconds:g} {self.folder} {test}")
        try:
            yield
        finally:
            self._say("")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def threads(pids: list[int]) -> Iterator[str]:
    """Where each thread of these processes stands, a paragraph each."""
    for pid in pids:
        for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
            with contextlib.suppress(OSError):
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                stack = (task / "stack").read_text() if os.geteuid() == 0 else (task / "wchan").read_text()
                yield f"{pid}/{task.name} {state} {command[:160]}\n{stack}"


def mentioning(folder: str) -> list[int]:
    """Processes with that folder on their command lines: daemons, servers, guests of a test."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and folder.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def abort_mounts(folder: str) -> list[str]:
    """Ends the connections of the FUSE mounts below `folder`; the mount points."""
    ended = []
    for mount in mountinfo.current():
        if mount.is_ours and mount.path.startswith(f"{folder}/"):
            with contextlib.suppress(OSError):
                (CONNECTIONS / str(mount.minor) / "abort").write_text("1")
                ended.append(mount.path)
    return ended


def _watch(pid: int, grace_seconds: float) -> None:
    lines = b""
    current = ""
    limit: float | None = None
    folder = ""
    was_aborted = False
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while True:
        if not poll.poll(None if limit is None else limit * 1000):
            print(f"\nwatchdog: {current} does not end", file=sys.stderr)
            if was_aborted:
                os.kill(pid, signal.SIGKILL)
                return
            for thread in threads([pid, *mentioning(folder)]):
                print(thread, file=sys.stderr)
            print(f"watchdog: aborted: {abort_mounts(folder)}", file=sys.stderr, flush=True)
            was_aborted, limit = True, grace_seconds
            continue
        got = os.read(0, 65536)
        if not got:
            return
        *told, lines = (lines + got).split(b"\n")
        for line in told:
            was_aborted, limit = False, None
            if line:
                seconds, folder, current = line.decode().split(" ", 2)
                limit = float(seconds)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]) if sys.argv[2:] else GRACE_SECONDS)
