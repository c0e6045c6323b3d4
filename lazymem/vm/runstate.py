"""The machine under a monitor: run state in QEMU's words, stop and cont one at a time, events to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from lazymem.errors import MonitorError
from lazymem.vm.devicestate import Stateful
from lazymem.vm.ram import RamBlocks

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called on trio's thread with an event's name and data; must not block."""

ENDED = ("shutdown", "internal-error", "guest-panicked")
"""States of a machine that will not run again."""


class MachineLike(Protocol):
    """What this room needs of a machine (vm/machine.py). All of it may be called from any thread."""

    @property
    def blocks(self) -> RamBlocks: ...

    @property
    def run_state(self) -> str:
        """running, paused, prelaunch, or one of ENDED."""
        ...

    def start(self) -> None:
        """The vCPU runs when this returns; running already is fine, and a stop that still waits is taken back."""
        ...

    def stop(self) -> object:
        """Returns when the vCPU stands: blocks, without bound while it waits for a page. Standing already is fine."""
        ...

    def stateful(self) -> Sequence[Stateful]:
        """CPU and devices, in the order in which they are saved and loaded."""
        ...


class RunState:
    """`status` is the machine's own state, unless the monitor knows more (inmigrate, postmigrate, finish-migrate)."""

    def __init__(self, machine: MachineLike, *, incoming: bool = False) -> None:
        self.machine = machine
        self._overlay: str | None = "inmigrate" if incoming else None
        self._listeners: list[Listener] = []
        self._lock = trio.Lock()
        # Its own: stops that were abandoned (each waits for its page in a thread) must not use up everybody's threads.
        self._stops = trio.CapacityLimiter(1)

    @property
    def status(self) -> str:
        # A guest that crashed while it was saved is crashed, whatever the save says.
        own = self.machine.run_state
        return own if self._overlay is None or own in ENDED else self._overlay

    @property
    def running(self) -> bool:
        return self.status == "running"

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell every listener. On trio's thread."""
        for listener in list(self._listeners):
            listener(name, data or {})

    async def stop(self, overlay: str | None = None) -> str:
        """The guest stands when this returns; it may wait for a page. Returns the status before.

        `overlay`: the status from then on, for a save. Cancelled: a save's stop is taken back, another one's takes
        effect a little later.
        """
        async with self._lock:
            before = self.status
            if before != "running":
                if overlay is not None:
                    self._overlay = overlay
                return before
            try:
                # Abandoned on cancellation, since a quit must not wait for a page that never comes.
                await trio.to_thread.run_sync(self.machine.stop, abandon_on_cancel=True, limiter=self._stops)
            except trio.Cancelled:
                if overlay is not None:
                    self.machine.start()
                raise
            self._overlay = overlay
            self.emit("STOP")
            return before

    async def cont(self) -> None:
        """Let the guest run.

        Raises:
            MonitorError: it has ended, or its state is still coming in or going out.
        """
        async with self._lock:
            status = self.status
            if status == "running":
                return
            if status in ENDED:
                raise MonitorError(f"the guest has ended ({status}) and cannot go on")
            if status == "inmigrate":
                raise MonitorError("the guest's state has not come in yet")
            if status == "finish-migrate":
                raise MonitorError("the guest's state is being saved")
            self._start()

    async def resume_after_save(self) -> None:
        """A save that stopped the guest failed: it goes on."""
        async with self._lock:
            if self.machine.run_state in ENDED:
                self._overlay = None
            else:
                self._start()

    def arrived(self, *, run: bool) -> None:
        """The state came in whole. `run`: let the guest go on, else it stands paused."""
        if run:
            self._start()
        else:
            self._overlay = "paused"

    def set_overlay(self, overlay: str | None) -> None:
        self._overlay = overlay

    def _start(self) -> None:
        self.machine.start()
        self._overlay = None
        self.emit("RESUME")
