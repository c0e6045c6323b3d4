"""How a mount's first supervisor comes to be: a fork of its daemon, before that has loaded what a supervisor has no use
for. A Python of its own takes as long to start as half a mount does, on the processors that an emulator starts on.

No thread and no event loop is there yet. A supervisor that is started later (`supervised`) is another Python.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple, NoReturn

from lazymem.cli.background import BUG_EXIT_CODE, let_go_of_inherited
from lazymem.cli.restart import Restart
from lazymem.fs import checks, descriptorstore
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE

log = logging.getLogger("lazymem.supervisor")

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The daemon's to obey: a supervisor ends with the mount."""


NAME = "lazymem-superv"
"""For ps(1) and killall(1), which would take it for the daemon; the kernel has room for 15 bytes."""


class Forked(NamedTuple):
    """Our end of its socket, and its process id."""

    to: socket.socket
    pid: int


def is_wanted(*, in_front: bool, wanted: bool) -> bool:
    """Whether this daemon starts a supervisor: not one that a supervisor has started (`SUCCESSOR_VARIABLE`), nor where
    somebody else looks after it, or the user said no, or this kernel has no use for one."""
    if SUCCESSOR_VARIABLE in os.environ or in_front or not wanted:
        return False
    return checks.maybe_no_resend() is None


def fork_supervisor(again: Restart) -> Forked | None:
    """Before there are threads. None: this host has no process, or no descriptor, left for it."""
    with contextlib.suppress(OSError):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as closing:  # and with that a child that got no word ends
            closing.callback(ours.close)
            with theirs:
                pid = os.fork()
                if pid == 0:
                    _be_supervisor(theirs)
            say_hello(ours, again)
            closing.pop_all()
            return Forked(ours, pid)
    return None


def say_hello(to: socket.socket, again: Restart) -> None:
    """Raises OSError: it has died already, or there is no descriptor left."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        hello = {
            "DAEMON": os.getpid(),
            "COMMAND": json.dumps(again.arguments),
            "LOG": again.maybe_log or "",
        }
        descriptorstore.send(to, hello, pidfd)
    finally:
        os.close(pidfd)


def _be_supervisor(control: socket.socket) -> NoReturn:
    """In the child. What is open it closes, the daemon's end of `control` among it, so that either sees the other's
    end."""
    code = BUG_EXIT_CODE
    try:
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(NAME)
        let_go_of_inherited(control.fileno())
        from lazymem.cli import supervisor

        code = supervisor.supervise(control)
    except BaseException:  # nobody else sees it
        with contextlib.suppress(Exception):
            log.exception("the supervisor ends: a bug in lazymem")
    finally:
        os._exit(code)
