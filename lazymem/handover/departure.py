"""What a source is made of: what serves its pages, what stands in its journal, and how it ended."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec import Struct, convert, field

from lazymem.handover.journal import Record
from lazymem.handover.states import Source
from lazymem.snapshot.liveram import LiveRam
from lazymem.vm.migrationsettings import MigrationSettings


class PageServer(Protocol):
    """What serves pages, over the same address."""

    def publish(self, name: str, ram: LiveRam) -> None:
        """Under this name and no other; closes `ram` at its end."""
        ...

    def look_again(self) -> None: ...


class Leaving(Struct):
    """What stands in a source's journal. `stopped`: when the guest stood, by its emulator's clock. `over`: nothing is
    left to do; `told`: and a command that came later has found that, whose own hand-over is another one. `void`: as
    `offers.Offers.void`. `settings_before`: of the emulator's migrations, as long as they may be changed for this
    hand-over; there before they are. `reclaimed`: it is here because its user has taken it back."""

    address: str
    monitor: str
    ram_path: str
    ram_bytes: int
    emulator: dict[str, Any]
    was_running: bool
    boot_id: str
    emulator_pid: int | None = None
    signature: list[int] = field(default_factory=list)
    stopped: float = 0.0
    state_bytes: int = 0
    over: bool = False
    told: bool = False
    void: list[str] = field(default_factory=list)
    settings_before: MigrationSettings | None = None
    reclaimed: bool = False


def void_of(found: Record) -> list[str]:
    """The hand-overs of which a source's journal tells that they came to nothing, that of the record among them."""
    known = convert(found.details.get("void", []), list[str])
    is_void = found.state == Source.OURS.value and found.handover != ""
    return [*known, found.handover] if is_void else known


class Outcome(Struct, frozen=True):
    """How it ended. `report`: the receiver's figures. `stands`: why a guest that is here does not go on."""

    state: Source
    text: str
    report: dict[str, Any] = {}
    stands: str | None = None
