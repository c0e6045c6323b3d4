"""Running a command's work in the background: the caller returns when the daemon says that it is ready, or why not."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from lazymem.errors import LazymemError

log = logging.getLogger(__name__)

BUG_EXIT_CODE = 70
INTERRUPTED_EXIT_CODE = 130


class Announcer:
    """The daemon's word to whoever started it: ready, or the error it died of. Over a pipe; -1: nobody waits."""

    def __init__(self, descriptor: int = -1) -> None:
        self._descriptor = descriptor
        self.was_ready = False

    def descriptors(self) -> tuple[int, ...]:
        """What a copy of this process needs to be heard in its place."""
        return (self._descriptor,) if self._descriptor >= 0 else ()

    def ready(self, notices: tuple[str, ...] = ()) -> None:
        """`notices`: lines that the user should read although all is well."""
        self.was_ready = True
        self._say({"ready": True, "notices": notices})

    def failed(self, text: str, exit_code: int) -> None:
        self._say({"ready": False, "text": text, "exit_code": exit_code})

    def _say(self, message: dict[str, object]) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(BrokenPipeError):  # whoever waited is gone, which is no reason to end a mount
                os.write(self._descriptor, json.dumps(message).encode() + b"\n")
            os.close(self._descriptor)
            self._descriptor = -1


Daemon = Callable[[Announcer], int]

Background = Callable[[str, Daemon], int]
"""As `run_in_background`."""


def run_in_background(program: str, daemon: Daemon) -> int:
    """Fork; run `daemon` in the child, which leaves the terminal; return the exit code for the caller.

    The child is forked before any thread or event loop exists. An error is printed here as one line.
    """
    have_standard_streams()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        run_here(daemon, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        try:
            text = pipe.readline()  # not to its end, which whoever goes on after a killed daemon keeps open
        except KeyboardInterrupt:
            os.kill(child, 15)
            os.waitpid(child, 0)
            raise
    return report(program, text)


def run_here(daemon: Daemon, descriptor: int) -> NoReturn:
    """In a process that was forked for it: leave everything that is the caller's but `descriptor`, by which whoever
    waits hears of it, and run `daemon`."""
    let_go_of_inherited(descriptor)
    _leave_terminal()
    os._exit(run_daemon(daemon, Announcer(descriptor)))


def run_daemon(daemon: Daemon, announcer: Announcer) -> int:
    """Whatever ends the daemon is told to whoever still waits, and stands in the log."""
    try:
        return daemon(announcer)
    except LazymemError as error:
        log.error("the daemon ends: %s", error)
        announcer.failed(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        announcer.failed("interrupted", INTERRUPTED_EXIT_CODE)
        return INTERRUPTED_EXIT_CODE
    except BaseException as error:  # nobody else sees it: there is no terminal, and the caller has returned
        log.exception("the daemon ends: a bug in lazymem")
        text = " ".join(f"{type(error).__name__}: {error}".split())
        announcer.failed(f"a bug in lazymem ({text}); run with -f to see where", BUG_EXIT_CODE)
        return BUG_EXIT_CODE


def report(program: str, text: bytes) -> int:
    """Print what a daemon had to say, `text` of its `Announcer`, empty if it died; returns the caller's exit code."""
    if not text:
        print(f"{program}: the daemon died at its start; run with -f to see why", file=sys.stderr)
        return BUG_EXIT_CODE
    message = json.loads(text)
    if message["ready"]:
        for notice in message["notices"]:
            print(f"{program}: {notice}", file=sys.stderr)
        return 0
    print(f"{program}: {message['text']}", file=sys.stderr)
    return int(message["exit_code"])


def let_go_of_inherited(*keep: int) -> None:
    """In a forked child: a lock or a pipe that the parent has open would otherwise be held for as long as we live.

    Put over, not closed: an object of the parent's that is collected here would close its number once more, and with it
    whatever of ours had got that number. Over numbers beyond RLIMIT_NOFILE, which was lowered since, nothing can be
    put; nothing of ours will get them either.
    """
    found = [int(name) for name in os.listdir("/proc/self/fd")]  # that folder's own among them, whose number is free
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # again, and taken by this
    for descriptor in found:
        if descriptor > 2 and descriptor not in (nothing, *keep):
            try:
                os.dup2(nothing, descriptor, inheritable=False)
            except OSError:
                os.close(descriptor)
    os.close(nothing)


def have_standard_streams() -> None:
    """Whoever started us may have closed them: what is opened would get their numbers, and be put over as theirs."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)


def _leave_terminal() -> None:
    """A session of our own, no working folder held, no terminal: ctrl-C there is not meant for us any more."""
    if os.getsid(0) != os.getpid():  # as it is of whoever was forked ahead
        os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
