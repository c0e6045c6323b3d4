"""lazymem-vm under systemd: its unit is started when the guest can run, and a start that fails is one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.errors import SaveStreamError
from lazymem.vm.guests import build_guest
from tests.support.vmprocess import WAIT_SECONDS, Start

RAM_MIB = 16


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(WAIT_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def nothing_was_said(manager: socket.socket) -> bool:
    """Of a process that has ended."""
    manager.setblocking(False)
    try:
        return not manager.recv(4096)
    except BlockingIOError:
        return True


def test_ready_when_its_guest_runs(start: Start, manager: socket.socket, tmp_path: Path) -> None:
    kernel = build_guest("heartbeat", tmp_path)
    guest = start("-kernel", kernel)
    assert manager.recv(4096).decode() == f"READY=1\nMAINPID={guest.process.pid}"
    with guest.qmp() as qmp:
        assert qmp.command("query-status")["status"] == "running"
    guest.save(f"file:{tmp_path}/vmstate")
    guest.quit()
    resumed = start("-incoming", f"file:{tmp_path}/vmstate")
    assert manager.recv(4096).decode() == f"READY=1\nMAINPID={resumed.process.pid}"
    resumed.wait_ticks(1)
    resumed.quit()


def test_ready_to_be_told_where_its_state_is(start: Start, manager: socket.socket) -> None:
    guest = start("-incoming", "defer")
    assert manager.recv(4096).startswith(b"READY=1")
    guest.quit()


@pytest.mark.parametrize("state", [b"no saved state", b""])
def test_a_state_that_is_refused_is_no_start(
    start: Start, manager: socket.socket, tmp_path: Path, state: bytes
) -> None:
    (tmp_path / "vmstate").write_bytes(state)
    code, _ = start("-incoming", f"file:{tmp_path}/vmstate").end()
    assert code == SaveStreamError.exit_code
    assert nothing_was_said(manager)
