"""Whether KVM runs a guest: every way in which it does not, none of which may hold or hurt who asks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymem.vm import qemukvm


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemukvm, "DEVICE", "/nowhere/kvm")
    assert qemukvm.why_not() == "there is no /nowhere/kvm"


def test_a_device_that_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(qemukvm, "DEVICE", str(tmp_path / "kvm"))
    assert "runs no guest" in str(qemukvm.why_not())


def test_a_guest_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def busy() -> int:
        while True:
            pass

    monkeypatch.setattr(qemukvm, "DEVICE", str(tmp_path))
    monkeypatch.setattr(qemukvm, "_run_guest", busy)
    assert "hardly runs a guest" in str(qemukvm.why_not())


def test_a_guest_that_ends_elsewhere_and_one_that_ends_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qemukvm, "DEVICE", str(tmp_path))
    monkeypatch.setattr(qemukvm, "_WAIT_SECONDS", 60.0)
    for reason, said in ((17, "runs no guest"), (2, None)):
        monkeypatch.setattr(qemukvm, "_run_guest", lambda reason=reason: reason)
        found = qemukvm.why_not()
        assert found is None if said is None else said in str(found)


def test_a_kvm_that_is_stuck(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It waits and uses no processor time: the clock ends it."""
    read_end, write_end = os.pipe()
    monkeypatch.setattr(qemukvm, "DEVICE", str(tmp_path))
    monkeypatch.setattr(qemukvm, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(qemukvm, "_run_guest", lambda: len(os.read(read_end, 1)))
    try:
        assert qemukvm.why_not() is not None
    finally:
        os.close(read_end)
        os.close(write_end)


def test_here_it_says_one_or_the_other() -> None:
    reason = qemukvm.why_not()
    assert reason is None or "/dev/kvm" in reason
