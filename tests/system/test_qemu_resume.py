"""The main job with stock QEMU: a Linux guest saved here goes on there, its RAM never in the stream."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from lazymem.demo.serving import mounted, served
from tests.support.qemu import booted, resumed, waiting

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


@dataclass(frozen=True, slots=True)
class Saved:
    folder: Path
    checksum: str


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A guest that had counted to 2 when it was saved; its QEMU has ended and its RAM file became the snapshot's."""
    folder = tmp_path_factory.mktemp("source")
    with booted(folder) as guest:
        assert guest.qemu.serial.ask("tick", "tick") == "1"
        assert guest.qemu.serial.ask("tick", "tick") == "2"
        assert snapshot.main([str(guest.qemu.monitor), str(folder / "snap")]) == 0
        assert guest.qemu.process.wait(60) == 0
    return Saved(folder / "snap", guest.checksum)


@pytest.mark.parametrize("share", [True, False])
def test_resumes_from_a_copy(saved: Saved, tmp_path: Path, share: bool) -> None:
    subprocess.run(["cp", "--sparse=always", saved.folder / "pc.ram", tmp_path / "pc.ram"], check=True)
    with resumed(tmp_path / "pc.ram", saved.folder / "vmstate", tmp_path / "log", share=share) as qemu:
        assert qemu.serial.ask("sum", "sum") == saved.checksum
        assert qemu.serial.ask("tick", "tick") == "3"


@pytest.mark.parametrize("share", [True, False])
def test_resumes_from_a_mount(saved: Saved, tmp_path: Path, share: bool) -> None:
    """The main job: pages come over the wire when the guest touches them, and it finds all its memory unchanged."""
    (tmp_path / "mnt").mkdir()
    # Without guesses: on a busy machine they might bring all of it before the guest's first touch.
    options = ("--cache", str(tmp_path / "cache"), "--prefetch", "none")
    with (
        served([saved.folder], tmp_path / "serve.log") as address,
        mounted(f"{address}/snap", tmp_path / "mnt", tmp_path / "mount.log", *options) as here,
        resumed(here.ram, here.vmstate, tmp_path / "qemu.log", share=share) as qemu,
    ):
        assert qemu.serial.ask("tick", "tick") == "3"
        assert qemu.serial.ask("sum", "sum") == saved.checksum
        changed = qemu.serial.ask("write here", "written")
        assert changed != saved.checksum
        assert qemu.serial.ask("sum", "sum") == changed
        status = here.status()
    assert status["demand_faults"] > 0
    assert status["connected"]


def test_resumed_twice_each_begins_where_the_snapshot_does(saved: Saved, tmp_path: Path) -> None:
    """What the first run wrote is gone with its mount; the second one uses its cache and sees the snapshot's bytes."""
    (tmp_path / "mnt").mkdir()
    with served([saved.folder], tmp_path / "serve.log") as address:
        for _ in range(2):
            with (
                mounted(f"{address}", tmp_path / "mnt", tmp_path / "log", "--cache", str(tmp_path / "cache")) as here,
                resumed(here.ram, here.vmstate, tmp_path / "qemu.log") as qemu,
            ):
                assert qemu.serial.ask("tick", "tick") == "3"
                assert qemu.serial.ask("sum", "sum") == saved.checksum
                assert qemu.serial.ask("write more", "written") != saved.checksum


def test_snapshot_of_a_guest_whose_ram_is_on_a_mount(saved: Saved, tmp_path: Path) -> None:
    """A second generation: resumed from a mount, changed, saved again, and resumed from that."""
    (tmp_path / "mnt").mkdir()
    options = ("--cache", str(tmp_path / "cache"), "--prefetch", "none")
    with (
        served([saved.folder], tmp_path / "serve.log") as address,
        mounted(f"{address}", tmp_path / "mnt", tmp_path / "log", *options) as here,
        resumed(here.ram, here.vmstate, tmp_path / "qemu.log") as qemu,
    ):
        changed = qemu.serial.ask("write generation", "written")
        status = here.status()
        assert status["pages_held"] < status["pages_total"]
        assert snapshot.main([str(qemu.monitor), str(tmp_path / "second"), "--resume"]) == 0
        assert qemu.serial.ask("tick", "tick") == "3"
    shutil.copy(tmp_path / "second" / "pc.ram", tmp_path / "copy")
    with resumed(tmp_path / "copy", tmp_path / "second" / "vmstate", tmp_path / "qemu2.log") as qemu:
        assert qemu.serial.ask("sum", "sum") == changed
        assert qemu.serial.ask("tick", "tick") == "3"


def test_resumes_by_the_script_of_the_examples(saved: Saved, tmp_path: Path) -> None:
    """deploy/examples/qemu-take-over, with a path that a shell would take apart."""
    script = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "qemu-take-over"
    vmstate = tmp_path / "state of 'web'; false"
    shutil.copy(saved.folder / "vmstate", vmstate)
    subprocess.run(["cp", "--sparse=always", saved.folder / "pc.ram", tmp_path / "pc.ram"], check=True)
    with waiting(tmp_path / "pc.ram", tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        subprocess.run([script, qemu.monitor, vmstate], check=True)
        assert qemu.serial.ask("tick", "tick") == "3"
    with waiting(tmp_path / "pc.ram", tmp_path / "log") as qemu:
        qemu.open_monitor().close()
        (tmp_path / "none").write_bytes(b"")
        done = subprocess.run([script, qemu.monitor, tmp_path / "none"], check=False, capture_output=True, timeout=60)
        assert done.returncode != 0
        assert b"no saved state" in done.stderr
