"""A source of a hand-over without an emulator, pages or a network, and a disk that refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lazymem.errors import MonitorError, StoreError
from lazymem.handover import messages
from lazymem.handover.departure import Leaving
from lazymem.handover.journal import Journal, Record
from lazymem.handover.sending import Sender
from lazymem.vm.migrationsettings import MigrationSettings

OLD = "00" * 16


BEFORE = MigrationSettings({"x-ignore-shared": False, "events": True}, 300)


class Guest:
    def __init__(self, error: MonitorError | None = None, *, refusal: str | None = None) -> None:
        """`refusal`: of its settings."""
        self._error = error
        self._refusal = refusal
        self.went_on = 0
        self.set_to: list[MigrationSettings] = []

    def settings(self) -> MigrationSettings:
        return BEFORE

    def set_back(self, before: MigrationSettings) -> str | None:
        self.set_to.append(before)
        return self._refusal

    def go_on(self, *, run: bool, before: MigrationSettings | None) -> str | None:
        self.went_on += run
        if self._error is not None:
            raise self._error
        return None if before is None else self.set_back(before)


class Pages:
    def publish(self, name: str, ram: Any) -> None:
        ram.close()

    def look_again(self) -> None:
        pass


def hello(handover: str = "") -> messages.Hello:
    return messages.Hello(messages.VERSION, "another host", handover)


def leaving_in(folder: Path) -> Leaving:
    ram = folder / "ram"
    ram.touch()
    os.truncate(ram, 1 << 20)
    return Leaving("127.0.0.1:1", "/qmp", str(ram), 1 << 20, {"name": "qemu"}, True, "boot", 1)


def sender(journal: Journal, guest: Guest, leaving: Leaving, look: Callable[[], Leaving] | None = None) -> Sender:
    made = cast(Any, Sender)
    found: Sender = made(journal, guest, leaving, Pages(), lambda _: None, maybe_look=look)
    return found


class Disk(Journal):
    """Refuses so many decisions of that state. `kept`: what is refused is read all the same."""

    def refuse(self, state: str, times: int, *, kept: bool) -> None:
        self._refused, self._times, self._kept = state, times, kept

    def write(self, handover: str, state: str, details: dict[str, Any]) -> Record:
        if state == getattr(self, "_refused", None) and self._times:
            self._times -= 1
            sequence = self._sequence
            if self._kept:
                super().write(handover, state, details)
            self._sequence = sequence
            raise StoreError("the disk is full")
        return super().write(handover, state, details)
