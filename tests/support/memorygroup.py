"""A memory control group of its own for a process under test: either version of control groups, removed at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazymem.fs import mountinfo

_REMOVE_SECONDS = 30.0


class MemoryGroup:
    """`folder` is the group's; `legacy`: version 1."""

    def __init__(self, folder: Path, *, legacy: bool) -> None:
        self.folder = folder
        self._legacy = legacy

    def limit(self, count_bytes: int) -> None:
        (self.folder / ("memory.limit_in_bytes" if self._legacy else "memory.max")).write_text(str(count_bytes))
        swap = self.folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")

    @property
    def limit_hits(self) -> int:
        """How often somebody in it was at the limit."""
        if self._legacy:
            return int((self.folder / "memory.failcnt").read_text())
        return self._event("memory.events", "max")

    @property
    def kills(self) -> int:
        """Processes in it that the kernel killed for want of memory."""
        return self._event("memory.oom_control" if self._legacy else "memory.events", "oom_kill")

    def _event(self, name: str, key: str) -> int:
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return int(dict(lines)[key])

    def command(self, *words: str) -> list[str]:
        """A command line that joins the group, then becomes `words`."""
        return ["sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh", str(self.folder / "cgroup.procs"), *words]


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup | str]:
    """A new group directly below the root of what is mounted here; a text where there can be none, and why."""
    reason = "no memory control group is mounted"
    for mount in mountinfo.current():
        legacy = mount.fs_type == "cgroup" and "memory" in Path(mount.path).name.split(",")
        root = Path(mount.path)
        if not legacy and (mount.fs_type != "cgroup2" or "memory" not in (root / "cgroup.controllers").read_text()):
            continue
        folder = root / f"{name}-{os.getpid()}"
        try:
            if not legacy:
                (root / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir()
        except OSError as error:
            reason = f"no control group can be made in {root}: {error.strerror}"
            continue
        try:
            yield MemoryGroup(folder, legacy=legacy)
        finally:
            _remove(folder)
        return
    yield reason


def _remove(folder: Path) -> None:
    """Once its last process is gone from it, which the kernel does a moment after that ended."""
    give_up = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)
