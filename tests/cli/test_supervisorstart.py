"""A supervisor that is forked: when, and what it has of its daemon. Mounts: `system/test_mount_survival.py`."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazymem.cli import supervisorstart
from lazymem.cli.restart import Restart
from lazymem.cli.supervisorstart import NAME, Forked, fork_supervisor, is_wanted
from lazymem.fs import checks, descriptorstore
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE
from tests.support.descriptors import open_descriptors

AGAIN = Restart([], None)

WAIT_SECONDS = 60.0


@contextmanager
def _forked() -> Iterator[Forked]:
    maybe_forked = fork_supervisor(AGAIN)
    assert maybe_forked is not None
    try:
        yield maybe_forked
    finally:
        maybe_forked.to.close()
        os.kill(maybe_forked.pid, signal.SIGKILL)
        os.waitpid(maybe_forked.pid, 0)


def _refusal(forked: Forked) -> str:
    """What it says to an upgrade to a Python that is not there: so it has its hello, and listens."""
    forked.to.settimeout(WAIT_SECONDS)
    descriptorstore.send(forked.to, {"UPGRADE": "/nowhere/python"})
    message = descriptorstore.receive(forked.to)
    assert message is not None, "it ended"
    return message.fields["REFUSED"]


def test_it_listens_in_a_session_of_its_own_and_signals_are_the_daemons_to_obey() -> None:
    with _forked() as forked:
        assert "/nowhere/python" in _refusal(forked)
        assert os.getsid(forked.pid) == forked.pid
        assert Path(f"/proc/{forked.pid}/comm").read_text() == f"{NAME}\n"
        for number in supervisorstart.IGNORED_SIGNALS:
            os.kill(forked.pid, number)
        assert "/nowhere/python" in _refusal(forked)


def test_what_the_daemon_has_open_is_not_open_in_it() -> None:
    """Or a lock, or the word that the mount is ready, would wait for the supervisor's end."""
    read_end, write_end = os.pipe()
    with _forked() as forked:
        _refusal(forked)
        os.close(write_end)
        ready, _, _ = select.select([read_end], [], [], WAIT_SECONDS)
        assert ready, "somebody else has the other end"
        assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_none_where_no_process_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(os, "fork", refuse)
    before = open_descriptors(collect=True)
    assert fork_supervisor(AGAIN) is None
    assert open_descriptors() == before, "nothing stays open"


def test_a_child_that_gets_no_word_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    real_fork, children = os.fork, []

    def fork() -> int:
        child = real_fork()
        children.append(child)
        return child

    def refuse(pid: int) -> int:
        raise OSError("no descriptor left")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert fork_supervisor(AGAIN) is None
    assert os.waitpid(children[0], 0)[1] == 0, "it was not needed, and that is no failure"


def test_only_a_first_daemon_that_nobody_looks_after_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "maybe_no_resend", lambda: None)
    assert is_wanted(in_front=False, wanted=True)
    assert not is_wanted(in_front=True, wanted=True)
    assert not is_wanted(in_front=False, wanted=False)
    monkeypatch.setenv(SUCCESSOR_VARIABLE, "5")
    assert not is_wanted(in_front=False, wanted=True)
    monkeypatch.delenv(SUCCESSOR_VARIABLE)
    monkeypatch.setattr(checks, "maybe_no_resend", lambda: "this kernel is too old")
    assert not is_wanted(in_front=False, wanted=True)
