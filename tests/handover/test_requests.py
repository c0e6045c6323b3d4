"""What is asked of a hand-over by hand, where the disk refuses: the guest's hand-over goes on."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lazymem.errors import StoreError
from lazymem.handover import requests
from lazymem.handover.requests import Asked, ask


async def test_an_answer_that_finds_no_room_is_said_and_the_next_one_given(
    autojump_clock: MockClock,
    tmp_path: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = 0

    async def act() -> tuple[bool, str]:
        nonlocal done
        done += 1
        return True, f"done {done}"

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def asked() -> None:
        (tmp_path / "request").write_bytes(b"reclaim")
        await trio.sleep(2 * requests.LOOK_SECONDS)

    nursery.start_soon(Asked(tmp_path, "reclaim", act).watch)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(requests, "_put", full)
        await asked()
    assert "is not told (No space left on device): done 1" in caplog.text
    await asked()
    await trio.testing.wait_all_tasks_blocked()
    assert b"done 2" in (tmp_path / "answer").read_bytes()
    nursery.cancel_scope.cancel()


def test_who_cannot_ask_hears_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot ask in .*: No such file or directory"):
        ask(tmp_path / "nothing", "reclaim", 1.0)
