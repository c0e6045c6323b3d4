"""Every exception of lazymem: whose fault it is, whether trying again can help, and the exit code of a command.

Foreign exceptions (OSError, zstd, struct) are translated once, at the edge where they appear; errno is spoken only in
`fs/operations`. The first cause is kept with ``raise ... from``.
"""

from __future__ import annotations

import enum


class Blame(enum.Enum):
    """Who has to act for the error to go away."""

    US = "lazymem"
    PEER = "peer"
    WORLD = "world"
    USER = "user"


class LazymemError(Exception):
    """Base class. ``str(error)`` is one line that says what happened and, where there is one, what to do next."""

    blame = Blame.US
    temporary = False
    exit_code = 70


class UsageError(LazymemError):
    """The command line makes no sense."""

    blame = Blame.USER
    exit_code = 2


class EnvironmentRefusedError(LazymemError):
    """This host lacks something that is needed (kernel, /dev/fuse, rights); found at start, never at a fault."""

    blame = Blame.WORLD
    exit_code = 3


class RamFileError(LazymemError):
    """A file cannot back a RAM block: unreadable, of the wrong size, named twice, for an unknown block, locked."""

    blame = Blame.USER
    exit_code = 4


class SnapshotError(LazymemError):
    """A directory is not a snapshot, or is a broken one."""

    blame = Blame.USER
    exit_code = 5


class IdentityError(LazymemError):
    """Device state and RAM do not belong together, or the peer holds another snapshot than the one asked for."""

    blame = Blame.USER
    exit_code = 6


class SaveStreamError(LazymemError):
    """A save stream is cut, altered, or of another machine. The text names the section."""

    blame = Blame.USER
    exit_code = 7


class RemoteProtocolError(LazymemError):
    """The peer broke the wire protocol. The connection is of no more use."""

    blame = Blame.PEER
    exit_code = 8


class LocalProtocolError(LazymemError):
    """We tried to break the wire protocol: a bug here."""

    exit_code = 71


class ServerUnreachableError(LazymemError):
    """No connection, or it went away. Trying again is right."""

    blame = Blame.WORLD
    temporary = True
    exit_code = 9


class ServerRefusedError(LazymemError):
    """The server answered and said no (no such snapshot, too many clients, wrong version)."""

    blame = Blame.USER
    exit_code = 10


class VerificationError(LazymemError):
    """Bytes are not those of the snapshot they claim to be from. They are an error, never data."""

    blame = Blame.PEER
    exit_code = 11


class DeadlineError(LazymemError):
    """The user's own deadline for a page passed."""

    blame = Blame.WORLD
    exit_code = 12


class MountError(LazymemError):
    """A mount point is missing, busy, or the kernel refused the mount."""

    blame = Blame.USER
    exit_code = 13


class BusyError(LazymemError):
    """Somebody else holds what must be held by one: a state folder, a RAM file, a mount point."""

    blame = Blame.USER
    temporary = True
    exit_code = 14


class StoreError(LazymemError):
    """The local disk failed us: cache or state folder cannot be read or written."""

    blame = Blame.WORLD
    exit_code = 15


class GuestCrashError(LazymemError):
    """The guest stopped abnormally: unhandled exception, triple fault, access to nothing."""

    blame = Blame.USER
    exit_code = 16


class MonitorError(LazymemError):
    """A monitor (QMP) command failed or the monitor cannot be reached."""

    blame = Blame.USER
    exit_code = 17


class TemplateWriteError(LazymemError):
    """A template's bytes never change: many guests map it privately."""

    blame = Blame.USER
    exit_code = 18


class TlsError(LazymemError):
    """The two sides do not believe each other (certificate, name, authority), or one speaks no TLS 1.3."""

    blame = Blame.USER
    exit_code = 19
