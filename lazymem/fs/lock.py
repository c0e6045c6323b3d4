"""One daemon a mount point: a lock that a daemon holds for its whole life, also after its mount has gone.

So a mount right after an unmount waits until the old daemon has stored what the guest wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from lazymem.errors import BusyError, EnvironmentRefusedError

_POLL_SECONDS = 0.02


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where locks live: /run/lazymem for root, the XDG runtime folder for others, else a private folder in /tmp."""
    if os.geteuid() == 0:
        return Path("/run/lazymem")
    base = environ.get("XDG_RUNTIME_DIR", "")
    return Path(base, "lazymem") if base.startswith("/") else Path(f"/tmp/lazymem-{os.geteuid()}")


class MountLock:
    """The lock of one mount point (`mountinfo.real_path`)."""

    def __init__(self, path: str, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else runtime_dir()
        # The name must fit one path component whatever the mount point's length.
        name = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
        self._file = self._folder / f"{name}.lock"
        self._path = path
        self._descriptor = -1

    def acquire(self, wait_seconds: float) -> None:
        """Take the lock; blocking, for use before the event loop runs. It goes with the process.

        Raises:
            BusyError: another daemon of this mount point still lives after `wait_seconds`.
            EnvironmentRefusedError: the lock's folder is not ours, or cannot be made.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            self._open()
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_the_file():
                    return
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    self._close()
                    raise BusyError(
                        f"the daemon of an earlier mount on {self._path} is still storing what its guest wrote "
                        f"(waited {wait_seconds:g} s): try again once it has ended"
                    ) from error
                time.sleep(_POLL_SECONDS)
            self._close()  # whoever had it removed it: what we have is no lock of anybody's

    def _open(self) -> None:
        try:
            self._make_folder()
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise EnvironmentRefusedError(f"cannot make the lock {self._file}: {error.strerror}") from error

    def _is_the_file(self) -> bool:
        """Whether what is open is what the name stands for."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self._file))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def adopt(self, descriptor: int) -> None:
        """Take over the lock that an earlier daemon of this mount took; it was never free in between."""
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Whoever has a copy of it holds the lock too, until `release`."""
        return self._descriptor

    def release(self) -> None:
        """Let go, also in who has a copy. The file goes first, while it is locked: whoever waits for it then looks
        whether it is still the one of that name, so no two daemons lock two files."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._is_the_file():
                    self._file.unlink()
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.lstat(self._folder)
        if info.st_uid != os.geteuid() or not stat.S_ISDIR(info.st_mode):
            raise EnvironmentRefusedError(f"{self._folder} is not this user's own folder: remove it")
