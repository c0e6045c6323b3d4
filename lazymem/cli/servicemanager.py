"""What is said to systemd, which started us as a unit with Type=notify; outside of one nothing is."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from lazymem.errors import (
    EnvironmentRefusedError,
    IdentityError,
    MountError,
    ServerRefusedError,
    SnapshotError,
    TlsError,
    UsageError,
    VerificationError,
)

MISTAKE_EXIT_CODE = 78
"""EX_CONFIG, the only one in RestartPreventExitStatus= of deploy/lazymem-mount@.service. Where systemd does not try
again it drops what it keeps, and with it a guest's RAM. So it must be a code that nothing else ends with: not a version
without the option that the unit names (2), nor one that cannot be executed."""

AGAIN_EXIT_CODE = 75
"""EX_TEMPFAIL: it ended for a next one to go on. deploy/lazymem-mount@.service knows it."""

SYSTEMD = "systemd"
"""As the name of who keeps descriptors for a daemon."""

_SYSTEMDS = frozenset(["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"])
"""In the environment, and for the service itself only."""

_MISTAKES = frozenset(
    kind.exit_code
    for kind in (
        UsageError,
        EnvironmentRefusedError,
        SnapshotError,
        IdentityError,
        ServerRefusedError,
        VerificationError,
        MountError,
        TlsError,
    )
)
"""That trying again does not mend."""


def is_service() -> bool:
    """Whether systemd started us, and wants to know when we are ready."""
    return "NOTIFY_SOCKET" in os.environ


def without_systemds(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process that is not the service."""
    return {name: value for name, value in environment.items() if name not in _SYSTEMDS}


def is_first_start() -> bool:
    """Of a unit: it has kept nothing for us. To be asked before anybody takes what it kept."""
    return "NOTIFY_SOCKET" in os.environ and "LISTEN_FDS" not in os.environ


def exit_code_of_first_start(exit_code: int) -> int:
    """For a command that would end with `exit_code` and has not been ready: nobody's RAM is at stake yet."""
    return MISTAKE_EXIT_CODE if exit_code in _MISTAKES else exit_code


def tell_ready() -> None:
    """This process is the service, and does from now on what it was started for."""
    if "NOTIFY_SOCKET" in os.environ:
        import sdnotify

        sdnotify.SystemdNotifier().notify(f"READY=1\nMAINPID={os.getpid()}")


def maybe_notify_socket() -> socket.socket | None:
    """Where systemd takes messages, and descriptors with them, which the library has no call for."""
    if "NOTIFY_SOCKET" not in os.environ:
        return None
    import sdnotify

    maybe_socket: socket.socket | None = sdnotify.SystemdNotifier().socket
    return maybe_socket
