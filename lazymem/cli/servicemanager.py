"""What is said to systemd, which started us as a unit with Type=notify; outside of one nothing is."""

from __future__ import annotations

import os
import socket


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
