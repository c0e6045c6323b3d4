"""A recording is only a hint: nothing that goes wrong with it ends the mount."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from lazymem.cli.mountrecording import MountRecording
from lazymem.fs.sessionrecord import SessionRecord


class Touches:
    """Records one touch of page 3 as soon as somebody records."""

    def record(self, maybe_log: Any) -> None:
        if maybe_log is not None:
            maybe_log.add(3, 1)


async def test_a_host_without_a_thread_for_it_loses_the_recording_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    client = SimpleNamespace(identity=bytes(32), total_pages=16)
    recording = MountRecording(cast(Any, Touches()), cast(Any, client), 60, None, False, SessionRecord.create())
    monkeypatch.setattr("trio.to_thread.run_sync", refuse)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recording.run)
        with trio.fail_after(60):
            await recording.finish()
            await recording.over.wait()
    assert "the recording is lost" in caplog.text
