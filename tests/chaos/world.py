"""What chaos is let loose on: two servers of the same snapshots, a bad link to each, and mounts that know both."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.support.badlink import BadLink, Mode
from tests.support.certificates import Pki, options
from tests.support.mounts import Mounted, Server, Stage
from tests.support.ports import KeptPort

T = TypeVar("T")

ANSWER_SECONDS = 2.0
"""For a mount's status. One whose daemon is being replaced answers later, and then it is asked again later."""


BASE_DELAY_SECONDS = 0.004
"""Of each piece of up to 64 KiB that a link carries: so what is to be fetched takes seconds, and faults meet it."""


class ServerPlace:
    """A server that comes and goes on one port, behind a link of its own."""

    def __init__(self, folders: list[Path], seed: int, log: Path, options: tuple[str, ...]) -> None:
        self._folders = folders
        self._log = log
        self._options = options
        self._place = KeptPort()
        self._server: Server | None = None
        self.start()
        self.link = BadLink(f"127.0.0.1:{self._place.number}", seed)
        self.link.delay_seconds = BASE_DELAY_SECONDS

    @property
    def maybe_pid(self) -> int | None:
        return None if self._server is None else self._server.pid

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server = None

    def start(self) -> None:
        if self._server is None:
            port = self._place.number
            self._server = Server(*self._folders, port=port, arguments=self._options, log=self._log)

    def close(self) -> None:
        self.link.close()
        self.kill()

    def mend(self) -> None:
        """Everything works again."""
        link = self.link
        link.mode, link.delay_seconds, link.flip_share = Mode.GOOD, BASE_DELAY_SECONDS, 0.0
        self.start()


class Victim:
    """A mount whose processes are killed, though never all that keep it at once."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self._dead_pids: set[int] = set()

    def maybe_status(self) -> dict[str, Any] | None:
        """None: it does not answer now."""
        return within(ANSWER_SECONDS, self.mounted.status)

    def maybe_daemon(self) -> int | None:
        """The one that serves, when there is also who keeps the mount should it die."""
        status = self.maybe_status()
        if status is None or status["survival"]["kept_by"] is None or not self.maybe_supervisor_of(status):
            return None
        pid: int = status["pid"]
        return None if pid in self._dead_pids else pid

    def maybe_supervisor_of(self, status: dict[str, Any]) -> int | None:
        pid: int | None = status["survival"]["supervisor_pid"]
        if pid is None or pid in self._dead_pids or not os.path.exists(f"/proc/{pid}"):
            return None
        return pid

    def kill(self, pid: int, number: int) -> None:
        """It may have ended by itself."""
        self._dead_pids.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask` says, or None if that takes longer or fails. A thread that stands in the kernel is left behind."""
    found: list[T] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            found.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


class World:
    """`maybe_pki`: whose certificates all have, where they speak TLS."""

    def __init__(self, folders: list[Path], stage: Stage, seed: int, *, tls: bool) -> None:
        self.stage = stage
        self.maybe_pki = Pki(stage.folder / "pki") if tls else None
        allowed: tuple[str, ...] = ()
        self._client: tuple[str, ...] = ()
        if self.maybe_pki is not None:
            self._client = options(self.maybe_pki.client("host-b"))
            allowed = (*options(self.maybe_pki.server()), "--allow", "host-b")
        self.places = [
            ServerPlace(folders, seed + number, stage.folder / f"serve{number}.log", allowed) for number in (0, 1)
        ]
        self.victims: list[Victim] = []

    def source(self, name: str) -> str:
        return ",".join(f"{place.link.address}/{name}" for place in self.places)

    def mount(self, name: str, *words: object, at: str) -> Mounted:
        mounted = self.mount_again(name, *words, at=at)
        self.victims.append(Victim(mounted))
        return mounted

    def mount_again(self, name: str, *words: object, at: str) -> Mounted:
        """One that is left alone."""
        return self.stage.mount(self.source(name), *self._client, *words, name=at)

    def mend(self) -> None:
        for place in self.places:
            place.mend()

    def close(self) -> None:
        for place in self.places:
            place.close()

    @property
    def flips(self) -> int:
        return sum(place.link.flips for place in self.places)


@contextlib.contextmanager
def world(folders: list[Path], folder: Path, seed: int, *, tls: bool) -> Iterator[World]:
    """All of it is gone on the way out, mounts first."""
    stage = Stage(folder)
    made = World(folders, stage, seed, tls=tls)
    try:
        yield made
    finally:
        made.mend()
        stage.clean_up()
        made.close()
