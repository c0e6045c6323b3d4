"""The processes that the benchmark counts for a mount: all that there are, and none that is not known."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.mountprocesses import bytes_of_each, private_bytes, processes_of, resident_bytes, wait_settled
from bench.way import Mount
from tests.support.mounts import Stage, stage
from tests.support.skips import needs_resend
from tests.support.snapshots import make_snapshot

pytestmark = pytest.mark.system


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path) as made:
        yield made


@needs_resend
def test_daemon_supervisor_and_the_next_daemon_are_counted(mounts: Stage, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snap", pages=64)
    mounted = mounts.mount(mounts.serve(snapshot.folder).address, "--prefetch", "none")
    mount = Mount(mounted.ram_path, started=0.0, ready_seconds=0.0, is_lazymem=True)
    wait_settled(mount)
    found = processes_of(mount)
    assert set(found) - {"fill"} == {"daemon", "supervisor", "next"}
    assert len(set(found.values())) == len(found)
    assert all(0 < private_bytes(pid) < resident_bytes(pid) for pid in found.values())


def test_a_filling_process_may_end_before_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    mount = Mount(Path(), started=0.0, ready_seconds=0.0, is_lazymem=True)
    monkeypatch.setattr("bench.mountprocesses.processes_of", lambda _: {"daemon": os.getpid(), "fill": gone.pid})
    assert set(bytes_of_each(mount, resident_bytes)) == {"daemon"}
    monkeypatch.setattr("bench.mountprocesses.processes_of", lambda _: {"daemon": gone.pid})
    with pytest.raises(FileNotFoundError):
        bytes_of_each(mount, resident_bytes)


def test_a_process_that_nobody_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure would leave it out."""
    ours = {"pid": os.getppid(), "survival": {"kept_by": None, "supervisor_pid": None, "next_pid": None}}
    monkeypatch.setattr(Mount, "status", lambda mount: ours)
    monkeypatch.setattr("bench.mountprocesses._parents", lambda: iter([(2, 1), (os.getppid(), 1), (9, 8), (8, 2)]))
    mount = Mount(Path(), started=0.0, ready_seconds=0.0, is_lazymem=True)
    assert processes_of(mount) == {"daemon": os.getppid()}
    below = [(os.getppid(), 1), (8, os.getppid()), (9, 8)]
    monkeypatch.setattr("bench.mountprocesses._parents", lambda: iter(below))
    with pytest.raises(ValueError, match="process 9, a child of 8"):
        processes_of(mount)
