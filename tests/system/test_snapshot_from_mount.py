"""Snapshots of guests that run from a mount while most of its pages are missing: whole, and as deltas."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from lazymem.demo.vmrun import Vm, VmGuest, started
from lazymem.errors import RamFileError, SnapshotError
from lazymem.snapshot.manifest import parse
from lazymem.snapshot.reader import open_snapshot
from lazymem.snapshot.writer import write_digests
from lazymem.vm.guests import build_guest
from tests.support.handover import pair
from tests.support.mounts import Mounted, Stage, wait_until
from tests.support.snapshotguest import missing_pages, running_on, saved, stalled

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

RAM_BYTES = 16 << 20
PAGES = RAM_BYTES >> 12
QUIET = ("--prefetch", "none")


@pytest.fixture
def first(tmp_path: Path, sockets: Path) -> Path:
    """Its folder is where its deltas are looked for, too."""
    return saved(tmp_path, sockets, RAM_BYTES, "first")


def verify(vm: Vm) -> str:
    return vm.serial.ask("verify", "verified").split(" first_bad")[0]


def test_deltas_of_deltas(mounts: Stage, first: Path, sockets: Path, tmp_path: Path) -> None:
    """The main job: made while pages are missing, and with no server there; resumed elsewhere, and checked."""
    whole = ""
    for generation, (below, name) in enumerate([("first", "second"), ("second", "third"), ("third", "")]):
        server = mounts.serve(tmp_path / below)
        mounts.cache = tmp_path / f"cache-{below}"
        mount = mounts.mount(server.address, *QUIET, name=f"mnt-{below}")
        with running_on(mount, sockets) as vm:
            assert f"generation {generation}" in vm.serial.ask("status", "status")
            if not name:
                assert verify(vm) == whole
                break
            assert vm.serial.ask(f"rewrite 50 {generation}", "rewrote") == "50"
            assert missing_pages(mount) > PAGES // 2
            server.stop()
            assert snapshot.main([str(vm.monitor), str(tmp_path / name), "--resume", "--delta"]) == 0
            assert missing_pages(mount) > PAGES // 2
            mounts.serve(tmp_path / below, port=server.port)
            whole = verify(vm)  # and it runs on
            assert whole.endswith(" bad 0")
        mount.unmount()
        parent = parse((tmp_path / below / "manifest.json").read_bytes())
        made = parse((tmp_path / name / "manifest.json").read_bytes())
        assert made.parent is not None
        assert made.parent.identity == parent.identity.hex()
        assert (tmp_path / name / made.ram.file).stat().st_size < RAM_BYTES // 4
        with open_snapshot(tmp_path / name) as reader:
            assert reader.identity == made.identity


def check_whole(folder: Path, tmp_path: Path) -> None:
    manifest = parse((folder / "manifest.json").read_bytes())
    assert manifest.parent is None
    again = tmp_path / f"again-{os.urandom(4).hex()}"
    assert write_digests(folder / "pc.ram", RAM_BYTES, again).tree == manifest.ram_root
    assert again.read_bytes() == (folder / "pc.ram.digests").read_bytes()


def test_a_whole_one_brings_what_is_missing(mounts: Stage, first: Path, sockets: Path, tmp_path: Path) -> None:
    mount = mounts.mount(mounts.serve(first).address, *QUIET)
    with running_on(mount, sockets) as vm:
        assert vm.serial.ask("rewrite 50 1", "rewrote") == "50"
        assert missing_pages(mount) > PAGES // 2
        assert snapshot.main([str(vm.monitor), str(tmp_path / "second")]) == 0
        assert vm.process.wait(60) == 0
    check_whole(tmp_path / "second", tmp_path)
    mounts.cache = tmp_path / "other-cache"
    elsewhere = mounts.mount(mounts.serve(tmp_path / "second").address, *QUIET, name="elsewhere")
    with running_on(elsewhere, sockets) as vm:
        assert "generation 1" in vm.serial.ask("status", "status")
        assert verify(vm).endswith(" bad 0")


def test_of_a_guest_that_was_handed_over_and_whose_pages_still_come(
    mounts: Stage, first: Path, sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its source has told no digests, so a delta of it is refused; a whole one waits for the rest, and has no hole."""
    server = mounts.serve(first)
    mount = mounts.mount(server.address, *QUIET, name="from")
    target = tmp_path / "second"
    with running_on(mount, sockets) as vm, pair(tmp_path, vm.monitor, "-serial", f"unix:{sockets}/there") as two:
        assert vm.serial.ask("rewrite 50 1", "rewrote") == "50"
        with stalled(server):
            two.begin()
            assert two.wait_settled() == (False, True)
            assert snapshot.main([str(two.there), str(target), "--resume", "--delta"]) == SnapshotError.exit_code
            assert "without digests" in capsys.readouterr().err
            taking = snapshot_command(two.there, target)
            with subprocess.Popen(taking, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                try:
                    wait_until(lambda: any(tmp_path.glob(".second.partial-*")), "the snapshot to be begun")
                    assert missing_pages(mount) > PAGES // 2
                    assert not json.loads(os.getxattr(two.mountpoint, "user.lazymem.run"))["whole"]
                    assert process.poll() is None
                    os.kill(server.pid, signal.SIGCONT)
                    _, said = process.communicate(timeout=100)
                    assert process.returncode == 0, said
                finally:
                    process.kill()
        assert two.runs() == (False, True)
        assert two.send.wait() == 0, two.tell()
    check_whole(target, tmp_path)
    mounts.cache = tmp_path / "other-cache"
    with running_on(mounts.mount(mounts.serve(target).address, *QUIET, name="elsewhere"), sockets) as vm:
        assert "generation 1" in vm.serial.ask("status", "status")
        assert verify(vm).endswith(" bad 0")


def snapshot_command(monitor: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "lazymem.cli.snapshot", str(monitor), str(target), "--resume"]


@contextlib.contextmanager
def waiting_snapshot(vm: Vm, mount: Mounted, target: Path) -> Iterator[subprocess.Popen[str]]:
    """`lazymem snapshot` of a whole guest, which waits for a page that cannot come."""
    with subprocess.Popen(snapshot_command(vm.monitor, target), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: mount.status()["pages_in_flight"] > 0, "a page to be waited for")
            wait_until(lambda: any(target.parent.glob(f".{target.name}.partial-*")), "the snapshot to be begun")
            yield process
        finally:
            process.kill()


def test_a_server_that_is_away_holds_no_guest_up(mounts: Stage, first: Path, sockets: Path, tmp_path: Path) -> None:
    """Interrupted, or killed: the guest runs, and there is no snapshot. The next one clears away what is left."""
    server = mounts.serve(first)
    mount = mounts.mount(server.address, *QUIET)
    with running_on(mount, sockets) as vm:
        vm.serial.ask("rewrite 5 1", "rewrote")
        with stalled(server):
            with waiting_snapshot(vm, mount, tmp_path / "second") as process:
                assert "ticks" in vm.serial.ask("status", "status")
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=60)
                assert (process.returncode, "no snapshot was made" in said) == (130, True), said
            assert not list(tmp_path.glob("*second*"))
            with waiting_snapshot(vm, mount, tmp_path / "second") as process:
                process.kill()
                process.communicate(timeout=60)
            assert not (tmp_path / "second").exists()
            assert "ticks" in vm.serial.ask("status", "status")
        assert snapshot.main([str(vm.monitor), str(tmp_path / "second"), "--resume"]) == 0
        assert [path.name for path in tmp_path.glob("*second*")] + list(tmp_path.glob(".second*")) == ["second"]
        check_whole(tmp_path / "second", tmp_path)
        assert verify(vm).endswith(" bad 0")


