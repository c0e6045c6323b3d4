"""What a snapshot has changed about a guest and its emulator, and how somebody else takes that back. Blocking."""

from __future__ import annotations

import errno
import time
from pathlib import Path

from msgspec import Struct

from lazymem.errors import MonitorError
from lazymem.vm import migrationsettings
from lazymem.vm.migrationsettings import MigrationSettings
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import abandon, let_go_on


class Change(Struct, frozen=True):
    """`before`: what the emulator's migrations were set to. `saves`: a save may have begun, which stops the guest;
    `was_running`: it ran before that."""

    before: MigrationSettings
    was_running: bool
    saves: bool = False


_PATIENCE_SECONDS = 1800.0
"""For whoever stands before us at a monitor that serves one client at a time, as QEMU's does."""

_AGAIN_SECONDS = 0.5

_GONE = frozenset({errno.ENOENT, errno.ECONNREFUSED})


def undo(monitor: Path, change: Change) -> None:
    """For who is told that whoever changed it is gone, and has nothing else to do. Waits for the monitor.

    Raises:
        MonitorError: not all of it could be; what could be, is.
    """
    with _connected(monitor) as qmp:
        try:
            if change.saves:
                abandon(qmp)  # while one is under way nothing can be set
        finally:
            try:
                migrationsettings.set_back(qmp, change.before)
            finally:
                if change.saves and change.was_running:
                    let_go_on(qmp)


def _connected(monitor: Path) -> QmpClient:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return QmpClient(monitor)
        except MonitorError as error:
            is_gone = isinstance(error.__cause__, OSError) and error.__cause__.errno in _GONE
            if is_gone or time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN_SECONDS)


def ways_by_hand(monitor: Path, error: MonitorError) -> str:
    """In a line, what is left to whoever cannot `undo`."""
    return (
        f"it was killed, and the guest at {monitor} may stand ({error}): `cont` lets it go on; switch x-ignore-shared "
        "off there before a migrate of your own"
    )
