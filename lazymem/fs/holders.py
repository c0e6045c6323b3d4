"""Who keeps the mount busy: processes that map, open, or stand in it, read from /proc without touching the mount."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

STANDS = "works in"
"""How a process holds a mount of which it has no file."""


class Holder(Struct, frozen=True):
    """`how` is "maps", "has open" or `STANDS`."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) {self.how} it"


def find_holders(device: str, mount_path: str, *, proc: Path = Path("/proc")) -> list[Holder]:
    """Processes that hold the mount at `mount_path` with device number `device` ("MAJ:MIN", decimal)."""
    found = []
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdigit()):
        how = _maybe_how(proc / str(pid), device, mount_path)
        if how is not None:
            found.append(Holder(pid, _name(proc / str(pid)), how))
    return found


def _maybe_how(process: Path, device: str, mount_path: str) -> str | None:
    major, minor = (int(part) for part in device.split(":"))
    in_maps = f" {major:02x}:{minor:02x} "
    prefix = mount_path.rstrip("/") + "/"
    try:
        if in_maps in (process / "maps").read_text(errors="replace"):
            return "maps"
        for link in (process / "fd").iterdir():
            if _target(link).startswith(prefix):
                return "has open"
        if (_target(process / "cwd") + "/").startswith(prefix):
            return STANDS
    except OSError:  # ended meanwhile, or not ours to see
        return None
    return None


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()  # any bytes, cut at 15 of them
    except OSError:
        return "a process"
