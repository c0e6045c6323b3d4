"""A Linux guest handed from QEMU to QEMU by the real commands; a chain; and what QEMU itself refuses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.demo.serialline import SerialLine
from lazymem.errors import MonitorError, ServerRefusedError
from lazymem.vm.qmpclient import QmpClient
from tests.support import skips
from tests.support.handover import pair
from tests.support.networkhosts import NetworkHost, two_hosts
from tests.support.qemu import BootedGuest, booted

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

WARM_SECONDS = 60.0
"""It ends before, when little changes any more."""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[BootedGuest]:
    with booted(tmp_path, more=("-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto")) as found:
        yield found


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lazymem-") as folder:
        yield Path(folder)


@pytest.fixture
def maybe_hosts(request: pytest.FixtureRequest) -> Iterator[tuple[NetworkHost, NetworkHost] | None]:
    if os.geteuid() == 0:
        with two_hosts() as hosts:
            yield hosts
    else:
        skips.stood_in(request.node, "the loopback, for the networks of two hosts: not root")
        yield None


def test_linux_goes_on_elsewhere(
    guest: BootedGuest, tmp_path: Path, sockets: Path, maybe_hosts: tuple[NetworkHost, NetworkHost] | None
) -> None:
    """First a destination with other hardware: QEMU's own words reach both ends, and the guest goes on where it is.
    Then with its pages ahead of it, and from there on without."""
    (tmp_path / "other").mkdir()
    with pair(tmp_path / "other", guest.qemu.monitor, there=sockets / "other") as two:
        two.begin()
        assert two.receive.wait() == ServerRefusedError.exit_code
        assert two.send.wait() == MonitorError.exit_code
        for said in (two.receive.said(), two.send.said()):
            assert "virtio-rng" in said.partition("qemu-system-x86_64: ")[2], two.tell()
    assert guest.qemu.serial.ask("tick", "tick") == "1"
    with guest.qemu.open_monitor() as qmp:
        generation = qmp.command("query-vm-generation-id")
    more = ("--", "-device", "virtio-rng-pci", "-serial", f"unix:{sockets}/serial")
    with (
        SerialLine(sockets / "serial") as line,
        pair(tmp_path, guest.qemu.monitor, *more, there=sockets / "there", hosts=maybe_hosts, warm=WARM_SECONDS) as two,
    ):
        two.begin()
        assert two.wait_settled() == (False, True)
        assert line.ask("tick", "tick") == "2"
        with QmpClient(sockets / "there") as qmp:
            assert qmp.command("query-vm-generation-id") == generation
        assert line.ask("sum", "sum") == guest.checksum
        assert two.send.wait() == 0, two.tell()
        assert guest.qemu.process.wait(30) == 0
        report = two.report()
        assert report["state"] == "released"
        assert report["downtime_seconds"] > 0
        assert report["candidates_used"] > 0
        assert maybe_hosts is None or maybe_hosts[1].received_bytes > report["wire_received_bytes"] > 0
        assert line.ask("write here", "written") != guest.checksum
        assert line.ask("tick", "tick") == "3"
        _goes_on_again(sockets, tmp_path / "again")


def _goes_on_again(sockets: Path, folder: Path) -> None:
    """From the mount that it was moved to, without pages ahead of it."""
    folder.mkdir()
    more = ("--", "-device", "virtio-rng-pci", "-serial", f"unix:{sockets}/again.serial")
    with (
        SerialLine(sockets / "again.serial") as line,
        pair(folder, sockets / "there", *more, there=sockets / "again") as two,
    ):
        two.begin()
        assert two.wait_settled() == (False, True)
        assert line.ask("tick", "tick") == "4"
        assert two.send.wait() == 0, two.tell()
        assert two.report()["candidates_used"] == two.report()["warmed_bytes"] == 0
