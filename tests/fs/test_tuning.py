"""The kernel's knobs: only this mount's own files are written."""

import logging
from pathlib import Path

import pytest

from lazymem.fs import tuning


def _sysfs(root: Path, *, minor: int) -> Path:
    for folder in (f"class/bdi/0:{minor}", f"fs/fuse/connections/{minor}"):
        (root / folder).mkdir(parents=True)
    for knob in tuning.knobs(0, minor, sysfs=root):
        knob.path.write_text("untouched")
    return root


def test_every_knob_of_this_mount_and_no_other(tmp_path: Path) -> None:
    _sysfs(tmp_path, minor=39)
    _sysfs(tmp_path, minor=40)
    assert tuning.apply(tuning.knobs(0, 39, sysfs=tmp_path)) == []
    assert (tmp_path / "class/bdi/0:39/strict_limit").read_text() == "0"
    assert (tmp_path / "class/bdi/0:39/max_ratio").read_text() == "100"
    assert {knob.path.read_text() for knob in tuning.knobs(0, 40, sysfs=tmp_path)} == {"untouched"}


def test_what_is_not_permitted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = tuning.knobs(0, 39, sysfs=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert tuning.apply(wanted) == wanted
    assert "dirty throttle stays on" in caplog.text
    assert "run as root" in caplog.text
