"""A next daemon tried before an upgrade under systemd; a real one is in `tests/system/test_units_started.py`."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path

import pytest
import trio

from lazymem.cli import trial

WARM = """
import os, socket
assert not {"NOTIFY_SOCKET", "LISTEN_FDS"} & set(os.environ)
control = socket.socket(fileno=int(os.environ["LAZYMEM_SUPERVISOR_FD"]))
control.send(b"WARM=1")
assert control.recv(100) == b""
"""


def objection(*command: str) -> str | None:
    return trio.run(trial.maybe_objection, list(command))


def test_one_that_loads_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is told nothing of the service that it is not."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert objection(sys.executable, "-c", WARM) is None


@pytest.mark.parametrize("program", ["/bin/false", "/bin/true"])
def test_one_that_ends_is_one(program: str) -> None:
    assert objection(program, "--option") == f"the new version's daemon does not start: {program} --option"


def test_one_that_is_not_there_is_one(tmp_path: Path) -> None:
    assert objection(str(tmp_path / "gone")) == f"{tmp_path}/gone cannot be started: No such file or directory"
    (tmp_path / "text").write_text("no program")
    assert "cannot be started: Permission denied" in str(objection(str(tmp_path / "text")))


def test_one_that_says_nothing_is_one_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LOAD_SECONDS", 0.01)
    assert objection("/bin/sleep", "1000") == "the new version's daemon was not loaded within 0.01 s"


def test_no_lack_of_descriptors_or_threads_ends_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def no_thread(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(trio.to_thread, "run_sync", no_thread)
        assert objection("/bin/false") == "/bin/false cannot be started: can't start new thread"
    with monkeypatch.context() as patched:
        patched.setattr(trial, "_start", refuse)
        assert objection("/bin/false") == "/bin/false cannot be started: Too many open files"

    async def without_sockets() -> str | None:
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socketpair", refuse)
            return await trial.maybe_objection(["/bin/false"])

    assert trio.run(without_sockets) == "no next daemon can be tried: Too many open files"


def test_its_command_is_what_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/lazymem-mount", "-f", "a:1", "/mnt"])
    assert trial.own_command() == ["/usr/local/bin/lazymem-mount", "-f", "a:1", "/mnt"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/lazymem/cli/mount.py", "-f"])
    assert trial.own_command() == [sys.executable, "-P", "-m", "lazymem.cli.mount", "-f"]
