"""The daemon's last step before it says that its mount is ready."""

from __future__ import annotations

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
