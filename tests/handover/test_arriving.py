"""The emulator at the destination: when its load has ended, and what is known of a guest whose emulator went away."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import MonitorError
from lazymem.handover.arriving import ArrivingGuest, NeverToldError

Answer = dict[str, Any] | None
"""None: the monitor ends the connection instead."""


def returns(value: Any) -> dict[str, Any]:
    return {"return": value}


def event(name: str, seconds: int = 0, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": 0}}


class Monitor:
    """Answers each command with what `answers` says: messages before the answer, it, and messages behind it."""

    def __init__(self, answers: Callable[[str, int], tuple[list[Any], Answer, list[Any]]]) -> None:
        self.commands: list[str] = []
        self._answers = answers

    def serve(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with suppress(OSError), connection, connection.makefile("rwb") as lines:
            self._send(lines, {"QMP": {}})
            for line in lines:
                request = json.loads(line)
                name = request["execute"]
                self.commands.append(name)
                before, answer, behind = self._answered(name)
                for message in before:
                    self._send(lines, message)
                if answer is None:
                    return
                for message in (answer | {"id": request["id"]}, *behind):
                    self._send(lines, message)

    def _answered(self, name: str) -> tuple[list[Any], Answer, list[Any]]:
        if name == "qmp_capabilities":
            return [], returns({}), []
        return self._answers(name, self.commands.count(name))

    @staticmethod
    def _send(lines: Any, message: dict[str, Any]) -> None:
        lines.write(json.dumps(message).encode() + b"\n")
        lines.flush()


@contextmanager
def arriving(
    folder: Path, answers: Callable[[str, int], tuple[list[Any], Answer, list[Any]]]
) -> Iterator[tuple[ArrivingGuest, Monitor]]:
    monitor = Monitor(answers)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "q"))
        listener.listen(1)
        thread = threading.Thread(target=monitor.serve, args=(listener,), daemon=True)
        thread.start()
        guest = ArrivingGuest(folder / "q")
        try:
            yield guest, monitor
        finally:
            guest.close()
            thread.join(60)


def test_an_emulator_that_is_gone_before_it_is_told_has_not_run_its_guest(tmp_path: Path) -> None:
    with arriving(tmp_path, lambda name, _: ([], None, [])) as (guest, monitor):
        with pytest.raises(NeverToldError):
            guest.run()
        assert "cont" not in monitor.commands


def test_one_that_goes_when_it_is_told_may_have(tmp_path: Path) -> None:
    def answers(name: str, _: int) -> tuple[list[Any], Answer, list[Any]]:
        return ([], None if name == "cont" else returns({"status": "paused"}), [])

    with arriving(tmp_path, answers) as (guest, _), pytest.raises(MonitorError) as caught:
        guest.run()
    assert not isinstance(caught.value, NeverToldError)


@pytest.mark.parametrize("behind", [True, False])
def test_when_it_began_is_what_its_emulator_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, behind: bool
) -> None:
    """Its event may come before the answer to cont, or behind it; no other question is asked for that."""
    monkeypatch.setattr("lazymem.handover.arriving._RESUME_SECONDS", 60.0)
    resumed = [event("RESUME", seconds=77)]

    def answers(name: str, _: int) -> tuple[list[Any], Answer, list[Any]]:
        if name == "cont":
            return ([], returns({}), resumed) if behind else (resumed, returns({}), [])
        return ([event("RESUME", seconds=1)], returns({"status": "paused"}), [])

    with arriving(tmp_path, answers) as (guest, monitor):
        assert guest.run() == 77
        assert monitor.commands[1:] == ["query-status", "cont"]


def test_one_that_is_slow_to_begin_is_waited_for(tmp_path: Path) -> None:
    """Its devices start with it, and may want pages whose source is away."""
    guests: list[ArrivingGuest] = []
    patience: list[float] = []

    def answers(name: str, _: int) -> tuple[list[Any], Answer, list[Any]]:
        if name == "cont":
            patience.append(guests[0]._qmp._timeout_seconds)
            return ([event("RESUME", seconds=5)], returns({}), [])
        return ([], returns({"status": "paused"}), [])

    with arriving(tmp_path, answers) as (guest, _):
        guests.append(guest)
        assert guest.run() == 5
        assert patience[0] > 1e6


def test_a_load_that_is_told_of_is_not_asked_about(tmp_path: Path) -> None:
    """Each question would cost the emulator time that it loads in."""
    loads = {"count": 0}

    def answers(name: str, count: int) -> tuple[list[Any], Answer, list[Any]]:
        if name == "query-migrate-capabilities":
            return ([], returns([{"capability": "events", "state": False}]), [])
        if name == "migrate-incoming":
            (tmp_path / "state").touch()
        if name == "query-status":
            return ([], returns({"status": "inmigrate" if count == 1 else "paused"}), [])
        if name == "query-migrate":
            loads["count"] += 1
            told = [event("MIGRATION", status=status) for status in ("setup", "active", "completed")]
            return ([], returns({"status": "active"}), told)
        return ([], returns({}), [])

    with arriving(tmp_path, answers) as (guest, monitor):
        guest.listen(tmp_path / "state")
        guest.wait_loaded()
        assert monitor.commands.count("query-status") == 2
        assert loads["count"] == 1


@pytest.mark.parametrize("tells", [True, False])
def test_a_load_that_fails(tmp_path: Path, *, tells: bool) -> None:
    def answers(name: str, count: int) -> tuple[list[Any], Answer, list[Any]]:
        if name == "query-migrate-capabilities":
            return ([], returns([{"capability": "events", "state": False}] if tells else []), [])
        if name == "migrate-incoming":
            (tmp_path / "state").touch()
        if name == "query-status":
            return ([], returns({"status": "inmigrate"}), [])
        if name == "query-migrate":
            failed = {"status": "failed", "error-desc": "no such device"}
            told = [event("MIGRATION", status="failed")] if tells else []
            return ([], returns({"status": "active"} if count < 3 else failed), told)
        return ([], returns({}), [])

    with arriving(tmp_path, answers) as (guest, _):
        guest.listen(tmp_path / "state")
        with pytest.raises(MonitorError, match="no such device"):
            guest.wait_loaded()
