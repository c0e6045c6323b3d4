"""The daemon's last step before it says that its mount is ready."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from lazymem.cli import mountdaemon
from lazymem.errors import MountError
from lazymem.fs import tuning
from lazymem.fs.mountinfo import Mount
from lazymem.fs.writeback import WritebackPace


async def test_a_mount_that_does_not_answer_is_said_and_never_called_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LazymemError, so a line and an exit code, not a traceback."""
    for name in ("ensure_fusectl", "apply"):
        monkeypatch.setattr(tuning, name, lambda *_: None)
    mounted = Mount(1, "0:1", f"{tmp_path}/gone", "fuse.lazymem", "lazymem", None)
    said: list[tuple[str, ...]] = []
    with pytest.raises(MountError, match=r"the mount on .*/gone does not answer: No such file or directory"):
        await mountdaemon._announce(mounted.path, mounted, said.append, (), WritebackPace(mounted))
    assert said == []


async def test_what_is_said_to_whoever_waits_is_in_the_log_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A command that returns, and a unit that is started, are looked for there at once."""
    for name in ("ensure_fusectl", "apply"):
        monkeypatch.setattr(tuning, name, lambda *_: None)
    monkeypatch.setattr(WritebackPace, "start", lambda _: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    mounted = Mount(1, "0:1", str(tmp_path), "fuse.lazymem", "lazymem", None)
    logged: list[str] = []
    with caplog.at_level("INFO", mountdaemon.log.name):
        await mountdaemon._announce(
            mounted.path, mounted, lambda _: logged.extend(caplog.messages), ("no disk",), WritebackPace(mounted)
        )
    assert logged == [f"{tmp_path} is ready (pid {os.getpid()})", f"{tmp_path}: no disk"]
