"""A heartbeat guest handed from emulator to emulator by the real commands: its count goes on, and at most one runs."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from bench.memorygroup import memory_group
from lazymem.cli.receivehost import GONE_CODE
from lazymem.cli.status import read_status
from lazymem.errors import BusyError, EnvironmentRefusedError, MountError, ServerRefusedError, StoreError
from lazymem.handover import messages
from lazymem.handover.journal import read
from lazymem.vm.guests import build_guest
from tests.support import skips
from tests.support.handover import Command, Pair, pair
from tests.support.networkhosts import NetworkHost, booted_by_itself, two_hosts
from tests.support.smalldisks import small_disk
from tests.support.vmprocess import WAIT_SECONDS, Process, Start, counts_on, ticks_of, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_MIB = 8

OWN = ("state", "reason")
"""Of a source's report. The rest is what the destination told it."""

SYNCWATCH = Path(__file__).parents[1] / "support" / "syncwatch"


@pytest.fixture
def guest(start: Start, tmp_path: Path) -> Process:
    kernel = build_guest("heartbeat", tmp_path)
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    process = start("--pcram-file", ram, "-kernel", kernel)
    process.wait_ticks(2)
    return process


def handed_over(pair: Pair, guest: Process) -> None:
    """It counts on there, and needs the source no more."""
    assert pair.send.wait() == 0, pair.tell()
    assert guest.end() == (0, "")
    before, count = guest.ticks(), len(ticks_of(pair.folder / "there"))
    wait_until(lambda: len(ticks_of(pair.folder / "there")) > count + 1, "the guest to count on")
    counts_on(before, ticks_of(pair.folder / "there"))


def test_a_guest_goes_on_elsewhere(guest: Process, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(destination_dies="hold:RECORD asked")
        two.receive.wait_at("RECORD asked")
        assert two.runs() == (True, False)
        assert two.touched_pages() == 0  # its emulator waits for the state
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        handed_over(two, guest)
        report = two.report()
        assert report["state"] == "released"
        assert report["downtime_seconds"] == pytest.approx(two.downtime_seconds(), abs=1e-3)
        assert report["total_seconds"] > report["rest_seconds"] > 0
        assert report["total_seconds"] > report["rest_seconds"] + report["downtime_seconds"], "parts of the whole"
        assert report["ram_bytes"] == RAM_MIB << 20
        assert report["state_bytes"] > 0
        assert report["wire_received_bytes"] > 0
        # A guest that is slow to run finds its pages there, and what it asks for may be on its way as a guess.
        now = read_status(str(two.mountpoint))
        assert report["demand_faults"] == now["demand_faults"]
        assert report["pages_demanded"] <= now["pages_demanded"]
        assert report["pages_demanded"] + report["pages_prefetched"] > 0
        if report["wait_p50_seconds"] is not None:
            assert 0 < report["wait_p50_seconds"] <= report["wait_p99_seconds"]
        # Said behind the word that lets the source end.
        wait_until(lambda: two.receive.out.read_text().endswith("\n"), "the destination's report")
        assert json.loads(two.receive.out.read_text()) == {name: report[name] for name in report if name not in OWN}
        assert two.states()[1] in ("whole", "done")
        two.receive.process.terminate()  # type: ignore[union-attr]
        assert two.receive.wait() == 143
        assert not os.path.ismount(two.mountpoint)


def test_no_disk_is_waited_for_with_its_ram_while_it_stands(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a guest that has just written its RAM, by all of lazymem's processes on both sides. What they wait for
    otherwise is seen, too: the source's own save to a file before, and both decisions meanwhile."""
    syncs = tmp_path / "syncs"
    monkeypatch.setenv("LAZYMEM_TEST_SYNCS", str(syncs))
    monkeypatch.setenv("PYTHONPATH", f"{SYNCWATCH}:{Path(__file__).parents[2]}")
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    guest = start("--pcram-file", ram, "-kernel", build_guest("heartbeat", tmp_path))
    guest.wait_ticks(2)
    guest.save(f"file:{tmp_path}/vmstate")
    assert _synced(syncs, ram)
    with guest.qmp() as qmp:
        qmp.command("cont")
    with ram.open("r+b") as file:  # dirty in the page cache, as what a guest has just written
        file.seek(-1 << 20, os.SEEK_END)
        file.write(os.urandom(1 << 20))
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(destination_dies="hold:RECORD asked")
        two.receive.wait_at("RECORD asked")
        two.runs()
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        stopped, resumed = two.stopped_and_resumed()
        waited = [line for line in _lines(syncs) if line[1] > stopped and line[0] < resumed]
        ram_files = (ram, two.mountpoint / "pc.ram")
        assert not [line for line in waited if line[3] == "-" or Path(line[3]) in ram_files]
        assert sum(".journal" in line[3] for line in waited) == 2
        handed_over(two, guest)


def _lines(syncs: Path) -> list[tuple[float, float, str, str]]:
    words = [line.split(" ", 3) for line in syncs.read_text().splitlines()]
    return [(float(begun), float(ended), call, path) for begun, ended, call, path in words]


def _synced(syncs: Path, path: Path) -> bool:
    return any(line[3] == str(path) for line in _lines(syncs))


def test_the_source_is_killed(guest: Process, tmp_path: Path) -> None:
    """Once; `test_handover_steps` does it at every step, with processes that are forked and not started."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(source_dies="RECORDED given")
        _check(two, guest)
        assert "!RECORDED given" in two.send.was_at()


@pytest.mark.parametrize("step", ["STARTED", "RECORDED mine"])
def test_the_destination_is_killed(guest: Process, tmp_path: Path, step: str) -> None:
    """STARTED: there is an emulator of which nothing is written down but what its command line has."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(destination_dies=f"early;{step}")
        _check(two, guest)
        assert f"!{step}" in two.receive.was_at()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, GONE_CODE)])
