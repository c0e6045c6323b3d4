"""The guest at the destination: an emulator that waits, gets its device state, and runs when it is told. Blocking."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import QmpClient

_POLL_SECONDS = 0.001
"""Between two looks at a load of which nobody tells: some 0.1 ms of the emulator's time each."""

_LOOK_SECONDS = 0.1
"""The same where the emulator tells of a load's end by itself."""

_RESUME_SECONDS = 1.0
"""From the answer to `cont` to the event that tells when the guest began, which comes with it."""

_EVENTS = "events"
"""QEMU's capability to tell of a migration's end by itself."""

_PATIENT_SECONDS = 1e9
"""The emulator's monitor is silent while a device waits for a page of RAM: as long as the source is away."""

WAITS = "inmigrate"


class NeverToldError(MonitorError):
    """The emulator went away before it was told to let its guest run: it has not run."""


class ArrivingGuest:
    """One emulator's monitor. One thread at a time, but for `close`, which ends what waits."""

    def __init__(self, monitor: Path) -> None:
        """
        Raises:
            MonitorError: nobody is there (yet).
        """
        self._qmp = QmpClient(monitor, timeout_seconds=30)
        self._tells = False

    def close(self) -> None:
        self._qmp.close()

    def status(self) -> str:
        return str(self._qmp.command("query-status")["status"])

    def listen(self, path: Path, seconds: float = 30) -> None:
        """Have it wait for its state on the unix socket `path`; it listens there when this returns.

        Raises:
            MonitorError: refused.
        """
        known = {entry["capability"] for entry in self._qmp.maybe_command("query-migrate-capabilities") or []}
        if _EVENTS in known:
            self._qmp.command("migrate-set-capabilities", capabilities=[{"capability": _EVENTS, "state": True}])
            self._tells = True
        self._qmp.command("migrate-incoming", uri=f"unix:{path}")
        deadline = time.monotonic() + seconds
        while not path.exists():
            self._refuse_failed()
            if time.monotonic() > deadline:
                raise MonitorError(f"the emulator does not wait for its state on {path}")
            time.sleep(_POLL_SECONDS)

    def wait_loaded(self) -> None:
        """Until it has its state, and stands.

        Raises:
            MonitorError: it could not load it; QEMU ends then, its reason on its own stderr.
        """
        self._qmp.patience(_PATIENT_SECONDS)
        while (status := self.status()) == WAITS:
            self._refuse_failed()
            self._wait_told()
        if status == "running":
            raise MonitorError("the emulator runs the guest without being told to: was it started with -S?")

    def _wait_told(self) -> None:
        """A while, or until the emulator tells how its load ended."""
        if not self._tells:
            time.sleep(_POLL_SECONDS)
            return
        deadline = time.monotonic() + _LOOK_SECONDS
        while (seconds := deadline - time.monotonic()) > 0:
            event = self._qmp.next_event(seconds)
            if event is not None and event.data.get("status") in ("completed", "failed"):
                return

    def has_state(self) -> bool:
        """Whether it got it. Waits for a load that is under way.

        Raises:
            MonitorError: the emulator is gone, or says no.
        """
        self._qmp.patience(_PATIENT_SECONDS)
        while self.status() == WAITS:
            if self._load_status() != "active":
                return False
            time.sleep(_POLL_SECONDS)
        return self.status() in ("paused", "running")

    def _load_status(self) -> str | None:
        maybe_status = (self._qmp.command("query-migrate") or {}).get("status")
        return None if maybe_status is None else str(maybe_status)

    def _refuse_failed(self) -> None:
        answer = self._qmp.command("query-migrate") or {}
        if answer.get("status") == "failed":
            raise MonitorError(f"the emulator could not load its state: {answer.get('error-desc', 'no reason given')}")

    def run(self) -> float:
        """Let the guest run, if it does not; when it began, by the emulator's clock (Unix time).

        Raises:
            NeverToldError: the emulator is gone.
            MonitorError: it went away meanwhile, or says no.
        """
        try:
            is_running = self.status() == "running"
        except MonitorError as error:
            raise NeverToldError(str(error)) from error
        if is_running:
            return time.time()
        self._qmp.take_events()
        self._qmp.patience(_PATIENT_SECONDS)  # a device that starts may want a page, too
        self._qmp.command("cont")
        deadline = time.monotonic() + _RESUME_SECONDS
        while (seconds := deadline - time.monotonic()) > 0:
            event = self._qmp.next_event(seconds)
            if event is not None and event.name == "RESUME":
                return event.seconds
        return time.time()

    def stop(self) -> None:
        self._qmp.command("stop")

    def quit(self) -> None:
        with suppress(MonitorError):
            self._qmp.command("quit")

    @property
    def emulator_pid(self) -> int | None:
        return self._qmp.peer_pid


def maybe_arrived(monitor: Path) -> ArrivingGuest | None:
    """The monitor of an emulator that an earlier process started, if it still answers."""
    with suppress(MonitorError):
        return ArrivingGuest(monitor)
    return None


def has_state(guest: ArrivingGuest) -> bool:
    """Whether a load that an earlier process began is ended, all of it. Waits for one that is under way.

    Raises:
        MonitorError: the emulator went away.
    """
    return guest.has_state()


def boot_id() -> str:
    """Which boot of which host this is."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{os.uname().nodename}"
