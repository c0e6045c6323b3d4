"""`lazymem forkserver`: a process that has loaded all that a mount is, and is forked for each one.

Most of a mount's start is imports. This process has done them: `lazymem-mount` (`mountcommand`) finds it by its socket,
hands its command line over, and a fork of this process is the mount's daemon (`forkchild`).

Tasks: this process only keeps one child waiting, and forks the next when that has work; so a command meets a process
that is there. The children are daemons of their own, which neither our end nor our death touches.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lazymem.cli import forkrequest, logs
from lazymem.cli.background import have_standard_streams
from lazymem.cli.quickstart import quick_imports
from lazymem.errors import EnvironmentRefusedError, LazymemError, UsageError

log = logging.getLogger(__name__)

PROGRAM = "lazymem forkserver"

_EPILOG = """examples:
  lazymem forkserver &                              from now on lazymem-mount is forked from it
  systemctl enable --now lazymem-forkserver         the same, from boot on
  LAZYMEM_FORKSERVER=no lazymem-mount ...           without it

It takes what its own user asks for, and nothing of anybody else. It ends when lazymem's files change, for a new one to
load them; mounts go on without it.
"""

BACKLOG = 64
"""Commands that wait for their turn; each takes a millisecond of it."""

FORK_AGAIN_SECONDS = 0.5
"""Where the host has no process left, or a child ended before it had work."""


ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class _EndedError(Exception):
    """A signal wants us to end."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Keep a process with everything loaded, which mounts are forked from; they are ready sooner.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = forkrequest.default_path(os.environ)
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=default,
        help=f"where commands find it (default: {default or 'below XDG_RUNTIME_DIR'}; theirs is in "
        f"{forkrequest.SOCKET_VARIABLE})",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    found = parser.parse_args(arguments)
    logs.set_up(PROGRAM, in_front=True, verbose=found.verbose, file=None)
    try:
        if not found.socket:
            raise UsageError("there is no XDG_RUNTIME_DIR: say --socket PATH")
        _serve(found.socket)
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    except (_EndedError, KeyboardInterrupt):
        return 0
    return 0


def _serve(path: str) -> None:
    have_standard_streams()
    if sys.stdout is None:  # closed where we were started; a command's own stands there later
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for good
    path = os.path.abspath(path)
    wish = _wish_to_end()
    loaded = forkrequest.installed()  # before that: what is exchanged meanwhile is found out by the first command
    _load()
    with _listening(path) as listener:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # daemons that end leave nothing behind
        from lazymem.cli.servicemanager import tell_ready

        os.chdir("/")  # what we were started in can be unmounted
        tell_ready()
        log.info("mounts are forked from here (%s)", path)
        while _keep_one_waiting(listener, loaded, wish):
            pass
    log.info("lazymem's files are not those that were loaded any more: the end, for a new one to load them")


def _load() -> None:
    """All that a mount's start loads, in command, daemon, supervisor and filling process."""
    with quick_imports():
        import encodings.idna  # noqa: F401  # of each server's name
        import resource  # noqa: F401

        from lazymem import timeslice  # noqa: F401
        from lazymem.cli import (  # noqa: F401
            confinement,
            fillprocess,
            forkchild,
            lifesign,
            mount,
            mountdaemon,
            mountfill,
            supervised,
            supervisor,
            supervisorstart,
        )
        from lazymem.fetch import headstart  # noqa: F401
        from lazymem.fs import lock, session, tuning  # noqa: F401
    mount.prepare()
    gc.collect()
    gc.freeze()  # a collector's marks would be each child's own copy of all that


def _keep_one_waiting(listener: socket.socket, loaded: tuple[str, ...], wish: int) -> bool:
    """Until it has work. False: what we have loaded is not what is installed any more. Raises _EndedError."""
    server = os.getpid()
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            child = os.fork()
        except OSError as error:
            log.warning("no process for the next mount: %s", error.strerror)
            _wait([], wish, FORK_AGAIN_SECONDS)
            return True
        from lazymem.cli import forkchild  # loaded long ago

        if child == 0:
            forkchild.wait_and_be_it(listener, theirs, loaded, server)
        os.close(theirs)
        theirs = -1
        _wait([ours], wish)  # ended here, we touch no child: one that waits hears of it (`forkchild`)
        word = os.read(ours, 1)
        if not word:
            log.warning("the child that waited for a command ended without one")
            _wait([], wish, FORK_AGAIN_SECONDS)
        return word != forkchild.IS_STALE
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """Bound beside its name first: who finds the name finds somebody who listens.

    Raises:
        EnvironmentRefusedError: it cannot be there, or another one is.
    """
    _look_at_place(path)
    beside = f"{path}.{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            Path(path).parent.mkdir(mode=0o755, exist_ok=True)
            umask = os.umask(0o177)
            try:
                listener.bind(beside)
            finally:
                os.umask(umask)
            listener.listen(BACKLOG)
            os.rename(beside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise EnvironmentRefusedError(f"cannot listen on {path}: {error.strerror or error}") from error
        mine = os.stat(path).st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == mine:  # and not another's who took the name
                    os.unlink(path)
    finally:
        listener.close()


def _look_at_place(path: str) -> None:
    """A socket that nobody listens on any more may be replaced, and nothing else."""
    with contextlib.suppress(OSError):  # whoever binds there says it
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise EnvironmentRefusedError(f"{path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # alive, and its queue is full
                probe.connect(path)
        raise EnvironmentRefusedError(f"another fork server listens on {path}")


def _wish_to_end() -> int:
    """What can be read once a signal wants us to end. A handler that raises would be one that is not heard: where it
    meets logging or a fork's own preparations, those catch what it raises."""
    wish, noted = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of nohup(1), and of a script's background
            signal.signal(number, _noted)
    return wish


def _noted(number: int, frame: FrameType | None) -> None:
    """The kernel's word to Python is all that we want (`signal.set_wakeup_fd`)."""


def _wait(until: list[int], wish: int, seconds: float | None = None) -> None:
    """For one of them to be readable, so long at most. Raises _EndedError."""
    if wish in select.select([*until, wish], [], [], seconds)[0]:
        raise _EndedError


if __name__ == "__main__":
    sys.exit(main())
