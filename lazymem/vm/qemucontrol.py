"""A QEMU of ours, spoken to over its own monitor's socket: made ready for RAM that is a file, and given its state.

The state goes in by a socket, not by a name: QEMU loads the bytes that were checked, no version needs a shell or
`file:` for it, and nothing in a path has to be quoted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

from lazymem.errors import EnvironmentRefusedError, MonitorError, SaveStreamError
from lazymem.vm.qmpclient import CommandError, QmpClient
from lazymem.vm.savestate import CAPABILITY

MAGIC = b"QEVM"

_PATIENT_SECONDS = 1e9
"""QEMU's monitor is silent while the device that it loads waits for a page of RAM, which may take as long as a server
is away (rule 7). A QEMU that ends closes the socket."""

_POLL_SECONDS = (0.002, 0.1)
"""Between two looks at a state that loads: the first, and the longest. They double."""


class Control:
    """The monitor of one QEMU, over a connected socket that it then owns.

    Raises:
        MonitorError: what is at the other end ended, or is no QEMU.
        EnvironmentRefusedError: it cannot leave shared RAM out of a state.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._qmp = QmpClient(Path("QEMU's monitor"), _PATIENT_SECONDS, connection=connection)
        self._set_capability()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._qmp.close()

    def _set_capability(self) -> None:
        """For the load, and so that a save by whatever monitor leaves the RAM file's pages out."""
        try:
            self._qmp.command("migrate-set-capabilities", capabilities=[{"capability": CAPABILITY, "state": True}])
        except CommandError as error:
            raise EnvironmentRefusedError(
                f"this QEMU cannot leave RAM that is a file out of its saved state ({CAPABILITY}): {error.description}"
            ) from error

    def load(self, feed: Feed) -> str:
        """Gives QEMU its state; returns the guest's run state once it has it: running, or paused.

        Raises:
            MonitorError: refused. QEMU ends then by itself, its reason on its own stderr.
        """
        feed.start()
        self._qmp.command("migrate-incoming", uri=f"fd:{feed.descriptor}")
        pause, longest = _POLL_SECONDS
        while (status := str(self._qmp.command("query-status")["status"])) == "inmigrate":
            told = self._qmp.command("query-migrate") or {}
            if told.get("status") == "failed":
                raise MonitorError(f"QEMU could not load its state: {told.get('error-desc', 'it does not say why')}")
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return status


class Feed:
    """A state on its way into a QEMU: `far_end` is what the child inherits, under the number `descriptor`."""

    def __init__(self, state: bytes) -> None:
        self._state = state
        self._near, self.far_end = socket.socketpair()
        self.descriptor = self.far_end.fileno()

    def start(self) -> None:
        threading.Thread(target=self._send, name="state", daemon=True).start()

    def close(self) -> None:
        self._near.close()
        self.far_end.close()

    def _send(self) -> None:
        # QEMU ends in the middle of a state that it refuses, and says why itself.
        with contextlib.suppress(OSError), self._near:
            self._near.sendall(self._state)


def check_magic(state: bytes, where: object) -> None:
    """Raises SaveStreamError for what is no state at all: some versions of QEMU wait for more of it for ever."""
    if not state.startswith(MAGIC):
        raise SaveStreamError(f"{where} is no saved state of QEMU's (it does not begin with {MAGIC.decode()})")
