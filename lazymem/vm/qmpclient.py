"""A small client of the QEMU machine protocol (QMP): one command at a time, events kept aside. Blocking, no threads.

Blocking on purpose: its users (the snapshot command, the demo) do one thing after the other, and an interrupt must
reach them at any point as an ordinary KeyboardInterrupt. The protocol is described in QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec import Struct

from lazymem.errors import MonitorError

_MAX_LINE_BYTES = 64 << 20
"""QEMU's largest answers (query-qmp-schema, query-block of many disks) are some MiB; more is not a monitor."""

_MAX_EVENTS = 10_000
"""Kept events; a monitor that sends more between two looks loses the oldest."""


class Event(Struct, frozen=True):
    """Something the emulator reports by itself. `seconds` is the emulator's clock (Unix time), else our own."""

    name: str
    data: dict[str, Any]
    seconds: float


class CommandError(MonitorError):
    """The emulator said no to a command. `kind` is QMP's error class, such as CommandNotFound or GenericError."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"the emulator refused {command}: {description}")
        self.kind = kind
        self.description = description


class QmpClient:
    """A connection to a monitor's unix socket, ready for commands when constructed.

    Raises:
        MonitorError: nobody listens there, or it is no monitor, or it is busy with another client.
    """

    def __init__(self, path: Path, timeout_seconds: float = 30, *, connection: socket.socket | None = None) -> None:
        """`connection`: one that is there already, which this client then owns; `path` only names it."""
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._events: list[Event] = []
        self._last_id = 0
        self._pending = bytearray()
        self._socket = connection or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        try:
            if connection is None:
                self._socket.connect(str(path))
            self._greet()
        except OSError as error:
            self._socket.close()
            raise MonitorError(f"cannot reach the monitor {path}: {error.strerror or error}") from error
        except MonitorError:
            self._socket.close()
            raise

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the emulator goes on."""
        self._socket.close()

    @property
    def peer_pid(self) -> int | None:
        """The process that listens on the socket, or None where it cannot be seen from here (a container)."""
        pid, _, _ = self._credentials()
        return pid or None

    @property
    def peer_uid(self) -> int:
        """The user that the emulator's socket belongs to."""
        return self._credentials()[1]

    def command(self, name: str, **arguments: Any) -> Any:
        """Runs a command and returns its result. An underscore in an argument's name stands for QMP's hyphen.

        Raises:
            CommandError: the emulator refused it.
            MonitorError: no answer in time, or the connection ended.
        """
        return self._run(name, arguments, [])

    def give(self, name: str, descriptor: int) -> None:
        """The emulator has that descriptor under a name, which is the word for it in ``fd:NAME``; a copy stays here.

        Raises:
            CommandError: it takes none, or none came through (a monitor behind somebody who hands lines on).
            MonitorError: as `command`.
        """
        self._run("getfd", {"fdname": name}, [descriptor])

    def _run(self, name: str, arguments: dict[str, Any], descriptors: list[int]) -> Any:
        self._last_id += 1
        request: dict[str, Any] = {"execute": name, "id": self._last_id}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            line = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._socket, [line], descriptors) if descriptors else 0
            self._socket.sendall(line[sent:])
            answer = self._next_answer(time.monotonic() + self._timeout_seconds)
        except OSError as error:
            raise MonitorError(f"the monitor {self._path} went away during {name}: {error}") from error
        if "error" in answer:
            reason = answer["error"]
            raise CommandError(name, str(reason.get("class", "")), str(reason.get("desc", reason)))
        return answer["return"]

    def maybe_command(self, name: str, **arguments: Any) -> Any:
        """As `command`, but None where the emulator does not know the command or the object it names."""
        try:
            return self.command(name, **arguments)
        except CommandError as error:
            if error.kind in ("CommandNotFound", "DeviceNotFound") or name == "qom-get":
                return None
            raise

    def patience(self, seconds: float) -> float:
        """How long each answer may take from now on; how long it might before. One that comes later is not taken for
        another command's."""
        before, self._timeout_seconds = self._timeout_seconds, seconds
        return before

    def take_events(self) -> list[Event]:
        """The events that came in with the answers since the last call, oldest first."""
        taken, self._events = self._events, []
        return taken

    def next_event(self, timeout_seconds: float) -> Event | None:
        """The oldest event that was not taken; waits for one to come. None: none came in time.

        Raises:
            MonitorError: the emulator ended the connection.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            while not self._events:
                message = self._next_message(deadline)
                if "event" in message:
                    self._keep_event(message)
        except TimeoutError:
            return None
        except OSError as error:
            raise MonitorError(f"the monitor {self._path} went away: {error}") from error
        return self._events.pop(0)

    def wait_status(self, wanted: Callable[[str], bool], timeout_seconds: float = 60) -> str:
        """Asks for the run state until `wanted` says yes to it; returns that state."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            status = str(self.command("query-status")["status"])
            if wanted(status):
                return status
            if time.monotonic() > deadline:
                raise MonitorError(f"the guest is still {status!r} after {timeout_seconds} s")
            time.sleep(0.002)

    def _greet(self) -> None:
        try:
            greeting = self._first_message(time.monotonic() + self._timeout_seconds)
        except TimeoutError:
            raise MonitorError(
                f"{self._path} does not greet as a monitor does: not QMP, or another client holds it (QMP serves one)"
            ) from None
        if "QMP" not in greeting:
            raise MonitorError(f"{self._path} is not a QMP monitor")
        self.command("qmp_capabilities")

    def _first_message(self, deadline: float) -> dict[str, Any]:
        """That is for us. Between the end of one client and the greeting of the next QEMU still tells whoever is
        connected of events, and may answer what the other one had asked."""
        while True:
            message = self._next_message(deadline)
            if "event" in message:
                self._keep_event(message)
            elif "return" not in message and "error" not in message:
                return message

    def _next_answer(self, deadline: float) -> dict[str, Any]:
        while True:
            message = self._next_message(deadline)
            # Another id: the answer to a command that an interrupt took us away from.
            if ("return" in message or "error" in message) and message.get("id", self._last_id) == self._last_id:
                return message
            if "event" in message:
                self._keep_event(message)

    def _keep_event(self, message: dict[str, Any]) -> None:
        stamp = message.get("timestamp") or {}
        seconds = stamp["seconds"] + stamp.get("microseconds", 0) / 1e6 if "seconds" in stamp else time.time()
        self._events.append(Event(str(message["event"]), message.get("data") or {}, seconds))
        del self._events[:-_MAX_EVENTS]

    def _next_message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                raise MonitorError(f"the monitor {self._path} closed the connection")
            self._pending += data
            if len(self._pending) > _MAX_LINE_BYTES:
                raise MonitorError(
                    f"{self._path} sent over {_MAX_LINE_BYTES} bytes without a line's end: not a monitor"
                )
        line, _, rest = self._pending.partition(b"\n")
        self._pending = rest
        try:
            message = json.loads(line)
        except ValueError as error:
            raise MonitorError(f"{self._path} sent a line that is not JSON: not a monitor") from error
        if not isinstance(message, dict):
            raise MonitorError(f"{self._path} sent a line that is no object: not a monitor")
        return message

    def _credentials(self) -> tuple[int, int, int]:
        """Process, user and group of whoever called listen(2) on the socket."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        pid, uid, gid = struct.unpack("iII", raw)
        return pid, uid, gid
