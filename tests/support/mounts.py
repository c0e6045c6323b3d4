"""Real servers and real mounts for tests: started by the real commands, ended by their own ids whatever happens."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lazymem.fs import mountinfo, session
from lazymem.fs.lock import MountLock
from lazymem.pages import PAGE_SIZE
from tests.support.ports import KeptPort

WAIT_SECONDS = 30.0
"""For a condition on a busy test machine; nothing waits this long unless it is broken."""


def command(module: str, *arguments: object) -> list[str]:
    """A command line that runs one of our modules in this interpreter."""
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll `condition`; fail with `what` after `WAIT_SECONDS`."""
    give_up = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < give_up, f"waited {WAIT_SECONDS} s: {what}"
        time.sleep(0.01)


class Server:
    """A `lazymem-serve` process. `address` is HOST:PORT, where another one can be started once it has ended."""

    def __init__(
        self,
        *folders: Path,
        port: int = 0,
        arguments: tuple[str, ...] = (),
        log: Path | None = None,
        descriptors: int = 0,
    ) -> None:
        """`log`: where it logs, if not on our stderr. `descriptors`: how many it may have, if not as many as we."""
        self._place = KeptPort(port)
        listen = ("--listen", f"127.0.0.1:{self._place.number}")
        few = ("prlimit", f"--nofile={descriptors}") if descriptors else ()
        with contextlib.ExitStack() as opened:
            self._process = subprocess.Popen(
                [*few, *command("lazymem_server.app", *folders, *listen, "--json", *arguments)],
                stdout=subprocess.PIPE,
                stderr=opened.enter_context(log.open("ab")) if log is not None else None,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"lazymem-serve ended with {self._process.wait()}"
        self.address: str = json.loads(line)["listening"][0]
        self.pid = self._process.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        if self.is_running:
            self._process.terminate()
        self._process.wait(WAIT_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()
        self.stop()


class Mounted:
    """A live mount made by `lazymem-mount`. Its log is `log`."""

    MODULE = "lazymem.cli.mount"

    def __init__(self, source: str, path: Path, *arguments: object, cache: Path, check: bool = True) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.ram_path = path / "pc.ram"
        self.log = path.with_name(f"{path.name}.log")
        self.result = subprocess.run(
            command(self.MODULE, source, path, "--cache", cache, "--log", self.log, *arguments),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        if check:
            assert self.result.returncode == 0, self.result.stderr
            self.pid = self.status()["pid"]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(os.getxattr(self.path, "user.lazymem.status"))
        return found

    def requests(self) -> int:
        """READs of the RAM file that reached the daemon."""
        count: int = self.status()["store"]["reads"]
        return count

    def wait_kept(self) -> None:
        """Until all that was fetched is in the cache: a READ is answered before its pages are kept, and a leaf's zero
        pages are held before that. Without background (`--prefetch none`) nothing changes there afterwards."""
        wait_until(lambda: not self.status()["fetch"]["unkept_pages"], "what was fetched is kept")

    def open_map(self, *, private: bool = False) -> mmap.mmap:
        """The RAM file, mapped as a guest maps it."""
        descriptor = os.open(self.ram_path, os.O_RDWR)
        try:
            flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
            mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=flags)
        finally:
            os.close(descriptor)
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def unmount(self) -> None:
        """As a person does it: umount(8), then the daemon's end."""
        subprocess.run(["umount", self.path], check=True, capture_output=True, timeout=WAIT_SECONDS)
        self.wait_ended()

    def wait_ended(self) -> None:
        lock = MountLock(str(self.path))
        lock.acquire(WAIT_SECONDS)
        lock.release()

    def clean_up(self) -> None:
        """Whatever the test left: abort this connection, unmount, wait for the daemon."""
        mounted = mountinfo.maybe_mount_at(mountinfo.real_path(str(self.path)))
        if mounted is not None:
            with contextlib.suppress(Exception):  # the mount may just have gone
                session.abort(mounted.minor)
            subprocess.run(["umount", "-l", self.path], capture_output=True, check=False)
        self.wait_ended()


class Stage:
    """Starts servers and mounts, and takes all of them down at the end, mounts first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self._mounts: list[Mounted] = []
        self._servers: list[Server] = []

    def serve(self, *folders: Path, port: int = 0, arguments: tuple[str, ...] = ()) -> Server:
        server = Server(*folders, port=port, arguments=arguments)
        self._servers.append(server)
        return server

    def mount(
        self, source: str, *arguments: object, name: str = "mnt", check: bool = True, kind: type[Mounted] = Mounted
    ) -> Mounted:
        mounted = kind(source, self.folder / name, *arguments, cache=self.cache, check=check)
        self._mounts.append(mounted)
        return mounted

    def clean_up(self) -> None:
        for mounted in self._mounts:
            mounted.clean_up()
        for server in self._servers:
            server.stop()


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    made = Stage(folder)
    try:
        yield made
    finally:
        made.clean_up()


def page_of(mapped: mmap.mmap, number: int) -> bytes:
    return mapped[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


def drop_kernel_cache(path: Path) -> None:
    """Let the kernel forget the clean pages of the file at `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def kill_daemon(mounted: Mounted) -> None:
    """SIGKILL the daemon of a mount without a supervisor, and wait until its connection is dead."""
    os.kill(mounted.pid, signal.SIGKILL)
    mounted.wait_ended()