def test_a_restarted_receive_tells_what_the_emulator_ended_with(
    guest: Process, tmp_path: Path, number: int, code: int
) -> None:
    """It is not its parent. What was killed has told nobody, and that is said."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(destination_dies="early;RECORDED mine")
        assert two.wait_settled() == (False, True)
        assert two.send.wait() == 0, two.tell()
        wait_until(lambda: two.states()[1] == "done", "the destination to hear that")
        record = read(two.journals[1])
        assert record is not None
        os.kill(record.details["emulator_pid"], number)
        assert two.receive.wait() == code, two.tell()
        assert ("what it ended with is not known" in two.receive.said()) is (code == GONE_CODE)


@pytest.mark.needs_root("networks of their own for two hosts")
def test_between_two_hosts_whose_cable_is_pulled(guest: Process, tmp_path: Path) -> None:
    """Nothing tells either end of that. The guest has no more than its first pages then, and its rest follows."""
    with (
        two_hosts() as hosts,
        pair(
            tmp_path,
            guest.monitor,
            "-serial",
            f"file:{tmp_path}/there",
            hosts=(booted_by_itself(hosts[0], tmp_path), hosts[1]),
        ) as two,
    ):
        two.begin(source_dies="half", destination_dies="hold:RECORD asked")
        two.receive.wait_at("RECORD asked")
        assert two.runs() == (True, False)
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        wait_until(lambda: len(ticks_of(tmp_path / "there")) > 1, "the guest to have what it runs on")
        hosts[1].cable("down")
        two.send.let_go_on()
        count = len(ticks_of(tmp_path / "there"))
        wait_until(lambda: len(ticks_of(tmp_path / "there")) > count, "the guest to count alone")
        assert two.send.code() is None
        hosts[1].cable("up")
        handed_over(two, guest)
        assert two.report()["wire_received_bytes"] > 0
        boots = {record.details["boot_id"] for record in map(read, two.journals) if record is not None}
        assert len(boots) == 2
        # Two clocks as far as the commands know: right to half of the quickest question for the other one.
        assert two.report()["downtime_seconds"] == pytest.approx(two.downtime_seconds(), abs=1.0)
        assert hosts[1].received_bytes > two.report()["wire_received_bytes"]


def test_a_chain_whose_pages_are_not_yet_in_its_middle(guest: Process, tmp_path: Path) -> None:
    """The first source stands still while the guest is handed on: what is missing comes through, later."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    with (
        pair(tmp_path / "1", guest.monitor, "-serial", f"file:{tmp_path}/1/there") as first,
        pair(tmp_path / "2", first.there, "-serial", f"file:{tmp_path}/2/there") as second,
    ):
        first.begin(source_dies="half")
        assert first.wait_settled() == (False, True)
        wait_until(lambda: len(ticks_of(tmp_path / "1" / "there")) > 1, "the guest to count in the middle")
        second.begin()
        assert second.wait_settled() == (False, True)
        run = json.loads(os.getxattr(first.mountpoint, "user.lazymem.run"))
        assert not run["whole"]
        first.send.let_go_on()
        assert first.send.wait() == 0, first.tell()
        assert second.send.wait() == 0, second.tell()
        assert first.receive.wait() == 0, first.tell()
        counts_on(ticks_of(tmp_path / "1" / "there"), ticks_of(tmp_path / "2" / "there"))
        assert not os.path.ismount(first.mountpoint)


