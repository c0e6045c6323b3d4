"""The QEMU machine protocol's messages: text in, a request or an error out; answers and events as lines. Pure.

Source: QEMU's docs/interop/qmp-spec. What is checked is what QEMU checks, and an error reads as QEMU's does, since
clients show it to people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct, field

MAX_COMMAND_BYTES = 64 * 1024
"""Our longest command is a migrate with a path: 4 KiB. A client that sends more without its end is cut off."""

MAX_NESTING = 64
"""Ours nest three deep. JSON that can just be read may be too deep to be written again, as an answer's id is."""

_KNOWN_MEMBERS = {"execute", "arguments", "id"}


class QmpError(Exception):
    """The answer to a command is an error. `kind` is QMP's class."""

    def __init__(self, description: str, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.description = description
        self.kind = kind


class Request(Struct, frozen=True):
    """A command. `has_id`: the answer repeats `request_id`, which may be any JSON value."""

    command: str
    arguments: Mapping[str, Any]
    request_id: Any = None
    has_id: bool = False


class Signature(Struct, frozen=True):
    """A command's arguments: name to Python type (str, bool, int, list)."""

    required: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)


class Framer:
    """Cuts what a client sends into commands. Nothing but the braces ends one: some clients send no line's end.

    What is no JSON object ends at the end of its line, and so does a string that is still open there, so that after
    nonsense the next line is read afresh.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def overlong(self) -> bool:
        """More than any command has came without an end."""
        return len(self._pending) > MAX_COMMAND_BYTES

    def feed(self, data: bytes) -> list[bytes]:
        """The commands that end within `data`."""
        found = []
        for byte in data:
            self._pending.append(byte)
            if self._ends(byte):
                text = bytes(self._pending).strip()
                if text:
                    found.append(text)
                self._reset()
        return found

    def _reset(self) -> None:
        self._pending.clear()
        self._depth = 0
        self._in_string = self._escaped = False

    def _ends(self, byte: int) -> bool:
        if self._in_string:
            self._in_string = self._escaped or byte != ord('"')
            self._escaped = byte == ord("\\") and not self._escaped
            return byte == ord("\n")
        if byte == ord('"'):
            self._in_string = True
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
            return self._depth <= 0
        return byte == ord("\n") and self._depth == 0


_JSON_NAMES: dict[type, str] = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}


def parse(line: bytes) -> Request:
    """A request, with its form checked but not whether the command exists.

    Raises:
        QmpError: not a command.
    """
    document = _load(line)
    if not isinstance(document, dict):
        raise QmpError("QMP input must be a JSON object")
    unexpected = sorted(set(document) - _KNOWN_MEMBERS)
    if unexpected:
        raise QmpError(f"QMP input member '{unexpected[0]}' is unexpected")
    if "execute" not in document:
        raise QmpError("QMP input lacks member 'execute'")
    if not isinstance(document["execute"], str):
        raise QmpError("QMP input member 'execute' must be a string")
    arguments = document.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return Request(document["execute"], arguments, document.get("id"), "id" in document)


def request_id(line: bytes) -> tuple[Any, bool]:
    """The id of a line that `parse` refused, where it has one: (id, True), else (None, False)."""
    try:
        document = _load(line)
    except QmpError:
        return None, False
    if isinstance(document, dict) and "id" in document:
        return document["id"], True
    return None, False


def _load(line: bytes) -> Any:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QmpError(f"JSON parse error, {error}") from error
    level = [document]
    for _ in range(MAX_NESTING):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return document
    raise QmpError(f"JSON parse error, nested more than {MAX_NESTING} deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check(arguments: Mapping[str, Any], signature: Signature) -> None:
    """Every required argument, no unknown one, each of its type.

    Raises:
        QmpError: with QEMU's words.
    """
    known = {**signature.required, **signature.optional}
    for name, value in arguments.items():
        if name not in known:
            raise QmpError(f"Parameter '{name}' is unexpected")
        wanted = known[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {_JSON_NAMES[wanted]}")
    for name in signature.required:
        if name not in arguments:
            raise QmpError(f"Parameter '{name}' is missing")


def greeting(version: Mapping[str, Any]) -> bytes:
    """What the monitor says first. No capabilities: nothing is out of band, since nothing here is slow in band."""
    return _line({"QMP": {"version": dict(version), "capabilities": []}})


def answer(result: Any, request_id: Any, has_id: bool) -> bytes:
    return _line({"return": result, **({"id": request_id} if has_id else {})})


def error_answer(error: QmpError, request_id: Any, has_id: bool) -> bytes:
    body = {"class": error.kind, "desc": error.description}
    return _line({"error": body, **({"id": request_id} if has_id else {})})


def event(name: str, data: Mapping[str, Any], time_ns: int) -> bytes:
    """`time_ns`: Unix time in nanoseconds."""
    stamp = {"seconds": time_ns // 1_000_000_000, "microseconds": time_ns // 1000 % 1_000_000}
    return _line({"event": name, **({"data": dict(data)} if data else {}), "timestamp": stamp})


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\r\n"
