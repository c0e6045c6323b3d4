"""The QMP monitor: serves `Commands` on a unix socket, in trio's thread. It answers while the vCPU waits for a page.

Several clients at a time, each with its own negotiation; QEMU serves one. A client's commands run in order, so one
whose `stop` waits for a page waits with it; another client still gets answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from lazymem.errors import MonitorError
from lazymem.vm.commands import Commands, version
from lazymem.vm.qmp import (
    MAX_COMMAND_BYTES,
    Framer,
    QmpError,
    Request,
    answer,
    error_answer,
    event,
    greeting,
    parse,
    request_id,
)
from lazymem.vm.runstate import RunState
from lazymem.vm.transport import listen_unix

MAX_CLIENTS = 16
"""A management tool, a person or two, and tests; each costs a task and a buffer."""

_MAX_QUEUED_BYTES = 1 << 20
"""Answers and events wait here for a client that does not read (ours are under 4 KiB, but an answer repeats the
command's id); one that lets so many pile up is cut off."""

_READ_BYTES = 4096

_FINISH_SECONDS = 1
"""For a client that does not read its last lines; the emulator ends all the same."""


class Monitor:
    """Listens when constructed through `listen`; `serve` until cancelled."""

    def __init__(self, listener: trio.SocketListener, path: Path, runstate: RunState) -> None:
        self._listener = listener
        self._path = path
        self._runstate = runstate
        self._sessions: set[_Session] = set()
        self._none_left = trio.Event()

    @classmethod
    async def listen(cls, path: Path, runstate: RunState) -> Monitor:
        """A monitor whose socket is there when this returns.

        Raises:
            MonitorError: the socket cannot be made.
        """
        try:
            return cls(await listen_unix(path), path, runstate)
        except OSError as error:
            raise MonitorError(f"cannot listen for the monitor on {path}: {error.strerror or error}") from error

    async def serve(self, commands: Commands) -> None:
        """Serve clients until cancelled; the socket is gone then."""

        async def client(stream: trio.SocketStream) -> None:
            await self._client(stream, commands)

        try:
            await trio.serve_listeners(client, [self._listener])
        finally:
            self._path.unlink(missing_ok=True)

    async def finish(self) -> None:
        """Let every client have what was said to it, for at most a second, and end its connection."""
        for session in self._sessions:
            session.finish()
        with trio.move_on_after(_FINISH_SECONDS):
            while self._sessions:
                self._none_left = trio.Event()
                await self._none_left.wait()

    async def _client(self, stream: trio.SocketStream, commands: Commands) -> None:
        async with stream:
            if len(self._sessions) >= MAX_CLIENTS:
                return
            session = _Session(stream, commands)
            self._sessions.add(session)
            self._runstate.listen(session.on_event)
            try:
                await session.run()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # The client went away: its own affair.
            finally:
                self._runstate.unlisten(session.on_event)
                self._sessions.discard(session)
                if not self._sessions:
                    self._none_left.set()


class _Session:
    """One client. One task writes, so that lines never mix; the other reads and runs commands."""

    def __init__(self, stream: trio.SocketStream, commands: Commands) -> None:
        self._stream = stream
        self._commands = commands
        self._negotiated = False
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0
        self._ready = trio.Event()
        self._scope = trio.CancelScope()
        self._closing = False
        self._put(greeting(version()))

    def on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if self._negotiated:
            self._put(event(name, data, time.time_ns()))

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                # What was answered is still sent; then the writer ends.
                self.finish()

    def finish(self) -> None:
        """End once everything that was said is sent."""
        self._closing = True
        self._ready.set()

    def _put(self, line: bytes) -> None:
        if self._queued_bytes + len(line) > _MAX_QUEUED_BYTES:
            self._scope.cancel()
            return
        self._lines.append(line)
        self._queued_bytes += len(line)
        self._ready.set()

    async def _write(self) -> None:
        while True:
            while self._lines:
                line = self._lines.popleft()
                self._queued_bytes -= len(line)
                await self._stream.send_all(line)
            if self._closing:
                self._scope.cancel()
                return
            self._ready = trio.Event()
            await self._ready.wait()

    async def _read(self) -> None:
        framer = Framer()
        while data := await self._stream.receive_some(_READ_BYTES):
            for text in framer.feed(data):
                await self._command(text)
            if framer.overlong:
                self._put(error_answer(QmpError(f"a command of over {MAX_COMMAND_BYTES} bytes"), None, False))
                return

    async def _command(self, text: bytes) -> None:
        try:
            request = parse(text)
        except QmpError as error:
            self._put(error_answer(error, *request_id(text)))
            return
        try:
            result = await self._run(request)
        except QmpError as error:
            self._put(error_answer(error, request.request_id, request.has_id))
        else:
            self._put(answer(result, request.request_id, request.has_id))

    async def _run(self, request: Request) -> Any:
        if request.command != "qmp_capabilities":
            if not self._negotiated:
                raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
            return await self._commands.run(request)
        if self._negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if request.arguments.get("enable"):
            raise QmpError("This monitor has no capabilities to enable")
        self._negotiated = True
        return {}
