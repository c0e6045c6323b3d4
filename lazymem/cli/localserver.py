"""A server of a local snapshot for one mount: on a unix socket in a folder of its own, ended when the mount is.

It is a process of its own, apart from the mount's daemon, whose end is not its end: it looks at the table of mounts.
Run as `python -m lazymem.cli.localserver SOCKET MOUNTPOINT FOLDER [PARENT...]`: it says "ready" on its output, and
serves while its input is open, then (after the word "keep" there) while something of ours is mounted on MOUNTPOINT. A
server that died is started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lazymem.errors import EnvironmentRefusedError
from lazymem.fs import mountinfo
from lazymem.fs.lock import runtime_dir
from lazymem.snapshot.reader import open_snapshot

READY = b"ready\n"
KEEP = b"keep\n"

_START_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
"""Before a server that died is started again."""

_PR_SET_PDEATHSIG = 1


class LocalServer:
    """A running one, `socket` its path. Ends with its `with`, unless `keep` was called."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self._process = process
        self.socket = socket
        self.kept = False

    def keep(self) -> None:
        """From here on it ends with its mount, which is there."""
        assert self._process.stdin is not None
        self._process.stdin.write(KEEP)
        self._process.stdin.flush()
        self.kept = True


@contextlib.contextmanager
def started(folder: Path, parents: Sequence[Path], mountpoint: str, maybe_log: Path | None) -> Iterator[LocalServer]:
    """A server of `folder`, listening, for the mount that will be at `mountpoint`. It logs to a file, or to our stderr.

    Raises:
        SnapshotError: it is no snapshot that can be served.
        EnvironmentRefusedError: it does not start.
    """
    open_snapshot(folder, parents).close()  # what is wrong with it is said here, and not in a server's log
    runtime_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="served-", dir=runtime_dir()))
    socket = place / "s"
    words = [socket, mountpoint, folder.absolute(), *(parent.absolute() for parent in parents)]
    # Not the caller's stderr for a mount in the background: whoever waits for its end would wait for the mount's.
    with open(maybe_log, "ab") if maybe_log is not None else contextlib.nullcontext() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a ctrl-C is the mount's to hear
        )
    assert process.stdin is not None
    assert process.stdout is not None
    server = LocalServer(process, socket)
    try:
        if process.stdout.readline() != READY:
            raise EnvironmentRefusedError(f"the server of {folder} does not start; lazymem-serve {folder} says why")
        yield server
    finally:
        process.stdin.close()  # the end, if it was not told to stay
        process.stdout.close()
        if server.kept:
            process.returncode = 0  # it outlives us, and that is no oversight
        else:
            process.wait()


# ---- the process


def main(arguments: Sequence[str]) -> int:
    """Serve until the mount is gone; returns the exit code."""
    socket, mountpoint, folder, *parents = arguments
    command = [sys.executable, "-m", "lazymem_server.app", folder, "--listen", f"unix:{socket}", "--json", "--quiet"]
    for parent in parents:
        command += ["--parent", parent]
    server = _Server(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if not server.start():
            return 1
        os.write(1, READY)
        os.chdir("/")
        _detach_output()
        if _told_to_keep(server.look):
            _wait_unmounted(mountpoint, server.look)
        return 0
    finally:
        server.end()
        shutil.rmtree(Path(socket).parent, ignore_errors=True)


class _Server:
    """lazymem-serve as a child: started, looked after, ended."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._libc = ctypes.CDLL(None)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Whether it listens."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # Killed with us, however we end; there is no thread here that the fork could trip over.
            preexec_fn=lambda: self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
        )
        assert self._process.stdout is not None
        with self._process.stdout as said:
            return bool(select.select([said], [], [], _START_SECONDS)[0]) and bool(said.readline())

    def look(self) -> None:
        """Start it again if it has died."""
        if self._process is not None and self._process.poll() is not None:
            time.sleep(_PAUSE_SECONDS)
            self.start()

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _detach_output() -> None:
    """The pipe to whoever started us is his to close; errors may still be read in front."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)


def _told_to_keep(look: Callable[[], None]) -> bool:
    """Waits for the word, or for the end of whoever would say it; whether it was said."""
    while True:
        if select.select([0], [], [], 1.0)[0]:
            return os.read(0, len(KEEP)) == KEEP
        look()


def _wait_unmounted(mountpoint: str, look: Callable[[], None]) -> None:
    """Waits until nothing of ours is mounted there. The kernel says when the table of mounts changes."""
    with open("/proc/self/mountinfo", "rb") as table:
        changes = select.poll()
        changes.register(table, select.POLLPRI)
        while True:
            mounted = mountinfo.maybe_mount_at(mountpoint)
            if mounted is None or not mounted.is_ours:
                return
            changes.poll(1000)
            look()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
