"""Whether a next daemon would start, before the present one ends for it: for systemd, which starts it only afterwards.

It is the unit's own program with the present arguments, told (as by our supervisor) to load all it needs and to wait
for the word to begin; which never comes. Until then a next daemon changes nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import trio

from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE

LOAD_SECONDS = 60.0
"""For it to load what it needs."""

REAP_LOOK_SECONDS = 0.005

_SYSTEMDS = frozenset(["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"])
"""In the environment, and for the service itself only."""


async def maybe_objection(command: list[str]) -> str | None:
    """Why a next daemon, which `command` starts, would not; None: it would. A lack of something ends nobody."""
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        return f"no next daemon can be tried: {error.strerror}"
    with ours:
        try:
            with theirs:
                process = await trio.to_thread.run_sync(_start, command, theirs)
        except OSError as error:
            return f"{command[0]} cannot be started: {error.strerror}"
        except RuntimeError as error:  # no thread, says trio
            return f"{command[0]} cannot be started: {error}"
        try:
            with trio.move_on_after(LOAD_SECONDS):
                await trio.lowlevel.wait_readable(ours)
                return None if _is_warm(ours) else f"the new version's daemon does not start: {' '.join(command)}"
            return f"the new version's daemon was not loaded within {LOAD_SECONDS:g} s"
        finally:
            with trio.CancelScope(shield=True):
                await _end(process)


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Without a thread, of which there may be none."""
    process.kill()
    while process.poll() is None:  # noqa: ASYNC110  # nothing tells of it that would not be one more thing to lack
        await trio.sleep(REAP_LOOK_SECONDS)


def own_command() -> list[str]:
    """What started this process: the installed command, as the unit names it, or the module."""
    program, *arguments = sys.argv
    if os.path.isabs(program) and not program.endswith(".py"):
        return [program, *arguments]
    return [sys.executable, "-P", "-m", "lazymem.cli.mount", *arguments]


def _start(command: list[str], control: socket.socket) -> subprocess.Popen[bytes]:
    """Its complaints are for our log."""
    kept = {name: value for name, value in os.environ.items() if name not in _SYSTEMDS}
    return subprocess.Popen(
        command,
        pass_fds=[control.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**kept, SUCCESSOR_VARIABLE: str(control.fileno())},
        start_new_session=True,
    )


def _is_warm(control: socket.socket) -> bool:
    try:
        maybe_message = descriptorstore.receive(control)
    except OSError:
        return False
    return maybe_message is not None and "WARM" in maybe_message.fields
