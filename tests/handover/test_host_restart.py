"""A destination's record from before its host was started anew: the decision counts, the numbers do not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import to_builtins

from lazymem.cli import receive
from lazymem.cli.receivehost import GONE_CODE, _began
from lazymem.errors import GuestCrashError, ServerRefusedError, ServerUnreachableError
from lazymem.handover import receiving
from lazymem.handover.arrival import Arriving
from lazymem.handover.arriving import boot_id
from lazymem.handover.journal import Journal, read

ID = "00" * 16


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process with the number, and the begin, of an emulator before the restart."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("state", "code", "state_then", "said"),
    [
        ("asked", ServerRefusedError.exit_code, "refused", "the guest does not run here"),
        ("refused", ServerRefusedError.exit_code, "refused", "it was refused here before"),
        ("promised", GuestCrashError.exit_code, "mine", "may have run here"),
        ("mine", GuestCrashError.exit_code, "mine", "send --reclaim"),
        ("whole", GONE_CODE, "whole", "the guest ran here"),
        ("done", GONE_CODE, "done", "the guest ran here"),
        ("yielded", ServerUnreachableError.exit_code, "yielded", "started anew"),
    ],
)
def test_after_a_restart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bystander: subprocess.Popen[bytes],
    state: str,
    code: int,
    state_then: str,
    said: str,
) -> None:
    monkeypatch.setattr(receiving, "_TELL_SECONDS", 0.05)
    monkeypatch.setattr(receiving, "_DONE_SECONDS", 0.05)
    source = f"unix:{tmp_path}/nobody"
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    began = _began(bystander.pid)
    arriving = Arriving(source, str(mountpoint), str(tmp_path / "qmp"), "", bystander.pid, began, 4096)
    arriving.boot_id = "another boot"
    with Journal(tmp_path / "j", "destination") as journal:
        journal.write(ID, state, to_builtins(arriving))
    assert receive.main([source, str(mountpoint), "--journal", str(tmp_path / "j")]) == code
    assert bystander.poll() is None
    text = capsys.readouterr().err
    assert "this host was started anew" in text
    assert said in text
    record = read(tmp_path / "j")
    assert record is not None
    assert record.state == state_then
    assert record.details["boot_id"] != boot_id()
