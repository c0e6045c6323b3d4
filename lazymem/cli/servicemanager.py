"""The word to systemd that a unit with Type=notify is ready; outside of one it does nothing."""

from __future__ import annotations

import os


def tell_ready() -> None:
    """This process is the service, and does from now on what it was started for."""
    if "NOTIFY_SOCKET" in os.environ:
        import sdnotify

        sdnotify.SystemdNotifier().notify(f"READY=1\nMAINPID={os.getpid()}")
