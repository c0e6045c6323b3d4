"""A stand-in for systemd as a mount's unit sees it: takes what is said to NOTIFY_SOCKET, and keeps descriptors."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lazymem.fs import descriptorstore


class StandInSystemd:
    """`said`: all lines but those about descriptors. `kept`: by name; of it `look` has to take note first. `dropped`:
    the names of what was let go."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self.said: list[str] = []
        self.kept: dict[str, int] = {}
        self.dropped: list[str] = []
        patch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            patch.delenv(name, raising=False)

    def look(self) -> list[str]:
        """At all that was sent so far; returns `said`."""
        self._socket.setblocking(False)
        while True:
            try:
                message = descriptorstore.receive(self._socket)
            except BlockingIOError:
                return self.said
            assert message is not None
            self._obey(message)

    def _obey(self, message: descriptorstore.Message) -> None:
        name = message.fields.get("FDNAME", "")
        if "FDSTORE" in message.fields:
            assert message.maybe_descriptor is not None
            assert message.fields["FDPOLL"] == "0", "else it would be dropped when nobody needs it less"
            assert name not in self.kept
            self.kept[name] = message.maybe_descriptor
        elif "FDSTOREREMOVE" in message.fields:
            if name in self.kept:
                os.close(self.kept.pop(name))
                self.dropped.append(name)
        else:
            self.said += [f"{key}={value}" for key, value in message.fields.items()]

    def take_kept(self) -> dict[str, int]:
        """Copies, as the next start of the unit gets them."""
        self.look()
        return {name: os.dup(descriptor) for name, descriptor in self.kept.items()}

    def close(self) -> None:
        self.look()
        for descriptor in self.kept.values():
            os.close(descriptor)
        self._socket.close()
