"""How much memory may still be filled ahead of the guest: of the host, and of the control groups of this process.

Clean page cache counts as room, since the kernel gives it up for whoever needs memory. What is filled is clean page
cache, too, although it is what we want to keep; so who asks says how much of that he has brought. It is charged to the
control group of whoever brings it, that is, to the daemon's, whatever group the guest is in.
"""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath

from lazymem.fs import mountinfo

RESERVE_SHARE = 16
"""A sixteenth of the host's memory, and of each control group's limit, stays for others."""

_UNLIMITED = 1 << 60
"""Version 1 of control groups writes the largest multiple of a page for no limit."""


def room_bytes(filled_bytes: int, *, proc: Path = Path("/proc"), mounts: list[mountinfo.Mount] | None = None) -> float:
    """Bytes that may still be filled after `filled_bytes` were; infinite where nothing can be read. Some 0.1 ms."""
    groups = _groups(proc, mountinfo.current() if mounts is None else mounts)
    return min([_host_room(filled_bytes, proc), *(_group_room(filled_bytes, folder) for folder in groups)])


def _host_room(filled_bytes: int, proc: Path) -> float:
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        return math.inf
    figures = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    if "MemAvailable" not in figures or "MemTotal" not in figures:
        return math.inf
    return figures["MemAvailable"] - filled_bytes - figures["MemTotal"] / RESERVE_SHARE


def _groups(proc: Path, mounts: list[mountinfo.Mount]) -> list[Path]:
    """The folders of this process's memory group and of those above it, of either version."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _maybe_root(controllers.split(","), mounts)
        if root is not None:
            inner = PurePosixPath(path.lstrip("/"))
            found += [root / inner, *(root / above for above in inner.parents)]
    return [folder for folder in found if ".." not in folder.parts and folder.is_dir()]


def _maybe_root(controllers: list[str], mounts: list[mountinfo.Mount]) -> Path | None:
    for mount in mounts:
        path = Path(mount.path)
        if controllers == [""] and mount.fs_type == "cgroup2":
            return path
        if "memory" in controllers and mount.fs_type == "cgroup" and "memory" in path.name.split(","):
            return path
    return None


def _group_room(filled_bytes: int, folder: Path) -> float:
    """What the group may still take, in bytes."""
    rooms = [math.inf]
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.high", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        maybe_limit, maybe_usage = _maybe_number(folder / limit_name), _maybe_number(folder / usage_name)
        if maybe_limit is not None and maybe_usage is not None and maybe_limit < _UNLIMITED:
            cached = _clean_cache(folder)
            used = maybe_usage - cached + min(filled_bytes, cached)
            rooms.append(maybe_limit - used - maybe_limit / RESERVE_SHARE)
    return min(rooms)


def _clean_cache(folder: Path) -> int:
    """Bytes of page cache of the group, and of those below it, that need not be written anywhere first."""
    try:
        text = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    figures = {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}

    def all_of(*names: str) -> int:
        # Version 1 has the groups below it in a figure of its own.
        return sum(figures.get(f"total_{name}", figures.get(name, 0)) for name in names)

    unclean = all_of("file_dirty", "file_writeback", "dirty", "writeback")
    return max(0, all_of("inactive_file", "active_file") - unclean)


def _maybe_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"; or the controller is not there
        return None
