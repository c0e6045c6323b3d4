"""A mount as a systemd unit whose systemd is a stand-in: a test starts its main process, and starts it again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from tests.support.mounts import Mounted, wait_until
from tests.support.standinsystemd import StandInSystemd


class MountUnit(Mounted):
    """`start` is what systemd does at the unit's start, and when its main process has ended. `status` and the like as
    of any mount."""

    def __init__(self, systemd: StandInSystemd, source: str, path: Path, *arguments: object, cache: Path) -> None:
        path.mkdir()
        self.path = path
        self.ram_path = path / "pc.ram"
        self.log = path.with_name(f"{path.name}.log")
        self.systemd = systemd
        self._words = [str(word) for word in (*arguments, "--cache", cache, "--log", self.log, source, path)]
        self._maybe_process: subprocess.Popen[bytes] | None = None

    def start(self, dies_at: str = "") -> None:
        """`dies_at`: see `unitprocess`."""
        kept = self.systemd.take_kept()
        names = ":".join(f"{name}={descriptor}" for name, descriptor in kept.items())
        self._maybe_process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.unitprocess", dies_at, names, *self._words],
            pass_fds=list(kept.values()),
            cwd=Path(__file__).parents[2],
        )
        for descriptor in kept.values():
            os.close(descriptor)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._maybe_process is not None
        return self._maybe_process

    def has_ended(self) -> bool:
        """systemd listens meanwhile."""
        self.systemd.look()
        return self.process.poll() is not None

    def wait_told_ready(self, times: int) -> None:
        """So many of its starts have said it."""
        wait_until(lambda: self.systemd.look().count("READY=1") >= times, "it says that it is ready")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_served(self, restarts: int) -> int:
        """By the daemon after so many others, whose pid is returned. A mount that waits for one answers nobody."""

        def serves() -> bool:
            self.systemd.look()
            with contextlib.suppress(OSError):  # not mounted yet
                return bool(self.status()["survival"]["restarts"] == restarts)
            return False

        wait_until(serves, f"daemon number {restarts} serves")
        pid: int = self.status()["pid"]
        return pid

    def clean_up(self) -> None:
        super().clean_up()
        if self._maybe_process is not None:
            wait_until(self.has_ended, "the unit ends with its mount")
