"""The wish to end on a host that has no thread for us; the rest is on real mounts (`tests/system`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from lazymem.fs import holders, session
from lazymem.fs.channel import Channel
from lazymem.fs.lifetime import Lifetime


async def test_an_unmount_is_tried_again_when_there_is_a_thread(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount goes on meanwhile: a guest may have it."""
    calls: list[str] = []

    async def run_sync(work: Callable[..., object], *arguments: object, abandon_on_cancel: bool) -> object:
        await trio.lowlevel.checkpoint()
        calls.append(work.__name__)
        if len(calls) % 2:
            raise RuntimeError("can't start new thread")
        return work(*arguments)

    def unmount(path: str, *, apart: bool) -> bool:
        return calls.count("_maybe_unmount") >= 5

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    monkeypatch.setattr(session, "unmount", unmount)
    monkeypatch.setattr(holders, "find_holders", lambda device, path: [])
    wish = trio.Event()
    wish.set()
    lifetime = Lifetime("/mnt", "0:99", -1, cast(Channel, None), wish)
    with trio.fail_after(60):
        await lifetime._unmount_when_asked()
    assert calls.count("_maybe_unmount") >= 5
