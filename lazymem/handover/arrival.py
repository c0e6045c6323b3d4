"""What a destination is made of: what its host does for it, what stands in its journal, and how it ended."""

from __future__ import annotations

from typing import Any, Protocol

from msgspec import Struct, structs

from lazymem.handover.states import Destination, after_host_restart

RUNS_UNATTENDED = (
    "the guest runs here, and that could not be written to the disk: start lazymem receive again, and do not take it "
    "back at its source, where it stands"
)


class Host(Protocol):
    """What this host does for a hand-over. All may block, and are called from threads."""

    def is_mounted(self) -> bool:
        """Whether the mount of the RAM answers."""
        ...

    def read_ahead(self, pages: list[int]) -> None:
        """Have those of the RAM brought. Does not wait for them."""
        ...

    def is_whole(self) -> bool:
        """Whether every page of the RAM is here."""
        ...

    def maybe_not_kept(self) -> str | None:
        """Why the mount cannot keep pages at present; None: it can, or was not asked."""
        ...

    def figures(self) -> dict[str, Any]:
        """Of the mount: bytes, faults, waiting."""
        ...

    def maybe_exit_code(self) -> int | None:
        """The emulator's, once it has ended."""
        ...

    def maybe_reader(self) -> str | None:
        """Who else than the emulator has the RAM open, if anybody: a lazymem send that hands the guest on."""
        ...

    def complaint(self) -> str:
        """The last that the emulator said."""
        ...

    def end_emulator(self) -> None: ...


class Arriving(Struct):
    """What stands in a destination's journal. `runs`: it did at its source, and else is left standing here, too. `ran`:
    the guest was let run, and whoever stops it since has reasons. `began`: when the hand-over did (monotonic, which all
    processes of a boot share, and no guest outlives one), `ran_at`: when the guest was let run. `boot_id`: of which
    boot that is; empty in a record of an earlier lazymem. `candidates`: a folder that a killed process may have left;
    `warmed_bytes`, `warmed_seconds`: of the pages that came ahead of the guest."""

    source: str
    mountpoint: str
    monitor: str
    sockets: str
    emulator_pid: int
    emulator_began: str
    ram_bytes: int
    began: float = 0.0
    state_bytes: int = 0
    runs: bool = True
    ran: bool = False
    downtime_seconds: float | None = None
    over: bool = False
    boot_id: str = ""
    ran_at: float | None = None
    candidates: str = ""
    warmed_bytes: int = 0
    warmed_seconds: float = 0.0


def after_restart(found: Arriving, state: Destination) -> tuple[Arriving, Destination] | None:
    """What is left to be done of a record that was written before this host was started anew, and what its state means
    since then; None: nothing.

    Emulator and mount have gone with that, whatever process has the number now: a guest that was not decided never ran
    here, and its source is to hear so; one that was is dead, and nobody but its user knows what its source is to do.
    """
    if state is Destination.YIELDED:
        return None
    return structs.replace(found, monitor="", emulator_pid=0, emulator_began=""), after_host_restart(state)


class Outcome(Struct, frozen=True):
    """How it ended: the state, a reason, and the emulator's exit code where it ran the guest to its end."""

    state: Destination
    text: str
    exit_code: int | None
