"""Reading `/proc/self/mountinfo`: what is mounted where, without touching a mount that may not answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

from msgspec import Struct

from lazymem.errors import MountError


class Mount(Struct, frozen=True):
    """One line of mountinfo. `device` as "MAJ:MIN"; `peer_group` is the N of "shared:N", None for a private mount."""

    mount_id: int
    device: str
    path: str
    fs_type: str
    source: str
    peer_group: int | None

    @property
    def minor(self) -> int:
        return int(self.device.split(":")[1])

    @property
    def is_ours(self) -> bool:
        return self.fs_type == "fuse.lazymem"


def parse(text: str) -> list[Mount]:
    """Mounts in order; a later one hides an earlier one at the same path (proc(5))."""
    mounts = []
    for line in filter(None, text.split("\n")):  # other line ends stand in names as they are
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        shared = next((field for field in fields[6:] if field.startswith("shared:")), None)
        fs_type, source = after.split(" ")[:2]
        mounts.append(
            Mount(
                mount_id=int(fields[0]),
                device=fields[2],
                path=_unescape(fields[4]),
                fs_type=fs_type,
                source=_unescape(source),
                peer_group=int(shared.removeprefix("shared:")) if shared else None,
            )
        )
    return mounts


def _unescape(path: str) -> str:
    """The kernel writes white space, backslashes and, in a source, # as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def current() -> list[Mount]:
    return parse(read("self"))


def read(pid: str) -> str:
    """A process's mountinfo as it is: reading text would make a line's end of a carriage return in a name.

    Raises:
        OSError: the process is gone, or not ours to see.
    """
    return os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes())


def maybe_mount_at(path: str) -> Mount | None:
    """The topmost mount whose mount point is exactly `path` (absolute, symlinks resolved)."""
    return next((mount for mount in reversed(current()) if mount.path == path), None)


def mount_holding(path: str) -> Mount:
    """The mount that `path` lies on (longest matching mount point, topmost)."""
    best: Mount | None = None
    for mount in current():
        prefix = mount.path.rstrip("/") + "/"
        if (path + "/").startswith(prefix) and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    if best is None:
        raise LookupError(path)
    return best


def real_path(path: str) -> str:
    """`path` absolute, with all symlinks resolved.

    A dead FUSE mount answers no stat, not even one that only wants to know whether it is a symlink; so a mount point is
    never looked at. Elsewhere mount(2) follows a symlink, and mountinfo names its end.

    Raises:
        MountError: an empty path, which a shell makes of a variable that nobody set; it is not the current folder.
    """
    if not path:
        raise MountError("the mount point has no name")
    absolute = os.path.abspath(path)
    resolved = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    return resolved if maybe_mount_at(resolved) is not None else os.path.realpath(resolved)
