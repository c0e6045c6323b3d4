"""A daemon as its supervisor sees it: a process, a pidfd, a socket; how one is started and put away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from lazymem.cli.servicemanager import without_systemds
from lazymem.errors import LazymemError
from lazymem.fs import mountinfo, session
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE
from lazymem.fs.lock import MountLock

log = logging.getLogger("lazymem.supervisor")

Program = Sequence[str]
"""A command without the mount's arguments."""

LOOK_SECONDS = 1.0
"""A killed daemon one of whose threads waits for the daemon itself does not end, and no descriptor tells of it, but its
sign of life, where there is one."""

DYING_LOOK_SECONDS = 0.001
"""Behind the end of that sign, and each time twice as long as before."""

LOCK_SECONDS = 5.0


def _maybe_dead_mount(path: str) -> mountinfo.Mount | None:
    """A lazymem's whose connection is over. Who serves one answers; so its end is waited for where nobody serves it but
    somebody still could. (A lock does not tell: another user's, or the same one's without a session, is elsewhere.)"""
    maybe_mounted = mountinfo.maybe_mount_at(path)
    if maybe_mounted is None or not maybe_mounted.is_ours:
        return None
    try:
        os.stat(path)
    except OSError as error:
        return maybe_mounted if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) else None
    return None


def program_of(python: str) -> Program:
    """`lazymem-mount` as that Python has it."""
    return (python, "-P", "-m", "lazymem.cli.mount")


class Daemon:
    """One that serves, or is to. `control`: our end of its socket; `program`: what started it, or would again.
    `maybe_code`: what it ended with, if it is our child and has been reaped; negative: by that signal."""

    def __init__(self, pid: int, pidfd: int, control: socket.socket, program: Program) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.control = control
        self.program = program
        self.is_ready = self.is_warm = False
        self.is_adopted = False  # begun by another supervisor, whom it may have told that it is ready
        self.since = time.monotonic()
        """When it was started; later, when it was told to begin."""
        self.maybe_code: int | None = None
        self._maybe_life_sign: int | None = None
        self._dying_look_seconds = 0.0

    def take_life_sign(self, descriptor: int) -> None:
        """What ends with it (`lifesign`). Takes it over."""
        self._let_go_of_life_sign()
        self._maybe_life_sign = descriptor

    def _let_go_of_life_sign(self) -> None:
        if self._maybe_life_sign is not None:
            os.close(self._maybe_life_sign)
        self._maybe_life_sign = None

    def wait_for(self, waiting: select.poll) -> None:
        """Have `waiting` end when there is something to hear, or it has ended."""
        waiting.register(self.pidfd, select.POLLIN)
        if self.control.fileno() >= 0:
            waiting.register(self.control, select.POLLIN)
        if self._maybe_life_sign is not None:
            waiting.register(self._maybe_life_sign, 0)

    def look_seconds(self) -> float:
        """How long to wait at most before `is_dead` is asked again."""
        if self._maybe_life_sign is not None and has_hung_up(self._maybe_life_sign):
            self._let_go_of_life_sign()
            self._dying_look_seconds = DYING_LOOK_SECONDS
        if not self._dying_look_seconds:
            return LOOK_SECONDS
        seconds = self._dying_look_seconds
        self._dying_look_seconds = min(2 * seconds, LOOK_SECONDS)
        return seconds

    def is_dead(self) -> bool:
        """It runs no more code. A thread that the kernel cannot end yet may be left, and with it the process."""
        if is_readable(self.pidfd):
            return True
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:  # this host cannot say (no descriptor, no memory), and two that serve would be worse than none
            return False

    def wait_dead(self) -> None:
        """Blocking."""
        looking = select.poll()
        looking.register(self.pidfd, select.POLLIN)
        while not self.is_dead():
            looking.poll(LOOK_SECONDS * 1000)

    def wait_code(self, seconds: float) -> None:
        """Blocking, so long at most: until the kernel tells `reap` what it ended with, for which its last thread has to
        end. Its first one may before the others, and then it is dead already."""
        looking = select.poll()
        looking.register(self.pidfd, select.POLLIN)
        looking.poll(seconds * 1000)
        self.reap()

    def close(self) -> None:
        """What was open to hear of it, but for its pidfd."""
        self.control.close()
        self._let_go_of_life_sign()

    def age_seconds(self) -> float:
        return time.monotonic() - self.since

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> bool:
        """Whether nobody has to wait for it (any more). Does not block."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # not our child
            return True
        if pid:
            self.maybe_code = os.waitstatus_to_exitcode(status)
        return bool(pid)


class Starter:
    """Starts daemons with one command line (`arguments`, without the program). `in_front`: they log to our stderr."""

    def __init__(self, arguments: list[str], *, in_front: bool = False) -> None:
        self._arguments = arguments
        self._stderr = None if in_front else subprocess.DEVNULL
        self._left: list[Daemon] = []

    def start(self, program: Program) -> Daemon:
        """One that loads all it needs, says so, and waits for the word to begin.

        Raises:
            OSError: none can be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = self._start(program, theirs.fileno())
            try:
                return Daemon(process.pid, os.pidfd_open(process.pid), ours, program)
            except OSError:  # no descriptor left, for one
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
                raise
        except OSError:
            ours.close()
            raise

    def clear_dead_mount(self) -> None:
        """Take away what a daemon mounted that died before anybody else had its connection, so that nobody will ever
        serve it. That daemon's children have its lock for another moment. Blocking."""
        path = self._arguments[-1]
        maybe_dead = _maybe_dead_mount(path)
        if maybe_dead is None:
            return
        lock = MountLock(path)
        try:
            lock.acquire(LOCK_SECONDS)
            if mountinfo.maybe_mount_at(path) == maybe_dead:
                session.unmount(path, lazy=True)
                log.warning("%s: its daemon died while it mounted; the dead mount is taken away", path)
        except LazymemError as error:
            log.error("the mount on %s is left as it is: %s", path, error)
        finally:
            lock.release()

    def _start(self, program: Program, control: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*program, *self._arguments],
            pass_fds=[control],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            cwd="/",
            env={**without_systemds(os.environ), SUCCESSOR_VARIABLE: str(control)},
            start_new_session=True,
        )
        process.returncode = 0  # it is waited for here, and not by the library
        return process

    def leave(self, daemon: Daemon) -> None:
        """It has ended or will: to be reaped, if it is our child."""
        daemon.close()
        self._left.append(daemon)

    def discard(self, daemon: Daemon) -> None:
        """End it: it does not serve."""
        daemon.send_signal(signal.SIGKILL)
        os.close(daemon.pidfd)
        self.leave(daemon)

    def reap(self) -> None:
        """Does not block."""
        self._left = [daemon for daemon in self._left if not daemon.reap()]


def is_readable(descriptor: int) -> bool:
    """Whether it is now; of a pidfd: whether its process has ended."""
    looking = select.poll()
    looking.register(descriptor, select.POLLIN)
    return bool(looking.poll(0))


def has_hung_up(end: int | socket.socket) -> bool:
    """Whether nobody has the other end any more."""
    looking = select.poll()
    looking.register(end, 0)
    return any(events & select.POLLHUP for _, events in looking.poll(0))
