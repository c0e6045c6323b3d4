"""The command `lazymem-serve` as a process: ready line, signals, systemd's sockets, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import SnapshotError
from lazymem.pages import PageRange
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ClientConnection
from lazymem.wire.messages import Goodbye, Hello, Message, Welcome
from tests.support.deltas import make_delta
from tests.support.snapshots import make_snapshot
from tests.support.vmprocess import WAIT_SECONDS
from tests.support.wireclient import connected

COMMAND = [sys.executable, "-m", "lazymem_server.app"]


@contextmanager
def running(
    *arguments: str | Path, environment: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which is gone afterwards."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    assert isinstance(found, dict)
    return found


def plain_client(address: str) -> tuple[socket.socket, ClientConnection]:
    host, _, port = address.rpartition(":")
    stream = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
    connection = ClientConnection()
    stream.sendall(connection.send(Hello("")))
    assert isinstance(next_message(stream, connection), Welcome)
    return stream, connection


def next_message(stream: socket.socket, connection: ClientConnection) -> Message | None:
    while (event := connection.next_event()) is NEED_DATA:
        connection.receive_data(stream.recv(65536))
    return None if event is CONNECTION_CLOSED else event


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_goodbye(tmp_path: Path, number: signal.Signals, code: int) -> None:
    snapshot = make_snapshot(tmp_path / "web")
    with running("--listen", "127.0.0.1:0", "--json", snapshot.folder) as process:
        said = ready(process)
        assert said["snapshots"] == ["web"]
        stream, connection = plain_client(said["listening"][0])
        with stream:
            process.send_signal(number)
            assert isinstance(next_message(stream, connection), Goodbye)
            assert next_message(stream, connection) is None
        assert process.wait(WAIT_SECONDS) == code


def test_the_plain_ready_line(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "web")
    socket_path = tmp_path / "s"
    with running("--listen", f"unix:{socket_path}", f"a={snapshot.folder}", snapshot.folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving a, web on unix:{socket_path}\n"
        assert socket_path.stat().st_mode & 0o777 == 0o600
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
        assert not socket_path.exists()


async def test_sockets_from_systemd(tmp_path: Path) -> None:
    """What a `.socket` unit does: descriptors from 3 on, LISTEN_FDS, LISTEN_PID; and READY=1 when it serves."""
    snapshot = make_snapshot(tmp_path / "web", pages=8)
    starter = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "os.execv(sys.executable, [sys.executable, '-m', 'lazymem_server.app', '--json', sys.argv[2]])"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(WAIT_SECONDS)
        process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs here
            [sys.executable, "-c", starter, str(listener.fileno()), str(snapshot.folder)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            pass_fds=[listener.fileno()],
        )
        try:
            host, port = listener.getsockname()
            assert ready(process)["listening"] == [f"{host}:{port}"]
            assert notified.recv(100) == b"READY=1"
            async with connected(f"{host}:{port}") as client:
                assert await client.read(PageRange(0, 8)) == snapshot.ram
        finally:
            process.kill()
            process.communicate()


BAD: list[tuple[list[str], int, str]] = [
    (["{tmp}/missing"], 5, "does not exist"),
    (["{tmp}"], 5, "not a snapshot"),
    (["{tmp}/web/pc.ram"], 5, "not a folder"),
    (["{tmp}/web", "{tmp}/other/web"], 2, "two snapshots are called 'web'"),
    (["a={tmp}/web", "a={tmp}/other/web"], 2, "two snapshots are called 'a'"),
    (["--listen", "nowhere", "{tmp}/web"], 2, "HOST:PORT"),
    (["--listen", "127.0.0.1:99999", "{tmp}/web"], 2, "HOST:PORT"),
    (["--listen", "unix:{tmp}/web/pc.ram", "{tmp}/web"], 2, "not a socket"),
    (["--listen", "unix:{tmp}/no/such/folder", "{tmp}/web"], 2, "No such file"),
    (["--listen", "192.0.2.1:7411", "{tmp}/web"], 2, "cannot listen"),
    ([], 2, "required"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), BAD)
def test_bad_input_is_one_clear_error(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    make_snapshot(tmp_path / "web")
    make_snapshot(tmp_path / "other" / "web")
    before = (tmp_path / "web" / "pc.ram").read_bytes()
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    result = subprocess.run([*COMMAND, *filled], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert result.returncode == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if arguments:
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "web" / "pc.ram").read_bytes() == before


def test_an_address_in_use(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "web")
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.closing(socket.socket(socket.AF_UNIX)) as local:
        local.bind(str(tmp_path / "live"))
        local.listen()
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", f"unix:{tmp_path / 'live'}"):
            command = [*COMMAND, "--listen", address, str(tmp_path / "web")]
            result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
            assert (result.returncode, result.stderr.count("\n")) == (14, 1)
            assert "somebody else listens" in result.stderr
    assert (tmp_path / "live").exists()


def test_pages_never_reach_the_log(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "web", pages=4)
    secret = b"a secret of the guest "
    with running("--listen", "127.0.0.1:0", "--json", snapshot.folder) as process:
        address = ready(process)["listening"][0]
        # Not what the digests say. Before the start it could be taken for a file that lay there long since.
        (snapshot.folder / "pc.ram").write_bytes((secret * 1000)[: 4 * 4096])
        stream, connection = plain_client(address)
        from lazymem.wire.messages import Error, Fetch

        with stream:
            stream.sendall(connection.send(Fetch(1, (PageRange(0, 4),))))
            answer = next_message(stream, connection)
            assert isinstance(answer, Error)
            assert "secret" not in answer.text
        process.terminate()
        _, log = process.communicate(timeout=WAIT_SECONDS)
        assert "page 0 of web is not what it was" in log
        assert "secret" not in log


def test_a_delta_is_served_with_its_parent_or_not_at_all(tmp_path: Path) -> None:
    parent = make_snapshot(tmp_path / "parent" / "web")
    (tmp_path / "deltas").mkdir()
    delta = tmp_path / "deltas" / "web-2"
    make_delta(delta, parent.folder, {3: b"new!" * 1024}, (parent.folder,))
    with running(delta, "--listen", "127.0.0.1:0") as process:
        _, said = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == SnapshotError.exit_code
        assert said.count("\n") == 1
        assert "is not beside it: name its folder with --parent" in said
    with running(delta, "--parent", parent.folder, "--listen", "127.0.0.1:0", "--json") as process:
        assert ready(process)["snapshots"] == ["web-2"]
