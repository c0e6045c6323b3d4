"""What an emulator's migrations are set to: read before it is changed for a hand-over, and set back. Blocking.

What is left behind is dangerous: a `migrate` of its user's own, with x-ignore-shared on, sends a guest without its RAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import maybe_downtime_limit, set_downtime_limit


class MigrationSettings(Struct, frozen=True):
    """`capabilities`: those that are to be changed, each with whether it is on. `downtime_limit`: milliseconds; None
    where there is no such thing (lazymem-vm)."""

    capabilities: dict[str, bool]
    downtime_limit: int | None = None


def read(qmp: QmpClient, names: Iterable[str]) -> MigrationSettings:
    """As they are now. Of these capabilities those that the emulator has."""
    entries = qmp.maybe_command("query-migrate-capabilities") or []
    states = {entry["capability"]: bool(entry["state"]) for entry in entries}
    return MigrationSettings({name: states[name] for name in names if name in states}, maybe_downtime_limit(qmp))


def set_capabilities(qmp: QmpClient, states: Mapping[str, bool]) -> None:
    qmp.command(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in states.items()],
    )


def set_back(qmp: QmpClient, before: MigrationSettings) -> None:
    """What was switched on is off again, if it was; the downtime limit is what it was.

    Raises:
        MonitorError: not all of it could be; what could be, is.
    """
    try:
        if off := {name: False for name, was_on in before.capabilities.items() if not was_on}:
            set_capabilities(qmp, off)
    finally:
        if before.downtime_limit is not None:
            set_downtime_limit(qmp, before.downtime_limit)
