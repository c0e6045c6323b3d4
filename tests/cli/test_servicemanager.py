"""What a mount's process ends with as a unit: 78 only where nobody's RAM is at stake."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazymem.cli import mount
from lazymem.cli.background import Announcer
from lazymem.cli.servicemanager import MISTAKE_EXIT_CODE
from lazymem.errors import LazymemError, MountError, ServerUnreachableError


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """At its first start."""
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setattr(mount, "_check_host", lambda settings: None)
    return monkeypatch


def ends_with(unit: pytest.MonkeyPatch, error: LazymemError, *, ready: bool = False) -> int:
    def daemon(found: object, settings: object, announcer: Announcer) -> int:
        if ready:
            announcer.ready()
        raise error

    unit.setattr(mount, "_daemon", daemon)
    return mount.main(["-f", "--no-supervisor", "127.0.0.1:1", "/mnt"])


def usage() -> object:
    with pytest.raises(SystemExit) as end:
        mount.main(["--nonsense"])
    return end.value.code


def test_a_mistake_at_a_first_start(unit: pytest.MonkeyPatch) -> None:
    assert ends_with(unit, MountError("busy")) == MISTAKE_EXIT_CODE
    assert mount.main(["-f", "--no-supervisor", "--deadline=-1", "127.0.0.1:1", "/mnt"]) == MISTAKE_EXIT_CODE
    assert usage() == MISTAKE_EXIT_CODE


def test_what_passes_is_tried_again(unit: pytest.MonkeyPatch) -> None:
    assert ends_with(unit, ServerUnreachableError("away")) == ServerUnreachableError.exit_code


def test_once_ready_or_with_something_kept_it_is_no_such_code(unit: pytest.MonkeyPatch) -> None:
    assert ends_with(unit, MountError("gone"), ready=True) == MountError.exit_code
    unit.setenv("LISTEN_FDS", "4")
    assert ends_with(unit, MountError("gone")) == MountError.exit_code
    assert usage() == 2


def test_outside_of_a_unit_it_is_the_commands_own(unit: pytest.MonkeyPatch) -> None:
    unit.delenv("NOTIFY_SOCKET")
    assert ends_with(unit, MountError("busy")) == MountError.exit_code
    assert usage() == 2
