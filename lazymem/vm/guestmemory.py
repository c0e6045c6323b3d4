"""Reads a running guest's physical memory over its monitor (`pmemsave`), and says where its displays have theirs.

The emulator writes into a memfd that it was given, which it opens by its own name for it. So there is no file that
would have to be removed, or could be another one than ours: who does not have that descriptor is not asked.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import QmpClient

_NAME = "lazymem-screen"
"""The emulator's for the descriptor; one that a killed process has left there is replaced."""

_DISPLAY = 0x03
"""A PCI device's base class (PCI Code and ID Assignment Specification)."""


_READ_SECONDS = 0.01
"""For an answer that takes 0.4 to 1.1 ms. An emulator that has stopped its guest meanwhile has none until all of its
state is taken from it, and whoever asks may be what that waits for."""


def displays(qmp: QmpClient) -> list[tuple[int, int]]:
    """The guest-physical address and the size of each region of memory that a display has by PCI.

    Raises:
        MonitorError: the emulator is gone, or does not say.
    """
    devices = [device for bus in qmp.maybe_command("query-pci") or [] for device in bus.get("devices", [])]
    regions = [r for device in devices if device["class_info"]["class"] >> 8 == _DISPLAY for r in device["regions"]]
    return [(r["address"], r["size"]) for r in regions if r["type"] == "memory" and r["address"] > 0]


class GuestMemory:
    """For one thread. The emulator answers nothing else while it reads: 0.4 ms, and 0.6 for a MiB."""

    def __init__(self, qmp: QmpClient, patience_seconds: float = _READ_SECONDS) -> None:
        """`patience_seconds`: for each answer to `read`, and to `close`.

        Raises:
            MonitorError: the emulator takes no descriptor, or is gone.
            OSError: what it has cannot be seen from here (another user's, or in a container).
        """
        self._qmp = qmp
        self._patience_seconds = patience_seconds
        name = f"lazymem-{secrets.token_hex(8)}"
        self._file = os.memfd_create(name)
        try:
            qmp.give(_NAME, self._file)
            self._path = f"/proc/self/fd/{_number(qmp.peer_pid, name)}"
        except BaseException:
            self.close()
            raise

    def read(self, address: int, size: int) -> bytes:
        """
        Raises:
            MonitorError: the emulator refused it, does not answer in time, or is gone.
        """
        self._ask("pmemsave", val=address, size=size, filename=self._path)
        data = os.pread(self._file, size, 0)
        if len(data) != size:
            raise MonitorError(f"the emulator has written {len(data)} of {size} bytes of its guest's memory")
        return data

    def close(self) -> None:
        """Also where the emulator is gone, or has none of it. One that does not answer in time closes it later, and
        before whatever it is asked next."""
        with suppress(MonitorError):
            self._ask("closefd", fdname=_NAME)
        os.close(self._file)

    def _ask(self, command: str, **arguments: int | str) -> None:
        before = self._qmp.patience(self._patience_seconds)
        try:
            self._qmp.command(command, **arguments)
        finally:
            self._qmp.patience(before)


def _number(maybe_pid: int | None, name: str) -> str:
    """Of the memfd in that process."""
    folder = f"/proc/{maybe_pid}/fd"
    for number in os.listdir(folder):
        with suppress(FileNotFoundError):  # it was closed just now
            if os.readlink(f"{folder}/{number}").startswith(f"/memfd:{name}"):
                return number
    raise FileNotFoundError(f"{folder} has no {name}")
