"""A Linux guest handed from QEMU to QEMU by the real commands; a chain; and what QEMU itself refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.demo.serialline import SerialLine
from lazymem.errors import MonitorError, ServerRefusedError
from lazymem.handover.loadreads import load_reads
from lazymem.pages import PageRange
from lazymem.residency import resident
from lazymem.vm.qmpclient import QmpClient
from tests.support import skips
from tests.support.handover import Pair, pair
from tests.support.networkhosts import NetworkHost, two_hosts
from tests.support.qemu import RAM_BYTES, BootedGuest, booted
from tests.support.stopping import stop

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

WARM_SECONDS = 60.0
"""It ends before, when little changes any more."""


ROMS = PageRange(0x90, 0x70)
"""And what is around."""

SECOND = "watch.qmp"
"""Of the monitors that a QEMU has, the tests' own: one serves one client."""


@pytest.fixture
def guest(tmp_path: Path, sockets: Path) -> Iterator[BootedGuest]:
    devices = ("-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto")
    with booted(tmp_path, more=(*devices, *_monitor(sockets / SECOND))) as found:
        yield found


def _monitor(path: Path) -> tuple[str, str]:
    return "-qmp", f"unix:{path},server=on,wait=off"


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
    more = ("--", "-device", "virtio-rng-pci", "-serial", f"unix:{sockets}/serial", *_monitor(sockets / "watch"))
    with (
        SerialLine(sockets / "serial") as line,
        pair(tmp_path, guest.qemu.monitor, *more, there=sockets / "there", hosts=maybe_hosts, warm=WARM_SECONDS) as two,
    ):
        two.watch_at(sockets / SECOND, sockets / "watch")
        _begin_watched(two)
        assert two.wait_settled() == (False, True)
        assert line.ask("tick", "tick") == "2"
        with QmpClient(sockets / "there") as qmp:
            assert qmp.command("query-vm-generation-id") == generation
        assert line.ask("sum", "sum") == guest.checksum
        assert two.send.wait() == 0, two.tell()
        assert guest.qemu.process.wait(30) == 0
        report = two.report()
        assert report["state"] == "released"
        assert report["downtime_seconds"] == pytest.approx(two.downtime_seconds(), abs=1e-3)
        assert report["candidates_used"] > 0
        assert maybe_hosts is None or maybe_hosts[1].received_bytes > report["wire_received_bytes"] > 0
        assert line.ask("write here", "written") != guest.checksum
        assert line.ask("tick", "tick") == "3"
        two.stop_watching()
        _goes_on_again(sockets, tmp_path / "again")


def _goes_on_again(sockets: Path, folder: Path) -> None:
    """From the mount that it was moved to, without pages ahead of it."""
    folder.mkdir()
    more = ("--", "-device", "virtio-rng-pci", "-serial", f"unix:{sockets}/again.serial")
    with (
        SerialLine(sockets / "again.serial") as line,
        pair(folder, sockets / "there", *more, *_monitor(sockets / "last"), there=sockets / "again") as two,
    ):
        two.watch_at(sockets / "watch", sockets / "last")
        _begin_watched(two)
        assert two.wait_settled() == (False, True)
        assert line.ask("tick", "tick") == "4"
        assert two.send.wait() == 0, two.tell()
        assert two.report()["candidates_used"] == two.report()["warmed_bytes"] == 0
        assert two.report()["downtime_seconds"] == pytest.approx(two.downtime_seconds(), abs=1e-3)


def _begin_watched(two: Pair) -> None:
    """Each emulator is connected to before its guest stops, or runs."""
    two.begin(destination_dies="hold:RECORD asked")
    two.receive.wait_at("RECORD asked")
    assert two.runs() == (True, False)
    assert two.touched_pages() == 0
    two.receive.let_go_on()


def _no_pass_over_ram_while_it_stood(two: Pair) -> None:
    """What no file backs went before the stop; then neither command read a part of the RAM worth the name."""
    told = two.events_here()
    assert "MIGRATION_PASS" in told[: told.index("STOP")], told
    spans = ((two.send, "EVENT READY", "RECORDED given"), (two.receive, "RECORDED asked", "RECORD mine"))
    for command, begin, end in spans:
        read = command.read_until(end) - command.read_until(begin)
        assert read < RAM_BYTES // 8, (read, two.tell())


