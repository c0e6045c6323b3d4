"""The main job with stock QEMU: a Linux guest saved here goes on there, its RAM never in the stream."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazymem.cli import snapshot
from tests.support.qemu import booted, resumed

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
        assert guest.qemu.process.wait(20) == 0
    return Saved(folder / "snap", guest.checksum)


@pytest.mark.parametrize("share", [True, False])
def test_resumes_from_a_copy(saved: Saved, tmp_path: Path, share: bool) -> None:
    subprocess.run(["cp", "--sparse=always", saved.folder / "pc.ram", tmp_path / "pc.ram"], check=True)
    with resumed(tmp_path / "pc.ram", saved.folder / "vmstate", tmp_path / "log", share=share) as qemu:
        assert qemu.serial.ask("sum", "sum") == saved.checksum
        assert qemu.serial.ask("tick", "tick") == "3"
