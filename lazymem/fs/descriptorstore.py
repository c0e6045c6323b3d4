"""Descriptors given into other hands, to be had back by whoever comes after us: systemd's descriptor store, or ours.

A message is sd_notify(3)'s: lines NAME=VALUE, with a descriptor beside them for FDSTORE=1. systemd gives what it has to
the next start of the service (sd_listen_fds(3)); our own supervisor speaks the same over a socket pair, in both
directions. Messages keep their bounds on both kinds of socket, and none waits: a keeper that reads nothing any more
must not stop the mount.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import MutableMapping

from msgspec import Struct

MAX_MESSAGE_BYTES = 64 * 1024
"""A command line, at most; the kernel's default bound for a message is above that."""

FUSE, RECORD, LOCK, STATE, UPPER, PREDECESSOR = "fuse", "record", "lock", "state", "upper", "predecessor"
"""Names of what a mount has kept: its connection, its `sessionrecord`, the locks of the mount and of the state folder,
the upper level of the snapshot's digest tree (the cache may be deleted while the server is away);
and, as "predecessor-PID", a pidfd of each daemon before that may not have ended wholly, which only our own supervisor
has."""

SUCCESSOR_VARIABLE = "LAZYMEM_SUPERVISOR_FD"
"""In the environment of a daemon that goes on with a mount: the number of its socket to the supervisor."""

FIRST_LISTENED = 3
"""SD_LISTEN_FDS_START."""


class Message(Struct, frozen=True):
    fields: dict[str, str]
    maybe_descriptor: int | None = None


def send(to: socket.socket, fields: dict[str, object], maybe_descriptor: int | None = None) -> None:
    """Raises OSError: nobody is there any more, or nobody reads."""
    data = "\n".join(f"{name}={value}" for name, value in fields.items()).encode(errors="surrogateescape")
    flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
    rights = [] if maybe_descriptor is None else [maybe_descriptor]
    # Not send_fds and recv_fds, which take flags and have no use for them (Python 3.11).
    to.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights))] if rights else [], flags)


def receive(source: socket.socket) -> Message | None:
    """The next message, waiting for it if the socket does; None: the other side is gone.

    Raises:
        OSError: as recvmsg(2).
    """
    data, ancillary, _, _ = source.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(rights[: len(rights) // 4 * 4])
    if not data:
        return None
    lines = data.decode(errors="surrogateescape").split("\n")
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return Message(fields, descriptors[0] if descriptors else None)


def put(to: socket.socket, name: str, descriptor: int) -> None:
    """Have a copy of `descriptor` kept as `name`. FDPOLL=0: also when it is of no more use, which only we can tell.

    Raises OSError, as `send`.
    """
    send(to, {"FDSTORE": 1, "FDNAME": name, "FDPOLL": 0}, descriptor)


def drop(to: socket.socket, name: str) -> None:
    """Have `name` closed. Raises OSError, as `send`."""
    send(to, {"FDSTOREREMOVE": 1, "FDNAME": name})


def take_listened(environ: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """What a service manager kept for us, by name, close-on-exec from now on (sd_listen_fds_with_names(3)).

    To be called once, before any other file is opened: the environment forgets it.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found = {}
    for number, name in zip(range(int(count)), names.split(":"), strict=False):
        os.set_inheritable(FIRST_LISTENED + number, False)
        found[name] = FIRST_LISTENED + number
    return found
