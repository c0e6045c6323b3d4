"""A QEMU whose guest is handed over and goes on where it was has the migration settings that its user gave it.

Whatever died in between: with x-ignore-shared left on, a migration of the user's own would leave the RAM out, without
a word. The guest is QEMU's firmware, which finds nothing to boot and runs on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import Qemu, started
from lazymem.vm.qmpclient import QmpClient
from tests.support.handover import Pair, pair
from tests.support.vmprocess import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_BYTES = 32 << 20

LIMIT_MS = 123
"""Neither QEMU's nor a hand-over's."""

MONITORS = ("watch", "settings")
"""The tests' own, beside that for the command: each serves one client."""


@pytest.fixture
def qemu(tmp_path: Path, sockets: Path) -> Iterator[Qemu]:
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_BYTES)
    more = tuple(word for name in MONITORS for word in _monitor(sockets / name))
    with started(QemuOptions(ram, RAM_BYTES, sockets / "qmp", sockets / "serial", more=more), tmp_path / "log") as qemu:
        yield qemu


@pytest.fixture
def settings(qemu: Qemu, sockets: Path) -> Iterator[Settings]:
    with qemu.open_monitor():  # it is there
        pass
    with QmpClient(sockets / "settings") as qmp:
        qmp.command("migrate-set-parameters", downtime_limit=LIMIT_MS)
        yield Settings(qmp)


class Settings:
    """The source's emulator's."""

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp
        self.at_first = self.now()
        assert self.is_on("x-ignore-shared") is False
        assert self.at_first[1]["downtime-limit"] == LIMIT_MS

    def now(self) -> tuple[list[Any], dict[str, Any]]:
        return self._qmp.command("query-migrate-capabilities"), self._qmp.command("query-migrate-parameters")

    def is_on(self, name: str) -> bool:
        return next(bool(entry["state"]) for entry in self.now()[0] if entry["capability"] == name)

    def are_changed(self) -> bool:
        return self.is_on("x-ignore-shared") and self.now()[1]["downtime-limit"] != LIMIT_MS

    def wait_back(self) -> None:
        wait_until(lambda: self.now() == self.at_first, "the settings as they were at first")


@pytest.fixture
def two(qemu: Qemu, settings: Settings, tmp_path: Path, sockets: Path) -> Iterator[Pair]:
    more = ("--", "-serial", "null", *_monitor(sockets / "there.watch"))
    with pair(tmp_path, qemu.monitor, *more, there=sockets / "there") as made:
        made.watch_at(sockets / "watch", sockets / "there.watch")
        yield made


def _monitor(path: Path) -> tuple[str, str]:
    return "-qmp", f"unix:{path},server=on,wait=off"


@pytest.mark.parametrize(
    ("what", "step"), [("worker:", "SET"), ("worker:", "STOPPED"), ("guardian:", "STOPPED"), ("", "STOPPED")]
)
def test_the_source_is_killed_before_it_has_given(two: Pair, settings: Settings, what: str, step: str) -> None:
    """What was the user's is not known to any process that lives."""
    two.begin(source_dies=f"{what}{step}")
    assert two.wait_settled() == (True, False)
    assert f"!{step}" in two.send.was_at()
    settings.wait_back()


def test_killed_twice(two: Pair, settings: Settings) -> None:
    """The second time in the middle of the way back. The third process knows, too."""
    two.begin(source_dies="worker:STOPPED,RUN")
    assert two.wait_settled() == (True, False)
    assert {"!STOPPED", "!RUN"} <= set(two.send.was_at())
    settings.wait_back()


def test_it_is_refused_there(two: Pair, settings: Settings) -> None:
    """By a destination whose emulator has died; who hears of it has not changed anything."""
    two.begin(source_dies="worker:EVENT REFUSED", destination_dies="emulator:EVENT GIVEN")
    assert two.wait_settled() == (True, False)
    assert "!EVENT REFUSED" in two.send.was_at()
    settings.wait_back()


def test_taken_back_by_hand(two: Pair, settings: Settings) -> None:
    """By a process that finds it given."""
    two.begin(destination_dies="EVENT GIVEN")
    assert two.receive.wait() == -signal.SIGKILL
    wait_until(lambda: two.states() == ("given", "asked"), "it to be given")
    two.send.kill()
    assert settings.are_changed()
    done = two.send.run("--reclaim")
    assert (done.returncode, two.runs()) == (0, (True, False)), done.stderr
    assert settings.now() == settings.at_first


def test_it_runs_there(two: Pair, settings: Settings) -> None:
    """What is left here may be let go on by hand, should it crash there."""
    two.begin(source_dies="half")
    assert two.wait_settled() == (False, True)
    settings.wait_back()
    two.send.let_go_on()
    assert two.send.wait() == 0, two.tell()
