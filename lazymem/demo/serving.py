"""Our own server and mount as processes, as a user would start them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazymem.demo.processes import child, tail, uninterrupted
from lazymem.errors import EnvironmentRefusedError, MountError

_STATUS_XATTR = "user.lazymem.status"
_START_SECONDS = 30.0
_HASTY_SECONDS = 5.0


@contextmanager
def served(folders: list[Path], log: Path, *options: str) -> Iterator[str]:
    """lazymem-serve over `folders` on a free port of this host; its address. Ended on the way out."""
    command = [sys.executable, "-m", "lazymem_server.app", "--json", "--listen", "127.0.0.1:0", *options]
    command += map(str, folders)
    with child(command, log) as process:
        yield _announced_address(process, log)


def _announced_address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                return str(json.loads(line)["listening"][0])
        if process.poll() is not None or time.monotonic() > deadline:
            raise EnvironmentRefusedError(f"lazymem-serve did not start: {tail(log)}")
        time.sleep(0.002)


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount; `ready_seconds`: how long lazymem-mount took to return."""

    folder: Path
    ready_seconds: float

    @property
    def ram(self) -> Path:
        return self.folder / "pc.ram"

    @property
    def vmstate(self) -> Path:
        return self.folder / "vmstate"

    def status(self) -> dict[str, Any]:
        """What `lazymem status --json` says."""
        found = json.loads(os.getxattr(self.folder, _STATUS_XATTR))
        assert isinstance(found, dict)
        return found


@contextmanager
def mounted(source: str, folder: Path, log: Path, *options: str) -> Iterator[Mounted]:
    """lazymem-mount of `source` (HOST:PORT/NAME) on `folder`, unmounted on the way out.

    Raises:
        MountError: lazymem-mount said no, with its line.
    """
    command = [sys.executable, "-m", "lazymem.cli.mount", source, str(folder), "--log", str(log), *options]
    started = time.monotonic()
    try:
        # An interrupt in between would end the command and leave the daemon that it had just started. A Ctrl-C at a
        # terminal still reaches the command itself, which then clears up.
        with uninterrupted():
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise MountError(done.stderr.strip() or f"lazymem-mount ended with {done.returncode}")
        yield Mounted(folder, time.monotonic() - started)
    except BaseException:
        # An error or an interrupt within: that is what the user should hear of, and the mount goes in any case.
        if os.path.ismount(folder):
            _unmount_in_any_case(folder)
        raise
    unmount(folder)


def unmount(folder: Path, patience_seconds: float = _START_SECONDS) -> None:
    """Unmounts, as root or as a user, and waits for the daemon to have stored everything and ended.

    Raises:
        MountError: it stays busy.
    """
    daemon = _daemon(folder)
    try:
        _run_unmount(folder, patience_seconds)
        if daemon is not None and not select.select([daemon], [], [], patience_seconds)[0]:
            raise MountError("the mount's daemon did not end after its unmount")
    finally:
        if daemon is not None:
            os.close(daemon)


def _unmount_in_any_case(folder: Path) -> None:
    """Unmounts; if that takes too long, without the daemon's consent. Nothing of this mount is needed any more."""
    daemon = _daemon(folder)
    try:
        with suppress(MountError):
            unmount(folder, _HASTY_SECONDS)
            return
        if daemon is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(daemon, signal.SIGKILL)
        subprocess.run([*_unmount_command(), "-l" if os.geteuid() == 0 else "-z", str(folder)], check=False)
    finally:
        if daemon is not None:
            os.close(daemon)


def _daemon(folder: Path) -> int | None:
    """A descriptor of the process that serves the mount; None where none answers."""
    try:
        return os.pidfd_open(int(json.loads(os.getxattr(folder, _STATUS_XATTR))["pid"]))
    except OSError:
        return None


def _unmount_command() -> list[str]:
    return ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]


def _run_unmount(folder: Path, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while True:
        done = subprocess.run([*_unmount_command(), str(folder)], capture_output=True, text=True, check=False)
        if done.returncode == 0 or not os.path.ismount(folder):
            return
        if time.monotonic() > deadline:
            raise MountError(f"cannot unmount {folder}: {done.stderr.strip()}")
        # A guest that has just been ended may hold its file a moment longer.
        time.sleep(0.05)
