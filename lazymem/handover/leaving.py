"""The guest at the source: what is refused, how its device state leaves, and how it goes on or ends. Blocking.

The emulator sends while the guest runs, so the blocks that no file backs go before the stop; it stops the guest itself
for the last pass and the devices.

STOP comes too early to read the RAM: QEMU emits it in do_vm_stop and only then waits for its disks' requests, which may
still write to RAM. It holds its big lock from there until all of the state is handed to the socket, and answers no
command that came meanwhile. So the answer to one that was sent after STOP came says that the RAM is what the state
belongs to.

To QEMU 300 ms of a pass after the stop are good enough; here it begins with 10 ms and allows more only when a guest
that writes to such a block (a framebuffer) would never be done otherwise. One that `loses_writes` makes a single pass
while the guest runs, whatever is left then.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from lazymem.errors import MonitorError, RamFileError, SnapshotError
from lazymem.handover.screenahead import TURN_SECONDS, ScreenAhead
from lazymem.snapshot.manifest import MANIFEST_NAME
from lazymem.vm import emulator
from lazymem.vm.emulator import RamBacking
from lazymem.vm.identity import maybe_mount_run
from lazymem.vm.migrationsettings import MigrationSettings, read, set_back, set_capabilities
from lazymem.vm.qemurecorded import with_generation
from lazymem.vm.qmpclient import CommandError, QmpClient
from lazymem.vm.savestate import CAPABILITY, LEAVE_UNSYNCED, abandon, loses_writes, set_downtime_limit

_EVENTS = "events"
"""QEMU's capability to tell of a migration's end by itself; lazymem-vm always does."""

_DOWNTIME_LIMITS_MS = ((0.0, 10), (5.0, 50), (15.0, 300))
"""From so many seconds after the begin on, a last pass of so long is good enough. 300 is QEMU's own."""

_CONNECTION = "lazymem-state"
"""What the emulator knows the connection as that takes its state."""

_LOOK_SECONDS = 0.5
"""Between two looks at a migration that tells nothing."""

STALLED_SECONDS = 120.0
"""A state of some MiB that takes longer will never be done: the guest stands, or writes faster than the link takes."""

_ENDED = ("failed", "cancelled")
_SAVES_LAST_PASS = ("finish-migrate", "postmigrate")


class Look(Struct, frozen=True):
    """The guest before it is touched. `emulator`: as in a snapshot's manifest."""

    ram: RamBacking
    was_running: bool
    emulator: dict[str, Any]


