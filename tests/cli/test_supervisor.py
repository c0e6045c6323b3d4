"""The supervisor by itself, with daemons that do not start; real ones are in `tests/system/test_mount_survival.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from lazymem.cli import supervisor
from lazymem.cli.supervisor import Supervisor
from lazymem.fs import descriptorstore
from lazymem.fs.descriptorstore import FUSE, RECORD
from lazymem.fs.sessionrecord import SessionRecord


def _supervised(command: list[str]) -> tuple[Supervisor, socket.socket, subprocess.Popen[bytes]]:
    """A supervisor in this process, and the daemon that it looks after."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pidfd = os.pidfd_open(daemon.pid)
    descriptorstore.send(ours, {"DAEMON": daemon.pid, "COMMAND": json.dumps(command), "LOG": ""}, pidfd)
    os.close(pidfd)
    return Supervisor(theirs), ours, daemon


def test_daemons_that_do_not_start_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the connection goes, so that nobody waits for ever."""
    monkeypatch.setattr(supervisor, "MAX_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 3)
    looked_after, control, daemon = _supervised(["--nonsense"])
    read_end, connection = os.pipe()
    with control:
        descriptorstore.put(control, RECORD, SessionRecord.create().descriptor)
        descriptorstore.put(control, FUSE, connection)
        os.close(connection)
        results: list[int] = []
        running = threading.Thread(target=lambda: results.append(looked_after.run()))
        running.start()
        daemon.kill()
        daemon.wait()
        running.join(60)
        assert results == [1]
        assert os.read(read_end, 1) == b"", "nobody has the connection any more"
    looked_after.close()
    os.close(read_end)


def test_a_daemon_without_a_mount_has_no_next_one() -> None:
    looked_after, control, daemon = _supervised(["--nonsense"])
    with control:
        daemon.kill()
        daemon.wait()
        assert looked_after.run() == 0
    looked_after.close()