def test_what_a_load_reads_is_asked_for_ahead_of_it(guest: BootedGuest, tmp_path: Path, sockets: Path) -> None:
    """No page more than that, where a touch would bring 32."""
    more = ("--", "-device", "virtio-rng-pci", "-serial", "null")
    with pair(tmp_path, guest.qemu.monitor, *more, there=sockets / "there") as two:
        reads = load_reads(guest.ram)
        assert reads
        two.begin(source_dies="hold:RECORD given", destination_dies="ahead;")
        two.receive.wait_at("EVENT LOADED")
        with (two.mountpoint / "pc.ram").open("r+b") as file:
            states = resident(file.fileno(), ROMS)
        assert [ROMS.start + at for at, is_here in enumerate(states) if is_here] == reads
        two.send.let_go_on()
        assert two.send.wait() == 0, two.tell()


def test_whoever_dies_at_most_one_qemu_runs_it(guest: BootedGuest, tmp_path: Path, sockets: Path) -> None:
    """A chain whose middle has not all pages; the first destination dies when the guest is its own, the second source
    when the guest is not its own any more, and in between one falls silent before anything was given."""
    first_more, silent_more, last_more = (_other(sockets, name) for name in ("first", "silent", "last"))
    for name in ("first", "silent", "last"):
        (tmp_path / name).mkdir()
    with (
        SerialLine(sockets / "first.serial") as middle,
        SerialLine(sockets / "last.serial") as line,
        pair(tmp_path / "first", guest.qemu.monitor, *first_more, there=sockets / "first") as first,
        pair(tmp_path / "silent", sockets / "first", *silent_more, there=sockets / "silent") as silent,
        pair(tmp_path / "last", sockets / "first", *last_more, there=sockets / "last") as last,
    ):
        first.watch_at(sockets / SECOND, sockets / "first.watch")
        first.begin(source_dies="half", destination_dies="early;RECORDED mine")
        assert first.wait_settled() == (False, True)
        assert "!RECORDED mine" in first.receive.was_at()
        assert middle.ask("tick", "tick") == "1"
        _no_pass_over_ram_while_it_stood(first)
        first.stop_watching()

        silent.watch_at(sockets / "first.watch", sockets / "silent.watch")
        _falls_silent(silent)
        assert middle.ask("tick", "tick") == "2"
        silent.stop_watching()

        last.watch_at(sockets / "first.watch", sockets / "last.watch")
        last.begin(source_dies="RECORDED given")
        assert last.wait_settled() == (False, True)
        assert "!RECORDED given" in last.send.was_at()
        assert line.ask("tick", "tick") == "3"
        assert not json.loads(os.getxattr(first.mountpoint, "user.lazymem.run"))["whole"]
        first.send.let_go_on()
        assert line.ask("sum", "sum") == guest.checksum
        assert [first.send.wait(), last.send.wait()] == [0, 0], (first.tell(), last.tell())
        assert first.receive.wait() == 0, first.tell()  # not the parent of its emulator, which notes what it ends with
        assert not os.path.ismount(first.mountpoint)


def _other(sockets: Path, name: str) -> tuple[str, ...]:
    words = ("--", "-device", "virtio-rng-pci", *_monitor(sockets / f"{name}.watch"))
    return (*words, "-serial", f"unix:{sockets}/{name}.serial" if name != "silent" else "null")


def _falls_silent(two: Pair) -> None:
    """Its host is there, and no word comes from it: the guest goes on here, and not there when it speaks again."""
    two.begin(source_dies="patient;", destination_dies="early;hold:EVENT LOADED")
    two.receive.wait_at("!EVENT LOADED")
    assert two.receive.process is not None
    stop(two.receive.process.pid)
    try:
        two.receive.let_go_on()
        assert two.send.wait() == MonitorError.exit_code, two.tell()
        assert two.runs() == (True, False), two.tell()
    finally:
        os.kill(two.receive.process.pid, signal.SIGCONT)
    two.send.start()  # who asks is told then
    assert two.receive.wait() == ServerRefusedError.exit_code, two.tell()
    assert two.runs() == (True, False), two.tell()
    assert two.send.process is not None
    two.send.process.terminate()
    two.send.wait()
