"""Real fork servers for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lazymem.cli.forkrequest import SOCKET_VARIABLE
from tests.support.mounts import WAIT_SECONDS, Mounted, command, wait_until


class Forked(Mounted):
    """A mount by the installed command, which asks the fork server that the environment names."""

    MODULE = "lazymem.cli.mountcommand"


class ForkServer:
    """A `lazymem forkserver`, whose socket is `path`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "forkserver.sock"
        self.log = folder / "forkserver.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("lazymem.cli.forkserver", "--socket", self.path), stderr=log, stdin=subprocess.DEVNULL
            )
        wait_until(lambda: self.process.poll() is not None or self.path.exists(), "the fork server listens")
        assert self.process.poll() is None, self.log.read_text()

    def environment(self) -> dict[str, str]:
        """For a command that is to use it."""
        return {**os.environ, SOCKET_VARIABLE: str(self.path)}

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_SECONDS)


@contextlib.contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    server = ForkServer(folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
