"""A fork server's child: waits for a command, and becomes its daemon.

What it takes over of the command: its line, standard streams, working folder, environment and umask. What it keeps of
the fork server: limits, priorities, control group. What must be the same, or it refuses: who they are, what they see
(namespaces, root folder), and that the command may do all that it may itself; so nobody gains anything by asking.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from lazymem.cli import forkrequest, mount
from lazymem.cli.background import BUG_EXIT_CODE, run_here
from lazymem.cli.forkrequest import EXIT, GO, HERE, REFUSED, TAKEN, Request
from lazymem.fs.syscalls import system_call

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

SO_PEERPIDFD = 77
"""From Linux 6.5 on."""

HAS_WORK, IS_STALE = b"w", b"s"
"""What the fork server hears by its pipe; of a child that ends before either, nothing."""

NAMESPACES = ("mnt", "net", "user", "pid", "ipc", "uts", "cgroup")

NAME = "lazymem-mount"
"""For ps(1) and killall(1), as if it had been started as such."""


class RefusedError(Exception):
    """It is not done here, and why."""


def wait_and_be_it(listener: socket.socket, pipe: int, loaded: tuple[str, ...], server: int) -> NoReturn:
    """`pipe`: tells the fork server, whose process id is `server`, what became of us. `loaded`: what it runs, as
    `forkrequest.installed`."""
    code = BUG_EXIT_CODE
    try:
        signal.set_wakeup_fd(-1)  # what is said to us is not said to the fork server
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.setsid()  # its terminal's ctrl-C is not meant for our command, nor may that stop us for what we print
        system_call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:  # it had ended before we could ask to hear of it
            os._exit(0)
        connection = _accepted(listener)
        system_call("prctl", _PR_SET_PDEATHSIG, 0, 0, 0, 0)
        stale = _is_stale(loaded)
        with contextlib.suppress(BrokenPipeError):  # it has just been ended, which is nothing to us any more
            os.write(pipe, IS_STALE if stale else HAS_WORK)
        listener.close()
        os.close(pipe)
        code = _serve(connection, loaded, stale=stale)
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # the fork server goes on; the command hears of our end
        with contextlib.suppress(Exception):
            log.exception("a fork for a mount ends: a bug in lazymem")
    finally:
        os._exit(code)


def _accepted(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.settimeout(forkrequest.WAIT_SECONDS)
    return connection


def _is_stale(loaded: tuple[str, ...]) -> bool:
    try:
        return forkrequest.installed() != loaded
    except OSError:  # they are gone, for others or for good
        return True


def _serve(connection: socket.socket, loaded: tuple[str, ...], *, stale: bool) -> int:
    try:
        connection.send(HERE)
        request, descriptors = _request(connection)
        if stale or request.installed != loaded:
            raise RefusedError("it has loaded other files than those that are installed")
        check_rights(connection)
        if forkrequest.read_at_start(request.environment) != forkrequest.read_at_start(os.environ):
            raise RefusedError("its Python was started with other PYTHON or LD variables")
        _take_over(request, descriptors)
        found = _parsed(request.arguments)
        if isinstance(found, int):
            connection.send(EXIT + b"%d" % found)
            return 0
        if found.foreground:
            raise RefusedError("a mount that stays in front is a process of its own")
        connection.send(TAKEN + b"%d" % os.getpid())
        if not may_go(connection):
            return 0
    except RefusedError as refusal:
        with contextlib.suppress(OSError):  # it may be gone, as who only looked whether anybody listens
            connection.send(REFUSED + str(refusal).encode())
        return 0
    except OSError as error:  # the command is gone, or says nothing
        log.debug("a command was left alone: %s", error)
        return 0
    connection.settimeout(None)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(NAME)
    descriptor = connection.detach()
    code = mount.mount(found, background=lambda program, daemon: run_here(daemon, descriptor))
    _flush()
    with contextlib.suppress(OSError):
        os.write(descriptor, EXIT + b"%d" % code)
    return 0


def may_go(connection: socket.socket) -> bool:
    """Whether the command said so. If not it never will: it finds that nobody listens, and goes on by itself."""
    try:
        return connection.recv(len(GO)) == GO
    except TimeoutError:
        connection.shutdown(socket.SHUT_RD)  # what was said until now can be read after it
        return connection.recv(len(GO)) == GO


def _request(connection: socket.socket) -> tuple[Request, list[int]]:
    data, descriptors, flags, _ = socket.recv_fds(
        connection, forkrequest.MAX_BYTES, forkrequest.DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) != forkrequest.DESCRIPTORS:
        raise RefusedError("that is no request")
    try:
        return forkrequest.decode(data), descriptors
    except ValueError as error:
        raise RefusedError(str(error)) from error


def check_rights(connection: socket.socket) -> None:
    """Of who connected, and lives until we have looked: nobody else has got its process id."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, forkrequest.CREDENTIALS_BYTES)
    process, user, group = forkrequest.peer(credentials)
    if (user, group) != (os.geteuid(), os.getegid()):
        raise RefusedError("it is another user's")
    try:
        asking = _process_of(connection, process)
        try:
            theirs, ours = Process(str(process)), Process("self")
            signal.pidfd_send_signal(asking, 0)
        finally:
            os.close(asking)
    except OSError as error:
        raise RefusedError(f"it cannot see who asks: {error.strerror}") from error
    if theirs.surroundings != ours.surroundings:
        raise RefusedError("it is in other namespaces, or has another root folder or security label")
    if not theirs.may_all_that(ours):
        raise RefusedError("it may do more than the command may")


def _process_of(connection: socket.socket, pid: int) -> int:
    """A pidfd of who connected. `pid`: its id at that time."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)  # before Linux 6.5: it connected a moment ago


class Process:
    """What decides whether one process may act for another. `pid`: a number, or `self`."""

    def __init__(self, pid: str) -> None:
        folder = f"/proc/{pid}"
        with open(f"{folder}/status") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        root = os.stat(f"{folder}/root")
        self.surroundings = (
            fields["Uid"],
            fields["Gid"],
            (root.st_dev, root.st_ino),
            os.readlink(f"{folder}/root"),  # the same folder on another mount is another root
            _maybe_label(folder),
            *(os.readlink(f"{folder}/ns/{name}") for name in NAMESPACES),
        )
        self.rights = int(fields["CapPrm"], 16)
        self.bounds = int(fields["CapBnd"], 16)  # of what it executes
        self.groups = set(fields["Groups"].split())
        self.confinement = tuple(fields.get(name) for name in ("NoNewPrivs", "Seccomp", "Seccomp_filters"))

    def may_all_that(self, other: Process) -> bool:
        """Not by user and surroundings, which are compared as they are."""
        if other.rights & ~self.rights or other.bounds & ~self.bounds:
            return False
        return other.groups <= self.groups and other.confinement == self.confinement


def _maybe_label(folder: str) -> bytes | None:
    try:
        with open(f"{folder}/attr/current", "rb") as file:
            return file.read()
    except OSError:  # no security module has one here
        return None


def _take_over(request: Request, descriptors: list[int]) -> None:
    *streams, folder = descriptors
    _flush()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.fchdir(folder)
    for descriptor in descriptors:
        os.close(descriptor)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(request.environment)
    time.tzset()


def _parsed(arguments: tuple[str, ...]) -> argparse.Namespace | int:
    """The exit code, if the line itself ends it: a mistake in it, or `--help`."""
    try:
        return mount.parse(list(arguments))
    except SystemExit as end:
        _flush()
        return end.code if isinstance(end.code, int) else 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
