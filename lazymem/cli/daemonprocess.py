"""A daemon as its supervisor sees it: a process, a pidfd, a socket; how one is started and put away."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time

from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE


class Daemon:
    """One that serves, or is to. `control`: our end of its socket."""

    def __init__(self, pid: int, pidfd: int, control: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.control = control
        self.process = process  # None: not our child
        self.is_ready = self.is_warm = False
        self.started_at = time.monotonic()

    def is_dead(self) -> bool:
        """It runs no more code. A thread that the kernel cannot end yet may be left, and with it the process."""
        if self.process is not None and self.process.poll() is not None:
            return True
        if is_readable(self.pidfd):
            return True
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:  # this host cannot say (no descriptor, no memory), and two that serve would be worse than none
            return False

    def close(self) -> None:
        self.control.close()
        os.close(self.pidfd)


class Starter:
    """Starts daemons with one command line (`command`, without the program), and reaps them."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._left: list[subprocess.Popen[bytes]] = []  # not reaped yet

    def start(self, python: str) -> Daemon:
        """One that loads all it needs, says so, and waits for the word to begin.

        Raises:
            OSError: none can be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [python, "-P", "-m", "lazymem.cli.mount", *self._command],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, SUCCESSOR_VARIABLE: str(theirs.fileno())},
                start_new_session=True,
            )
        try:
            return Daemon(process.pid, os.pidfd_open(process.pid), ours, process)
        except OSError:  # no descriptor left, for one
            ours.close()
            process.kill()
            self._left.append(process)
            raise

    def discard(self, daemon: Daemon) -> None:
        """End it: it does not serve."""
        if daemon.process is not None:
            with contextlib.suppress(OSError):
                daemon.process.kill()
        self.leave(daemon)
        daemon.close()

    def leave(self, daemon: Daemon) -> None:
        """It has ended or will: to be reaped, if it is our child."""
        if daemon.process is not None:
            self._left.append(daemon.process)

    def reap(self) -> None:
        """Does not block."""
        self._left = [process for process in self._left if process.poll() is None]


def is_readable(descriptor: int) -> bool:
    """Whether it is now; of a pidfd: whether its process has ended."""
    looking = select.poll()
    looking.register(descriptor, select.POLLIN)
    return bool(looking.poll(0))
