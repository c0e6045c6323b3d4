"""Running a command's work in the background: the caller returns when the daemon says that it is ready, or why not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from lazymem.errors import LazymemError


class Announcer:
    """The daemon's word to whoever started it: ready, or the error it died of. Over a pipe; -1: nobody waits."""

    def __init__(self, descriptor: int = -1) -> None:
        self._descriptor = descriptor

    def ready(self, notices: tuple[str, ...] = ()) -> None:
        """`notices`: lines that the user should read although all is well."""
        self._say({"ready": True, "notices": notices})

    def failed(self, text: str, exit_code: int) -> None:
        self._say({"ready": False, "text": text, "exit_code": exit_code})

    def _say(self, message: dict[str, object]) -> None:
        if self._descriptor >= 0:
            os.write(self._descriptor, json.dumps(message).encode())
            os.close(self._descriptor)
            self._descriptor = -1


def run_in_background(program: str, daemon: Callable[[Announcer], int]) -> int:
    """Fork; run `daemon` in the child, which leaves the terminal; return the exit code for the caller.

    The child is forked before any thread or event loop exists. An error is printed here as one line.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _leave_terminal()
        os._exit(_run_child(daemon, Announcer(write_end)))
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        try:
            text = pipe.read()
        except KeyboardInterrupt:
            os.kill(child, 15)
            os.waitpid(child, 0)
            raise
    return _report(program, text)


def _run_child(daemon: Callable[[Announcer], int], announcer: Announcer) -> int:
    try:
        return daemon(announcer)
    except LazymemError as error:
        announcer.failed(str(error), error.exit_code)
        return error.exit_code


def _report(program: str, text: bytes) -> int:
    if not text:
        print(f"{program}: the daemon died at its start; run with -f to see why", file=sys.stderr)
        return 70
    message = json.loads(text)
    if message["ready"]:
        for notice in message["notices"]:
            print(f"{program}: {notice}", file=sys.stderr)
        return 0
    print(f"{program}: {message['text']}", file=sys.stderr)
    return int(message["exit_code"])


def _leave_terminal() -> None:
    """A session of our own, no working folder held, no terminal: ctrl-C there is not meant for us any more."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