class LeavingGuest:
    """One guest at its monitor, which is this object's alone. One thread at a time."""

    def __init__(self, monitor: Path) -> None:
        """
        Raises:
            MonitorError: nobody is there, or it is busy with another client.
        """
        self.monitor = monitor
        self._qmp = QmpClient(monitor)
        self._has_limit = False
        self._one_pass = False

    def close(self) -> None:
        self._qmp.close()

    @property
    def peer_uid(self) -> int:
        return self._qmp.peer_uid

    def look(self, *, disks_handled: bool, came_back: bool = False) -> Look:
        """Everything that can be refused is refused here, before the guest notices anything.

        `came_back`: it is known that a migration that it stands after has come to nothing.

        Raises:
            LazymemError: with the reason.
        """
        state = emulator.run_state(self._qmp)
        if state == "postmigrate" and not came_back:
            raise MonitorError(
                "the guest was sent elsewhere and may run there: it stands since its migration (postmigrate), and what "
                "became of that is not in this journal. If it is nowhere else, let it go on first (cont)"
            )
        emulator.refuse_other_migration(self._qmp)
        emulator.refuse_incapable(self._qmp)
        ram = emulator.ram_backing(self._qmp)
        _check_ram(ram)
        disks = emulator.writable_disks(self._qmp)
        if disks and not disks_handled:
            raise SnapshotError(
                f"the guest has writable disks, which do not move with it: {', '.join(disks)}. If the destination has "
                "them, too (shared storage), say --disks-handled"
            )
        described = to_builtins(emulator.describe(self._qmp))
        described["options"] = with_generation(described["options"], self._maybe_generation())
        return Look(ram, state == "running", described)

    def _maybe_generation(self) -> str | None:
        try:
            return str(self._qmp.command("query-vm-generation-id").get("guid"))
        except CommandError:  # a guest without the device, or lazymem-vm
            return None

    def settings(self) -> MigrationSettings:
        """Of its migrations, as far as `send` changes them."""
        return read(self._qmp, (CAPABILITY, _EVENTS, LEAVE_UNSYNCED))

    def maybe_take(self, end: socket.socket) -> str | None:
        """Let the emulator have that end of a connection; the URI for it. None: it takes none.

        Raises:
            MonitorError: the emulator is gone.
        """
        try:
            self._qmp.give(_CONNECTION, end.fileno())
        except CommandError:  # lazymem-vm, or a monitor that others hand on
            return None
        return f"fd:{_CONNECTION}"

    def send(
        self,
        uri: str,
        before: MigrationSettings,
        on_stopped: Callable[[float], None],
        on_stop: Callable[[], None] = lambda: None,
        maybe_ahead: ScreenAhead | None = None,
    ) -> float:
        """Let it send its state to `uri`; returns once all is sent and the guest stands. `on_stopped` is called as soon
        as nothing writes to its RAM any more, with the moment since when the guest stands by the emulator's clock; that
        is also what is returned. `on_stop` is called before that, when the guest may stand. `before`: its `settings`,
        which are changed now and are on the disk by now, so that whoever lets the guest go on can set them back.
        `maybe_ahead`: sends pages of a screen that is written all the time ahead of the stop.

        Raises:
            MonitorError: it did not, with the reason; the guest may stand, see `go_on`.
        """
        self._qmp.take_events()
        try:
            self._prepare(before)
            if maybe_ahead is not None and self._one_pass:
                maybe_ahead.prepare(self._qmp)
            self._qmp.command("migrate", uri=uri)
        except CommandError:
            if uri.startswith("fd:"):  # else it would keep that connection, unless it refused it just now
                with suppress(MonitorError):
                    self._qmp.command("closefd", fdname=_CONNECTION)
            raise
        begun = looked = time.monotonic()
        stopped: float | None = None
        while True:
            if maybe_ahead is not None:
                maybe_ahead.run_if_held()
            is_awaited = maybe_ahead is not None and maybe_ahead.is_awaited
            event = self._qmp.next_event(TURN_SECONDS if is_awaited else _LOOK_SECONDS)
            now = time.monotonic()
            if now - begun > STALLED_SECONDS:
                raise MonitorError(f"the emulator's state was not sent within {STALLED_SECONDS:.0f} s")
            # Somebody else's STOP, or a disk's, is followed by a guest that writes on: only the save's own counts.
            is_stop = event is not None and event.name == "STOP" and stopped is None
            if is_stop:
                on_stop()
            if event is not None and is_stop and self._status_of_guest() in _SAVES_LAST_PASS:
                stopped = event.seconds
                on_stopped(stopped)
            told = event is not None and event.name == "MIGRATION"
            if told or now - looked >= _LOOK_SECONDS:  # a guest may make events without end
                status = str(event.data.get("status")) if event is not None and told else self._status()
                looked = now
                if status == "completed":
                    break
                if status in _ENDED:
                    raise MonitorError(f"the emulator could not send its state: {self._reason()}")
                self._allow_longer(now - begun)
        if stopped is None:
            self._qmp.command("query-status")
            stops = [event.seconds for event in self._qmp.take_events() if event.name == "STOP"]
            stopped = stops[0] if stops else time.time()
        on_stopped(stopped)
        return stopped

    def _status_of_guest(self) -> str:
        """Answered only when nothing of the guest writes any more, its disks' requests included."""
        return str(self._qmp.command("query-status")["status"])

    def _prepare(self, before: MigrationSettings) -> None:
        set_capabilities(self._qmp, dict.fromkeys(before.capabilities, True))
        self._has_limit = before.downtime_limit is not None
        self._one_pass = loses_writes(self._qmp)
        self._allow_longer(0.0)

    def _allow_longer(self, seconds: float) -> None:
        if not self._has_limit:
            return  # lazymem-vm: one pass while the guest runs, and a comparison when it stands
        limit = max(allowed for since, allowed in _DOWNTIME_LIMITS_MS if since <= seconds)
        set_downtime_limit(self._qmp, 0 if self._one_pass else limit)

    def _status(self) -> str:
        return str((self._qmp.command("query-migrate") or {}).get("status"))

    def _reason(self) -> str:
        answer = self._qmp.command("query-migrate") or {}
        return str(answer.get("error-desc", answer.get("status", "it does not say why")))

    @property
    def pid(self) -> int | None:
        return self._qmp.peer_pid

    def go_on(self, *, run: bool, before: MigrationSettings | None) -> str | None:
        """As it was before: no migration, its settings (`before`; None: they were not changed), and (`run`) the guest
        runs. Returns why its settings are not what they were, if they are not.

        One that stands for another reason than a migration goes on standing.

        Raises:
            MonitorError: the emulator is gone, or says no.
        """
        abandon(self._qmp)
        maybe_refusal = None if before is None else self.set_back(before)
        if run and self._qmp.command("query-status")["status"] == "postmigrate":
            self._qmp.command("cont")
        return maybe_refusal

    def set_back(self, before: MigrationSettings) -> str | None:
        """Its settings, once no migration is under way. Returns why they are not what they were, if they are not.

        Raises:
            MonitorError: the emulator is gone.
        """
        try:
            set_back(self._qmp, before)
        except CommandError as error:
            return str(error)
        return None

    def quit(self) -> None:
        """End the emulator. It may end before it has answered, or be gone already."""
        with suppress(MonitorError):
            self._qmp.command("quit")


def _check_ram(ram: RamBacking) -> None:
    if not ram.share:
        raise RamFileError(f"the guest maps {ram.path} with share=off, so its RAM is not in that file: use share=on")
    size = os.stat(ram.path).st_size
    if size != ram.size_bytes:
        raise RamFileError(f"the RAM file {ram.path} has {size} bytes, the guest's RAM {ram.size_bytes}: not the same")
    if maybe_mount_run(ram.path) is None and (ram.path.parent / MANIFEST_NAME).exists():
        raise RamFileError(
            f"the guest runs directly on the RAM of the snapshot {ram.path.parent} and has changed it: run guests from "
            "a lazymem-mount of it, or from a copy of its pc.ram"
        )
