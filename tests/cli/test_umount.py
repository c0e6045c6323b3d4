"""`lazymem umount` and who keeps a mount busy. Without a mount: how long a look at one lasts is nobody's to choose."""

from __future__ import annotations

import pytest

from lazymem.cli import umount
from lazymem.errors import BusyError
from lazymem.fs import holders, session
from lazymem.fs.holders import Holder

GUEST = Holder(7, "qemu", "maps")


class Busy:
    """A mount that is busy for the first `times` tries; `found` are who holds it each time that somebody asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, *found: list[Holder]) -> None:
        self.tries = 0
        self._times = times
        self._found = list(found)
        monkeypatch.setattr(session, "unmount", self._unmount)
        monkeypatch.setattr(holders, "find_holders", self._find)

    def _unmount(self, path: str) -> bool:
        self.tries += 1
        return self.tries > self._times

    def _find(self, device: str, path: str) -> list[Holder]:
        return self._found.pop(0) if self._found else []


def test_a_look_at_it_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 3)
    umount._unmount("/mnt", "0:50")
    assert busy.tries == 4


def test_who_holds_it_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 3, [GUEST])
    with pytest.raises(BusyError, match=r"qemu \(pid 7\) maps it"):
        umount._unmount("/mnt", "0:50")
    assert busy.tries == 1


def test_who_comes_meanwhile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Busy(monkeypatch, 9, [], [], [GUEST])
    with pytest.raises(BusyError, match="qemu"):
        umount._unmount("/mnt", "0:50")
    assert busy.tries == 3


def test_whom_nobody_can_see_is_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of another user's."""
    monkeypatch.setattr(umount, "LOOK_SECONDS", 0.1)
    Busy(monkeypatch, 1_000_000)
    with pytest.raises(BusyError, match="somebody"):
        umount._unmount("/mnt", "0:50")
