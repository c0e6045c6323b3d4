"""The installed `lazymem-mount`: asks a fork server to be it, where one runs, and is it itself otherwise.

A mount's start is imports. A fork server (`forkserver`) has done them, so what waits for a mount waits for Python's own
start, a fork and the mount. Nothing may be loaded here that the other way does not need as well.
"""

from __future__ import annotations

import _socket
import os
import sys
from array import array

from lazymem.cli import forkrequest
from lazymem.cli.forkrequest import EXIT, GO, HERE, REFUSED, TAKEN, WAIT_SECONDS

PROGRAM = "lazymem-mount"

QUIETLY_READY = b'{"ready": true, "notices": []}\n'
"""As `background.Announcer` says it."""


def run() -> None:
    """The installed `lazymem-mount`; ends the process."""
    maybe_code = maybe_forked(sys.argv[1:])
    if maybe_code is not None:
        os._exit(maybe_code)
    from lazymem.cli import mount

    mount.run()


def main(arguments: list[str] | None = None) -> int:
    """As `mount.main`."""
    words = sys.argv[1:] if arguments is None else arguments
    maybe_code = maybe_forked(words)
    if maybe_code is not None:
        return maybe_code
    from lazymem.cli import mount

    return mount.main(words)


class _NotTakenError(OSError):
    """Why no fork server does it."""


_NOT_ASKED = frozenset(["--upgrade", "--help", "-h"])
"""What no fork server does: for a mount that there is, or of texts that were made with its own environment."""

_NONE = -1
"""No daemon is known yet."""


def maybe_forked(arguments: list[str]) -> int | None:
    """The exit code, after a fork server did it all; None: it is still to be done."""
    path = forkrequest.socket_path(os.environ)
    if not path or not _NOT_ASKED.isdisjoint(arguments):
        return None
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    daemon = _NONE
    try:
        connection.settimeout(WAIT_SECONDS)
        connection.connect(path)
        first = _asked(connection, arguments)
        if first.startswith(EXIT):
            return int(first[len(EXIT) :])
        daemon = os.pidfd_open(int(first[len(TAKEN) :]))  # alive: it waits for us
        connection.send(GO)
        word = _word(connection)
    except KeyboardInterrupt:
        return _interrupted(daemon)
    except OSError as error:
        connection.close()
        if os.environ.get(forkrequest.SOCKET_VARIABLE):  # who named it wants to know; others are served all the same
            print(f"{PROGRAM}: starts without the fork server: {error.strerror or error}", file=sys.stderr)
        return None
    return _told(word)


def _asked(connection: _socket.socket, arguments: list[str]) -> bytes:
    """The first answer, unless that is a refusal."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, forkrequest.CREDENTIALS_BYTES)
    if forkrequest.peer(credentials)[1] != os.geteuid():
        raise _NotTakenError("it is another user's")
    if connection.recv(4096) != HERE:
        raise _NotTakenError("it ended")
    _ask(connection, arguments)
    first = connection.recv(4096)
    if not first.startswith((TAKEN, EXIT)):
        raise _NotTakenError(first[len(REFUSED) :].decode(errors="replace") or "it ended")
    return first


def _ask(connection: _socket.socket, arguments: list[str]) -> None:
    umask = os.umask(0o077)
    os.umask(umask)
    request = forkrequest.Request(forkrequest.installed(), umask, tuple(arguments), dict(os.environ))
    folder = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        streams = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", [0, 1, 2, folder]))
        connection.sendmsg([forkrequest.encode(request)], [streams])
    finally:
        os.close(folder)


def _word(connection: _socket.socket) -> bytes:
    """The daemon's, however long it takes; empty: it died. Raises OSError: it did before it had read our `GO`."""
    connection.settimeout(None)
    return connection.recv(forkrequest.MAX_BYTES)


def _told(word: bytes) -> int:
    if word == QUIETLY_READY:
        return 0
    if word.startswith(EXIT):
        return int(word[len(EXIT) :])
    from lazymem.cli.background import report

    return report(PROGRAM, word)


def _interrupted(daemon: int) -> int:
    """As in the command that forks its own daemon. Without our `GO`, its child mounts nothing."""
    if daemon != _NONE:
        import select
        import signal

        try:
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
            select.select([daemon], [], [])
        except ProcessLookupError:
            pass
    print(f"{PROGRAM}: interrupted; nothing is mounted", file=sys.stderr)
    return 130


if __name__ == "__main__":
    run()