def test_a_page_that_misses_its_deadline_ends_the_snapshot_and_not_the_guest(
    mounts: Stage, first: Path, sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = mounts.serve(first)
    mount = mounts.mount(server.address, *QUIET, "--deadline", "10")  # long enough for what does come on a busy machine
    target = tmp_path / "second"
    with running_on(mount, sockets) as vm:
        assert vm.serial.ask("rewrite 5 1", "rewrote") == "5"
        with stalled(server):
            assert snapshot.main([str(vm.monitor), str(target), "--resume"]) == RamFileError.exit_code
            said = capsys.readouterr().err
            assert f"cannot read {mount.ram_path} through its mount" in said, said
            assert "Connection timed out" in said, said
            assert [path.name for path in tmp_path.iterdir() if "second" in path.name] == []
            assert missing_pages(mount) > PAGES // 2
            with vm.open_monitor() as qmp:
                assert qmp.command("query-status")["status"] == "running"
        assert snapshot.main([str(vm.monitor), str(target), "--resume"]) == 0
        check_whole(target, tmp_path)
        assert verify(vm).endswith(" bad 0")


def test_a_delta_is_refused_where_nobody_knows_what_was_written(
    mounts: Stage, first: Path, sockets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.rename(first / "manifest.json", tmp_path / "taken")
    mount = mounts.mount(mounts.serve(first).address, *QUIET)
    with running_on(mount, sockets) as vm:
        assert snapshot.main([str(vm.monitor), str(tmp_path / "d"), "--resume", "--delta"]) == SnapshotError.exit_code
        assert "without digests" in capsys.readouterr().err
        assert "ticks" in vm.serial.ask("status", "status")
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", RAM_BYTES)
    place = VmGuest(tmp_path / "ram", RAM_BYTES, sockets / "q2", sockets / "s2", build_guest("pages", tmp_path))
    with started(place, tmp_path / "log") as vm:
        with vm.open_monitor() as qmp:
            qmp.command("cont")
        vm.serial.expect("ready")
        assert snapshot.main([str(vm.monitor), str(tmp_path / "d"), "--resume", "--delta"]) == RamFileError.exit_code
        assert "on no lazymem mount" in capsys.readouterr().err
    assert not list(tmp_path.glob("*d.partial*"))
