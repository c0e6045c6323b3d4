"""What a killed `lazymem snapshot` leaves, taken back at a monitor that others have; all of it: `test_snapshot`."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lazymem.errors import MonitorError
from lazymem.vm import undoing
from lazymem.vm.migrationsettings import MigrationSettings
from lazymem.vm.qmpclient import QmpClient
from lazymem.vm.savestate import CAPABILITY
from lazymem.vm.undoing import Change, undo
from tests.support.fakeemulator import Behaviour, FakeEmulator, fake_emulator
from tests.support.vmprocess import WAIT_SECONDS

CHANGE = Change(MigrationSettings({CAPABILITY: False}), was_running=True, saves=True)


@pytest.fixture
def stands(tmp_path: Path) -> Iterator[FakeEmulator]:
    """A guest that stands, of an emulator whose monitor serves one client at a time."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(1 << 20))
    with tempfile.TemporaryDirectory() as sockets:
        behaviour = Behaviour(f"{sockets}/qmp", str(ram), 1 << 20, status="paused")
        with fake_emulator(behaviour, tmp_path) as fake:
            yield fake


def test_who_has_the_monitor_is_waited_for(stands: FakeEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0
    tried_often = threading.Event()

    def connect(path: Path) -> QmpClient:
        nonlocal tries
        tries += 1
        if tries == 3:
            tried_often.set()
        return QmpClient(path, 0.05 if tries < 3 else WAIT_SECONDS)

    with QmpClient(stands.qmp) as other:
        monkeypatch.setattr(undoing, "QmpClient", connect)
        waits = threading.Thread(target=partial(undo, stands.qmp, CHANGE))
        waits.start()
        assert tried_often.wait(WAIT_SECONDS)
        assert other.command("query-status")["status"] == "paused"
    waits.join(WAIT_SECONDS)
    assert not waits.is_alive()
    assert stands.runs()


def test_an_emulator_that_has_gone_is_not(tmp_path: Path) -> None:
    with pytest.raises(MonitorError):
        undo(tmp_path / "qmp", CHANGE)
