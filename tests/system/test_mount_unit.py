"""A mount's unit whose supervisor and daemon are killed at moments that one has to choose; its systemd is a stand-in.
With a real one, whatever the moment: `test_units_started`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from lazymem.fs.descriptorstore import FUSE, LOCK, RECORD, STATE, UPPER
from tests.support import skips
from tests.support.mounts import Stage, drop_kernel_cache, wait_until
from tests.support.mountunit import MountUnit
from tests.support.snapshots import BuiltSnapshot
from tests.support.standinsystemd import StandInSystemd

pytestmark = [pytest.mark.system, skips.needs_resend]

KEPT = (RECORD, LOCK, STATE, UPPER, FUSE)
"""In this order."""


@pytest.fixture
def unit(mounts: Stage, snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch) -> Iterator[MountUnit]:
    address = mounts.serve(snapshot.folder).address  # which is no service
    with contextlib.closing(StandInSystemd(mounts.folder, monkeypatch)) as systemd:
        made = MountUnit(systemd, address, mounts.folder / "mnt", "--prefetch", "none", cache=mounts.cache)
        try:
            yield made
        finally:
            made.clean_up()


def check(unit: MountUnit, expected: bytes) -> None:
    drop_kernel_cache(unit.ram_path)
    assert unit.ram_path.read_bytes() == expected


@pytest.mark.parametrize("heard", [*KEPT, "READY"])
def test_a_supervisor_that_told_nobody_what_it_heard(unit: MountUnit, snapshot: BuiltSnapshot, heard: str) -> None:
    """Killed between the daemon's words and its own to systemd. The next one hears them again: so it may be killed as
    well, and the daemon too, and nothing is lost."""
    unit.start(dies_at=heard)
    assert unit.process.wait(30) == -signal.SIGKILL
    first = unit.wait_served(restarts=0)
    unit.systemd.look()
    assert (heard in unit.systemd.kept, unit.systemd.said) == (False, [])
    with open(unit.ram_path, "r+b", buffering=0) as ram:
        ram.write(b"guest")
    unit.start()
    unit.wait_told_ready(1)
    assert set(unit.systemd.kept) == {*KEPT, f"control-{first}", f"predecessor-{first}"}
    unit.kill()
    os.kill(first, signal.SIGKILL)
    unit.start()
    second = unit.wait_served(restarts=1)
    unit.wait_told_ready(2)
    check(unit, b"guest" + snapshot.ram[5:])
    os.kill(second, signal.SIGKILL)
    unit.wait_served(restarts=2)
    check(unit, b"guest" + snapshot.ram[5:])


@pytest.mark.parametrize("telling", ["predecessor-", "control-", "control-+"])
def test_a_supervisor_that_is_killed_over_a_hand_over(unit: MountUnit, snapshot: BuiltSnapshot, telling: str) -> None:
    """Its next daemon has not begun, and does not begin later: a third supervisor starts one."""
    unit.start()
    unit.wait_told_ready(1)
    unit.kill()
    os.kill(unit.status()["pid"], signal.SIGKILL)
    unit.start(dies_at=telling)
    wait_until(unit.has_ended, "it is killed")
    assert unit.process.wait() == -signal.SIGKILL
    unit.start()
    unit.wait_served(restarts=1)
    check(unit, snapshot.ram)
    assert unit.process.poll() is None, "it did not take the one before for one that does not start"
