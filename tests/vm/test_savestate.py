"""A save of a real lazymem-vm at which a `lazymem send` was before that was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymem.vm.guests import build_guest
from lazymem.vm.savestate import LEAVE_UNSYNCED, let_go_on, ram_left_out, save_device_state
from tests.support.vmprocess import Start

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

RAM_MIB = 8

SYNCWATCH = Path(__file__).parents[1] / "support" / "syncwatch"


@pytest.mark.parametrize("was_killed_just_then", [False, True])
def test_its_ram_file_is_on_the_disk_whatever_was_asked_for_before(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, was_killed_just_then: bool
) -> None:
    """A hand-over sets that its save does not wait for that. The next save is another one, if it was killed before its
    own."""
    syncs = tmp_path / "syncs"
    monkeypatch.setenv("LAZYMEM_TEST_SYNCS", str(syncs))
    monkeypatch.setenv("PYTHONPATH", f"{SYNCWATCH}:{Path(__file__).parents[2]}")
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    guest = start("--pcram-file", ram, "-kernel", build_guest("heartbeat", tmp_path))
    guest.wait_ticks(2)
    with guest.qmp() as qmp:

        def is_unsynced() -> bool:
            entries = qmp.command("query-migrate-capabilities")
            return next(bool(entry["state"]) for entry in entries if entry["capability"] == LEAVE_UNSYNCED)

        if was_killed_just_then:
            left = [{"capability": LEAVE_UNSYNCED, "state": True}]
            qmp.command("migrate-set-capabilities", capabilities=left)
        assert is_unsynced() is was_killed_just_then
        with ram_left_out(qmp):
            assert not is_unsynced()
            save_device_state(qmp, guest.monitor, tmp_path / "vmstate")
        let_go_on(qmp)
    synced = [line.split(" ", 3)[3] for line in syncs.read_text().splitlines()]
    assert str(ram) in synced
    count = len(guest.ticks())
    guest.wait_ticks(count + 1)
