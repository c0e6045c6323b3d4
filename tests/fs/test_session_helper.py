"""The way without root, over fusermount3: what it says, and what happens when it is not there any more."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import MountError
from lazymem.fs import session
from lazymem.fs.session import MountOptions


def test_an_unmount_without_fusermount3_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Anything else would end the daemon that was asked by SIGTERM, with the guest (rule 13)."""
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match="fusermount3"):
        session.unmount(str(tmp_path))


def test_a_comma_in_the_source_is_no_further_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        said.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(MountError):
        session.mount(str(tmp_path), "unix:/run/a\\b,allow_other", MountOptions())
    assert r"fsname=unix:/run/a\\b\,allow_other," in said[said.index("-o") + 1]


def test_a_max_read_that_answers_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    with pytest.raises(MountError, match="max_read can be 262144 at most"):
        session.mount(str(tmp_path), "host:1", MountOptions.parse(["max_read=262145"]))