def test_taken_back_by_hand_from_a_destination_that_died(guest: Process, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor) as two:
        two.begin(destination_dies="EVENT GIVEN")
        assert two.receive.wait() == -signal.SIGKILL
        wait_until(lambda: two.states() == ("given", "asked"), "it to be given")
        assert two.runs() == (False, False)
        done = two.send.run("--reclaim")
        assert (done.returncode, done.stderr) == (0, "lazymem send: the guest goes on here\n")
        assert two.runs() == (True, False)
        assert two.send.wait() != 0
        # Both come back: the one hears from the other that it never got the guest.
        two.receive.start()
        two.send.start()
        assert two.receive.wait() == ServerRefusedError.exit_code, two.tell()
        assert two.states() == ("ours", "refused")
        assert two.runs() == (True, False)
        count = len(guest.ticks())
        wait_until(lambda: len(guest.ticks()) > count, "the guest to count on")


def test_tried_again_after_it_came_to_nothing(guest: Process, tmp_path: Path) -> None:
    """By the same commands, with the same journals."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(destination_dies="emulator:EVENT GIVEN")
        assert two.wait_settled() == (True, False)
        assert two.send.wait() != 0
        two.send.start()
        _wait_listening(two, 2)
        two.receive.start()
        assert two.wait_settled() == (False, True)
        handed_over(two, guest)
        report = two.report()
        assert report["wait_p99_seconds"] is None or report["wait_p99_seconds"] > 0


def test_nothing_is_taken_by_hand_from_a_side_that_answers(guest: Process, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(source_dies="hold:RECORD given", destination_dies="hold:RECORD mine")
        two.receive.wait_at("EVENT LOADED")
        done = two.receive.run("--take", two.mountpoint, arguments=("--journal", two.journals[1]))
        assert "the source answers" in done.stderr, done.stderr
        assert done.returncode == BusyError.exit_code
        two.send.let_go_on()
        two.receive.wait_at("RECORD mine")
        done = two.send.run("--reclaim")
        assert "the destination answers" in done.stderr, done.stderr
        assert done.returncode == BusyError.exit_code
        assert two.runs() == (False, False)
        two.receive.let_go_on()
        assert two.wait_settled() == (False, True)
        handed_over(two, guest)


def test_taken_by_hand_while_the_source_is_dead(guest: Process, tmp_path: Path) -> None:
    """Its RAM follows once the source is back, which then knows that the guest is gone."""
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        two.begin(source_dies="RECORDED given")
        assert two.send.wait() == -signal.SIGKILL
        two.receive.wait_at("AT loaded")
        done = two.receive.run("--take", two.mountpoint, arguments=("--journal", two.journals[1]))
        assert done.returncode == 0, done.stderr
        assert two.states() == ("given", "mine")
        two.send.start()
        handed_over(two, guest)


def test_what_came_to_nothing_is_not_taken_by_hand(guest: Process, tmp_path: Path) -> None:
    """Not even after others were offered the guest, which runs on at its source, by later processes."""
    with pair(tmp_path, guest.monitor) as two:
        two.begin(source_dies="RECORD given")
        assert two.send.wait() == -signal.SIGKILL
        two.receive.wait_at("EVENT LOADED")
        two.receive.kill()
        two.send.start()
        _wait_listening(two, 2)
        wait_until(lambda: _is_offered(two.address()), "the guest to go on, and to be offered")
        two.send.kill()
        two.send.start()
        _wait_listening(two, 3)
        two.receive.start("--take")
        assert two.receive.wait() in (BusyError.exit_code, ServerRefusedError.exit_code), two.tell()
        assert "the source kept its guest" in two.receive.said(), two.tell()
        assert two.states()[1] == "refused"
        assert two.runs() == (True, False), two.tell()


def _wait_listening(two: Pair, times: int) -> None:
    wait_until(lambda: two.send.out.read_text().count("listening") == times, "the source to listen")


def _is_offered(address: str) -> bool:
    """To a receiver, which leaves then."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as connection:
        connection.sendall(messages.CONTROL + messages.encode(messages.Hello(messages.VERSION, "another host")))
        found: list[messages.Message] = []
        reader = messages.Receiver()
        while not found:
            found = reader.feed(connection.recv(4096))
    return isinstance(found[0], messages.Offer)


