"""What `lazymem-mount` asks of a fork server, and where that listens. Loads nothing: each mount waits for it.

One connection, SOCK_SEQPACKET, a packet each:

- the child that took it: `HERE`. To one that stands still nothing is sent: whoever waits for the end of the command's
  output would wait for that, too, for as long as the streams lie in its queue;
- the command: `encode`d, with its standard streams and its working folder;
- the child: `TAKEN` and its process id, `REFUSED` and why, or `EXIT` and a code (a mistake in its line);
- the command: `GO`, without which nothing is mounted: it may have given up waiting meanwhile;
- the child: `EXIT` and a code, or the daemon's word as `background.Announcer` has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import lazymem

SOCKET_VARIABLE = "LAZYMEM_FORKSERVER"
"""In the environment: its socket; empty or `no`: none is asked."""

HERE, TAKEN, REFUSED, GO, EXIT = b"here", b"taken ", b"refused ", b"go", b"exit "

WAIT_SECONDS = 2.0
"""So long either side waits for the other's next packet but the last one, which tells that all is mounted."""

MAX_BYTES = 1 << 18
"""More than a packet of a Unix socket may have as a rule. Of a command with more than that nobody is asked."""

DESCRIPTORS = 4

CREDENTIALS_BYTES = 12
"""Of SO_PEERCRED."""

_STARTED = ("NOTIFY_SOCKET", "LISTEN_FDS", "LAZYMEM_SUPERVISOR_FD")
"""Somebody started this process itself, for what it is to be."""


class Request(NamedTuple):
    """`installed`: as the function."""

    installed: tuple[str, ...]
    umask: int
    arguments: tuple[str, ...]
    environment: dict[str, str]


def socket_path(environment: Mapping[str, str]) -> str:
    """Where a fork server of this user listens; empty: none is to be asked."""
    if any(name in environment for name in _STARTED):
        return ""
    named = environment.get(SOCKET_VARIABLE)
    if named is not None:
        return "" if named == "no" else named
    return default_path(environment)


def default_path(environment: Mapping[str, str]) -> str:
    """Empty: this user has no folder for it."""
    if os.geteuid() == 0:
        return "/run/lazymem/forkserver.sock"
    runtime = environment.get("XDG_RUNTIME_DIR")
    return f"{runtime}/lazymem/forkserver.sock" if runtime else ""


def installed() -> tuple[str, ...]:
    """What is equal for two processes that run the same files of lazymem in the same Python.

    Raises:
        OSError: one of them is not there (any more).
    """
    package = os.path.dirname(lazymem.__file__)
    ours = (f"{package}/{name}" for name in ("__init__.py", "cli/mount.py", "cli/mountdaemon.py"))
    files = (os.stat(name) for name in (sys.executable, *ours))
    marks = (f"{file.st_dev}:{file.st_ino}:{file.st_mtime_ns}" for file in files)
    return (lazymem.__version__, sys.executable, package, *marks)


def encode(request: Request) -> bytes:
    """Of texts that came from the system, none of which has a zero in it, as bytes again: that the other side's locale
    has another encoding changes no path."""
    head = [str(len(request.installed)), str(request.umask), str(len(request.arguments))]
    pairs = (text for pair in request.environment.items() for text in pair)
    return os.fsencode("\0".join([*head, *request.installed, *request.arguments, *pairs]))


def decode(data: bytes) -> Request:
    """Raises ValueError: it is none."""
    texts = os.fsdecode(data).split("\0")
    known, umask, count = (int(text) for text in texts[:3])
    rest = texts[3:]
    pairs = rest[known + count :]
    if min(known, count) < 0 or len(rest) < known + count or len(pairs) % 2 or not 0 <= umask <= 0o777:
        raise ValueError("not a request")
    return Request(
        tuple(rest[:known]), umask, tuple(rest[known : known + count]), dict(zip(pairs[::2], pairs[1::2], strict=True))
    )


_AT_START = ("PYTHON", "LD_", "GLIBC_TUNABLES", "MALLOC_")
"""So begins what Python, the loader and the C library read when a process starts (a preloaded proxy, for one)."""


def read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """What cannot be taken over by a process that runs already."""
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


def peer(credentials: bytes) -> Sequence[int]:
    """Process, user and group of SO_PEERCRED."""
    return [int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4, 8)]
