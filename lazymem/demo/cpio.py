"""Archives in cpio's "newc" format, which Linux unpacks as its first file system. Pure.

The format is described in Linux's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive; `mode` as in stat(2), type bits included; names have no leading slash."""

    name: str
    mode: int
    data: bytes = b""


def folder(name: str) -> Entry:
    """A directory that all may enter."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    """A file that may be executed."""
    return Entry(name, stat.S_IFREG | 0o755, data)


def archive(entries: list[Entry]) -> bytes:
    """The archive of `entries`, in order. The same entries give the same bytes: no times, no owners."""
    parts = [_record(number, entry) for number, entry in enumerate(entries, start=1)]
    parts.append(_record(0, Entry(_TRAILER, 0)))
    return b"".join(parts)


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), device node (2), name's length, checksum (unused)
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    """To a multiple of 4 bytes, as each header and each file's data must end."""
    return data + bytes(-len(data) % 4)
