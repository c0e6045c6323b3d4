"""The QMP client against scripted monitors: answers, events, errors, and what is no monitor."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import CommandError, QmpClient

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@contextmanager
def monitor(*answers: bytes, greeting: bytes = GREETING, split: bool = False) -> Iterator[tuple[Path, list[bytes]]]:
    """A server for one client: after each line that it reads, it sends the next of `answers` ("@" becomes its id)."""
    received: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "qmp")
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                connection.sendall(greeting)
                for answer in (b'{"return": {}, "id": @}\n', *answers):
                    line = lines.readline()
                    if not line:
                        return
                    received.append(line)
                    whole = answer.replace(b"@", str(json.loads(line)["id"]).encode())
                    pieces = [whole[n : n + 1] for n in range(len(whole))] if split else [whole]
                    for piece in pieces:
                        connection.sendall(piece)
                lines.read()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path, received
        finally:
            listener.close()
            thread.join()


def test_command_and_answer() -> None:
    with monitor(b'{"return": {"status": "running"}, "id": @}\n') as (path, received), QmpClient(path) as qmp:
        assert qmp.command("query-status") == {"status": "running"}
        assert qmp.peer_pid == os.getpid()
        assert qmp.peer_uid == os.getuid()
    assert [json.loads(line)["execute"] for line in received] == ["qmp_capabilities", "query-status"]


def test_underscores_become_hyphens() -> None:
    with monitor(b'{"return": {}, "id": @}\n') as (path, received), QmpClient(path) as qmp:
        qmp.command("migrate-set-parameters", max_bandwidth=5)
    assert json.loads(received[1])["arguments"] == {"max-bandwidth": 5}


def test_events_are_kept_wherever_they_come_and_bytes_may_come_one_by_one() -> None:
    early = b'{"event": "STOP", "data": {"a": 1}, "timestamp": {"seconds": 7, "microseconds": 500000}}\r\n'
    answer = early + b'{"return": 1, "id": @}\r\n'
    second = b'{"event": "RESUME"}\n{"return": 2, "id": @}\n'
    with monitor(answer, second, split=True) as (path, _), QmpClient(path) as qmp:
        assert qmp.command("one") == 1
        (stop,) = qmp.take_events()
        assert (stop.name, stop.data, stop.seconds) == ("STOP", {"a": 1}, 7.5)
        assert qmp.command("two") == 2
        assert [event.name for event in qmp.take_events()] == ["RESUME"]
        assert qmp.take_events() == []


@pytest.mark.parametrize("split", [False, True])
def test_what_was_meant_for_the_client_before_may_come_ahead_of_the_greeting(split: bool) -> None:
    early = b'{"return": {}, "id": 1}\n{"event": "RESUME", "timestamp": {"seconds": 5, "microseconds": 0}}\n'
    answer = b'{"return": {"status": "running"}, "id": @}\n'
    with monitor(answer, greeting=early + GREETING, split=split) as (path, _), QmpClient(path) as qmp:
        assert qmp.command("query-status") == {"status": "running"}
        assert [event.name for event in qmp.take_events()] == ["RESUME"]


def test_refused_command() -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "not now"}, "id": @}\n'
    expected = pytest.raises(CommandError, match="refused migrate: not now")
    with monitor(refusal) as (path, _), QmpClient(path) as qmp, expected as caught:
        qmp.command("migrate")
    assert caught.value.kind == "GenericError"


def test_unknown_commands_are_none_and_other_refusals_are_not() -> None:
    unknown = b'{"error": {"class": "CommandNotFound", "desc": "?"}, "id": @}\n'
    generic = b'{"error": {"class": "GenericError", "desc": "?"}, "id": @}\n'
    with monitor(unknown, generic, generic) as (path, _), QmpClient(path) as qmp:
        assert qmp.maybe_command("query-block") is None
        assert qmp.maybe_command("qom-get", path="/machine", property="none") is None
        with pytest.raises(CommandError):
            qmp.maybe_command("query-block")


def test_an_answer_to_an_earlier_command_is_not_taken_for_this_one() -> None:
    """An interrupt takes the client away from an answer; the next command must not get it."""
    late = b'{"return": "of an earlier one", "id": 1}\n{"return": "mine", "id": @}\n'
    with monitor(late) as (path, _), QmpClient(path) as qmp:
        assert qmp.command("query-status") == "mine"


def test_wait_status_asks_until_it_is_so() -> None:
    answers = [b'{"return": {"status": "%s"}, "id": @}\n' % word for word in (b"inmigrate", b"inmigrate", b"running")]
    with monitor(*answers) as (path, received), QmpClient(path) as qmp:
        assert qmp.wait_status(lambda status: status == "running") == "running"
    assert len(received) == 4


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"220 mail.example ESMTP\r\n", "not a monitor"),
        (b"[1, 2]\n", "not a monitor"),
        (b'{"hello": 1}\n', "not a QMP monitor"),
        (b"\xff\xfe\n", "not a monitor"),
    ],
)
def test_what_is_no_monitor_is_said_to_be_none(greeting: bytes, reason: str) -> None:
    with monitor(greeting=greeting) as (path, _), pytest.raises(MonitorError, match=reason):
        QmpClient(path)


def test_a_silent_one_is_given_up() -> None:
    with monitor(greeting=b"") as (path, _), pytest.raises(MonitorError, match="another client holds it"):
        QmpClient(path, timeout_seconds=0.05)


def test_a_connection_that_ends_is_an_error() -> None:
    with monitor() as (path, _), QmpClient(path) as qmp:
        qmp._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(MonitorError, match=r"closed the connection|went away"):
            qmp.command("query-status")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="cannot reach the monitor"):
        QmpClient(tmp_path / "none")
