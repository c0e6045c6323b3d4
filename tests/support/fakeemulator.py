"""An emulator's monitor without an emulator: a process of its own that maps a RAM file and changes it while it "runs".

Started as `python -m tests.support.fakeemulator JSON`, JSON being the fields of `Behaviour`. Every command's name goes
to its stdout, one a line; a failing command is chosen by its number, so that a test can go through all of them.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lazymem.demo.processes import child, wait_for_path
from tests.support.mounts import WAIT_SECONDS

VMSTATE = b"QEVM fake device state" * 1000


@dataclass
class Behaviour:
    """`fail_at`: the number (from 1, after the greeting's) of the command that is answered by an error; 0 for none.

    `answers`: command name to the result that it gives instead of the usual one; `errors`: to an error's text (migrate:
    another one is under way then).
    `stall`: migrate never ends.
    `resumed_by_another`: as soon as the save is over, somebody else lets the guest go on (and, with "briefly", stops it
    again).
    `stopped_before`: somebody else stops the guest when migrate begins; by the second look at that it runs again, and
    is saved.
    """

    qmp: str
    ram: str
    size: int
    fail_at: int = 0
    stall: bool = False
    status: str = "running"
    resumed_by_another: str = ""
    stopped_before: bool = False
    answers: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)


@contextmanager
def fake_emulator(behaviour: Behaviour, folder: Path) -> Iterator[FakeEmulator]:
    """A running one; ended by its id."""
    log = folder / f"fake-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "tests.support.fakeemulator", json.dumps(asdict(behaviour))]
    with child(command, log) as process:
        wait_for_path(Path(behaviour.qmp), process, log)
        yield FakeEmulator(process.pid, log, Path(behaviour.ram), Path(behaviour.qmp), process.poll, process.wait)
    Path(behaviour.qmp).unlink(missing_ok=True)


@dataclass
class FakeEmulator:
    pid: int
    log: Path
    ram: Path
    qmp: Path
    poll: Any
    wait: Any

    @property
    def commands(self) -> list[str]:
        return self.log.read_text().split()

    def limits(self) -> list[int]:
        """What it was told to take for its downtime limit, in this order."""
        return [int(word.partition("=")[2]) for word in self.commands if word.startswith("downtime-limit=")]

    def counter(self) -> int:
        """What the guest counts in the first bytes of its RAM."""
        with self.ram.open("rb") as file:
            return int.from_bytes(file.read(8), "little")

    def runs(self) -> bool:
        """Whether the guest changes its RAM (waits up to `WAIT_SECONDS` to see it)."""
        before = self.counter()
        deadline = time.monotonic() + WAIT_SECONDS
        while self.counter() == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def wait_command(self, name: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while name not in self.commands:
            assert time.monotonic() < deadline, f"no {name} in {self.commands}"
            time.sleep(0.001)


class _Monitor:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.status = behaviour.status
        self.migration: dict[str, Any] = {}
        self.capability = False
        self.count = 0
        self.events: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        with open(behaviour.ram, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), behaviour.size)
        threading.Thread(target=self.run_guest, daemon=True).start()

    def run_guest(self) -> None:
        while True:
            with self.lock:
                if self.status == "running":
                    value = int.from_bytes(self.memory[:8], "little") + 1
                    self.memory[:8] = value.to_bytes(8, "little")
            time.sleep(0.0005)

    def serve(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.behaviour.qmp + ".new")
        listener.listen(1)
        # The name appears once somebody listens.
        os.rename(self.behaviour.qmp + ".new", self.behaviour.qmp)
        while True:
            connection, _ = listener.accept()
            with suppress(ConnectionError), connection, connection.makefile("rwb") as lines:  # it may have gone again
                self.session(lines)

    def session(self, lines: Any) -> None:
        self.send(lines, {"QMP": {"version": {}, "capabilities": []}})
        for line in lines:
            request = json.loads(line)
            name, arguments = request["execute"], request.get("arguments", {})
            if name == "qmp_capabilities":
                self.send(lines, {"return": {}, "id": request["id"]})
                continue
            print(name, flush=True)
            self.count += 1
            if name in self.behaviour.errors:
                answer = {"error": {"class": "GenericError", "desc": self.behaviour.errors[name]}}
                if name == "migrate":
                    self.migration = {"status": "active"}
            elif self.count == self.behaviour.fail_at:
                answer = {"error": {"class": "GenericError", "desc": f"told to fail at {name}"}}
            else:
                answer = self.answer(name, arguments)
            for event in self.events:
                self.send(lines, event)
            self.events.clear()
            self.send(lines, answer | {"id": request["id"]})
            if name == "quit" and "return" in answer and name not in self.behaviour.answers:
                sys.exit(0)

    def send(self, lines: Any, message: dict[str, Any]) -> None:
        lines.write(json.dumps(message).encode() + b"\r\n")
        lines.flush()

    def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if name in self.behaviour.answers:
            return {"return": self.behaviour.answers[name]}
        method = getattr(self, "on_" + name.replace("-", "_"), None)
        if method is None:
            return {"error": {"class": "CommandNotFound", "desc": name}}
        answer: dict[str, Any] = method(arguments)
        return answer if "error" in answer else {"return": answer["value"]}

    def on_query_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"value": {"status": self.status}}

    def on_query_memdev(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"value": [{"id": "pc.ram", "size": self.behaviour.size}]}

    def on_qom_get(self, arguments: dict[str, Any]) -> dict[str, Any]:
        known = {"mem-path": self.behaviour.ram, "share": True, "type": "fake-1.0-machine"} | self.behaviour.properties
        if arguments["property"] not in known:
            return {"error": {"class": "GenericError", "desc": "no such property"}}
        return {"value": known[arguments["property"]]}

    def on_query_version(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"value": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": ""}}

    def on_query_migrate(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.behaviour.stopped_before and self.migration.get("status") == "active":
            self.go_on_and_save()
        if self.behaviour.resumed_by_another and self.migration.get("status") == "completed":
            self.on_cont({})
            if self.behaviour.resumed_by_another == "briefly":
                with self.lock:
                    self.status = "paused"
                self.event("STOP")
        return {"value": self.migration}

    def go_on_and_save(self) -> None:
        if self.status == "paused":
            self.on_cont({})
            return
        before = self.counter()
        while self.counter() == before:
            time.sleep(0.001)
        self.save(self.uri)

    def counter(self) -> int:
        with self.lock:
            return int.from_bytes(self.memory[:8], "little")

    def on_query_migrate_capabilities(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"value": [{"capability": "x-ignore-shared", "state": self.capability}]}

    def on_migrate_set_parameters(self, arguments: dict[str, Any]) -> dict[str, Any]:
        print(f"downtime-limit={arguments['downtime-limit']}", flush=True)
        return {"value": {}}

    def on_migrate_set_capabilities(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.migration.get("status") == "active":
            return {"error": {"class": "GenericError", "desc": "There's a migration process in progress"}}
        self.capability = arguments["capabilities"][0]["state"]
        return {"value": {}}

    def on_migrate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.behaviour.stall or self.behaviour.stopped_before:
            self.migration = {"status": "active"}
            self.uri = arguments["uri"]
            if self.behaviour.stopped_before:
                with self.lock:
                    self.status = "paused"
                self.event("STOP")
            return {"value": {}}
        return self.save(arguments["uri"])

    def save(self, uri: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as target:
            target.connect(uri.removeprefix("unix:"))
            with self.lock:
                self.status = "postmigrate"
            self.event("STOP")
            target.sendall(VMSTATE)
        self.migration = {"status": "completed"}
        return {"value": {}}

    def on_migrate_cancel(self, _: dict[str, Any]) -> dict[str, Any]:
        self.migration = {"status": "cancelled"}
        return {"value": {}}

    def on_cont(self, _: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.status = "running"
        self.event("RESUME")
        return {"value": {}}

    def on_quit(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"value": {}}

    def event(self, name: str) -> None:
        seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
        self.events.append({"event": name, "timestamp": {"seconds": seconds, "microseconds": micros}})


if __name__ == "__main__":
    _Monitor(Behaviour(**json.loads(sys.argv[1]))).serve()