@pytest.mark.parametrize("step", ["RECORD asked", "RECORD given"])
def test_a_second_receiver_is_refused(guest: Process, tmp_path: Path, step: str) -> None:
    """While the first one prepares, too, and the guest still runs at its source."""
    (tmp_path / "other").mkdir()
    with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there") as two:
        first = two.receive if step == "RECORD asked" else two.send
        two.begin(**{"destination_dies" if first is two.receive else "source_dies": f"hold:{step}"})
        first.wait_at(step)
        journal = ("--journal", tmp_path / "other.journal")
        done = two.receive.run(two.address(), tmp_path / "other", arguments=journal)
        assert "another receiver is taking this guest" in done.stderr
        assert done.returncode == ServerRefusedError.exit_code
        assert not os.path.ismount(tmp_path / "other")
        assert two.runs() == (first is two.receive, False)
        first.let_go_on()
        assert two.wait_settled() == (False, True)
        handed_over(two, guest)


def test_an_emulator_that_does_not_start_begins_nothing(guest: Process, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor, "-m", "16") as two:
        two.begin()
        assert two.receive.wait() != 0
        assert "needs exactly 16777216" in two.receive.said()
        assert two.send.code() is None
        assert two.runs() == (True, False)
        assert not os.path.ismount(two.mountpoint)
        two.send.process.terminate()  # type: ignore[union-attr]
        assert two.send.wait() == 130


@pytest.mark.needs_root("a small disk")
def test_a_destination_without_room_begins_nothing(
    guest: Process, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with (
        small_disk(tmp_path / "small", (RAM_MIB - 1) << 20, request.node) as disk,
        pair(tmp_path, guest.monitor, "--cache", disk / "cache") as two,
    ):
        two.begin()
        assert two.receive.wait() == StoreError.exit_code, two.tell()
        assert f"the guest has {RAM_MIB} MiB of RAM and {disk}/cache has room for" in two.receive.said()
        assert two.send.code() is None
        assert two.runs() == (True, False)
        assert not os.path.ismount(two.mountpoint)


@pytest.mark.needs_root("a control group")
def test_a_destination_without_memory_begins_nothing(
    start: Start, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its control group has less to spare than the guest has RAM. With --force it runs all the same."""
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, 512 << 20)
    guest = start("-m", "512", "--pcram-file", ram, "-kernel", build_guest("heartbeat", tmp_path))
    guest.wait_ticks(2)
    with memory_group("lazymem-test") as group:
        if isinstance(group, str):
            skips.stood_in(request.node, f"the tests of what is checked, for a memory control group: {group}")
            return
        group.limit(256 << 20)
        hosts = NetworkHost((), "127.0.0.1"), NetworkHost(tuple(group.command()), "127.0.0.1")
        with pair(tmp_path, guest.monitor, "-serial", f"file:{tmp_path}/there", hosts=hosts) as two:
            two.begin()
            assert two.receive.wait() == EnvironmentRefusedError.exit_code, two.tell()
            assert "the guest has 512 MiB of RAM and this host, or this process's control group" in two.receive.said()
            assert two.send.code() is None
            assert two.runs() == (True, False)
            assert not os.path.ismount(two.mountpoint)
            two.receive.start("--force")
            assert two.wait_settled() == (False, True)
            handed_over(two, guest)


def test_both_ends_on_one_file_are_refused(guest: Process, tmp_path: Path) -> None:
    with pair(tmp_path, guest.monitor) as two:
        two.begin_at(tmp_path)  # where the source's RAM file is
        assert two.receive.wait() == MountError.exit_code
        assert "on this very host" in two.receive.said()
        assert two.runs() == (True, False)


def _check(two: Pair, guest: Process) -> None:
    """At most one ever runs, exactly one does in the end, and it counts on."""
    if two.wait_settled()[1]:
        while two.send.code() in (None, -9):
            two.restart_the_dead()
            assert two.runs() != (True, True)
        handed_over(two, guest)
    else:
        count = len(guest.ticks())
        wait_until(lambda: len(guest.ticks()) > count + 1, "the guest to count on here")


@pytest.mark.parametrize("side", ["receive", "send"])
def test_where_numpy_does_not_load_no_guest_stands_for_it(side: str, guest: Process, tmp_path: Path) -> None:
    """The destination says so before anything is begun, leaves nothing, and the source waits for another one."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "numpy.py").write_text("raise ImportError('no such processor')\n")
    with pair(tmp_path, guest.monitor) as two:
        command: Command = getattr(two, side)
        command._environment = command._environment | {"PYTHONPATH": str(broken)}
        two.begin()
        code = two.receive.wait()
        if side == "send":
            two.send.wait()
        assert "numpy does not load here: no such processor" in command.said()
        assert code != 0
        assert "MIGRATION" not in two.events_here()
        assert side == "send" or two.send.code() is None
        assert two.states() == ("ours", "refused")
        assert not os.path.ismount(two.mountpoint)
        count = len(guest.ticks())
        guest.wait_ticks(count + 2)
