"""A control group of its own for a process that is measured or tested: either version of them, removed at the end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """A new group directly below the root of what is or can be mounted here; a text where there can be none: why."""
    with control_group(name, "memory") as made:
        yield made if isinstance(made, str) else MemoryGroup(made[0], legacy=made[1])


@contextmanager
def control_group(name: str, controller: str) -> Iterator[tuple[Path, bool] | str]:
    """As `memory_group`, of any controller: the group's folder, and whether it is version 1's."""
    with ExitStack() as stack:
        reason = f"no {controller} control group is mounted, and none can be"
        for root, legacy in chain(_mounted(controller), _mountable(stack, controller)):
            folder = root / f"{name}-{os.getpid()}"
            try:
                if not legacy:
                    (root / "cgroup.subtree_control").write_text(f"+{controller}")
                folder.mkdir()
                stack.callback(_remove, folder)
                break
            except OSError as error:
                reason = f"no control group can be made in {root}: {error.strerror}"
        else:
            yield reason
            return
        yield folder, legacy


def _mounted(controller: str) -> Iterator[tuple[Path, bool]]:
    """Roots that have such groups, and whether they are version 1's."""
    for mount in mountinfo.current():
        root = Path(mount.path)
        if mount.fs_type == "cgroup" and controller in root.name.split(","):
            yield root, True
        elif mount.fs_type == "cgroup2" and controller in (root / "cgroup.controllers").read_text():
            yield root, False


def _mountable(stack: ExitStack, controller: str) -> Iterator[tuple[Path, bool]]:
    """The same, mounted for as long as `stack` stands: in a container the others are often read-only."""
    folder = stack.enter_context(TemporaryDirectory(prefix="lazymem-cgroup-"))
    for words in (("cgroup", "-o", controller), ("cgroup2",)):
        if subprocess.run(["mount", "-t", *words, "cgroup", folder], capture_output=True, check=False).returncode:
            continue
        stack.callback(subprocess.run, ["umount", folder], check=True)
        legacy = len(words) > 1
        if legacy or controller in (Path(folder) / "cgroup.controllers").read_text():
            yield Path(folder), legacy


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
