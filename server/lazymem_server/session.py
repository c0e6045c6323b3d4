"""One client's connection: greets, reads requests, answers them, and ends. Tasks of a session:

- receive: reads frames and turns them into jobs; stops reading while too much is unsent. A demand that nothing is
  before it answers at once, up to the socket (two task switches less a fault);
- produce: takes one step of one job at a time, demands first, and never waits for a disk;
- cold reads: steps that do wait for a disk, in threads, a few at a time;
- send: hands the most urgent frames to the socket;
- watch: asks a silent client whether it lives.

The connection and the job queue are touched between awaits only. A step of a job in a thread touches that job only.
One step is some 100 us of work, and trio takes the tasks of all sessions in turn: that is the fairness between clients.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from lazymem.errors import RemoteProtocolError, VerificationError
from lazymem.snapshot.reader import SnapshotReader
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ServerConnection, negotiate
from lazymem.wire.messages import (
    WIRE_VERSION,
    Cancel,
    Cancelled,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    Goodbye,
    Hello,
    Limits,
    Message,
    Ping,
    Pong,
    ReadFile,
    Welcome,
)
from lazymem_server.catalog import Catalog
from lazymem_server.jobs import Answer, Job, JobQueue, failure, make_job
from lazymem_server.limits import ServerLimits
from lazymem_server.output import Lane, Output

log = logging.getLogger("lazymem.server")

_REQUESTS = (Fetch, FetchDigests, ReadFile)

RECEIVE_BYTES = 16 * 1024
"""Read from the socket at a time: the largest frame of a client, hundreds of ordinary ones."""


class SessionEnd(Exception):  # noqa: N818  # it is how a session ends, not always an error
    """Ends the session's tasks; the text says why. `farewell`: the last frame, if the client should hear one."""

    def __init__(self, reason: str, farewell: Error | None = None) -> None:
        super().__init__(reason)
        self.farewell = farewell


@dataclass(slots=True)
class Counters:
    """Of one session, or of all together."""

    requests: int = 0
    answered: int = 0
    bytes_sent: int = 0
    refused_pages: int = 0


class Session:
    """One client. `run` returns when it is over, whatever the reason, and closes the stream."""

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        catalog: Catalog,
        limits: ServerLimits,
        threads: trio.CapacityLimiter,
        counters: Counters,
        peer: str,
        send_nowait: Callable[[bytes], int] = lambda data: 0,
    ) -> None:
        """Args:
        send_nowait: hands the socket what it takes at once, and says how much that was; called only when nothing
            else is unsent. Without it all goes through the send task.
        """
        self._stream = stream
        self._send_nowait = send_nowait
        self._catalog = catalog
        self._limits = limits
        self._threads = threads
        self._counters = counters
        self._peer = peer
        self._connection = ServerConnection()
        self._output = Output()
        self._queue = JobQueue()
        self._cold: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        self._heard_at = trio.current_time()
        self._heard = trio.Event()
        self._leaving = False
        self._greeting = trio.CancelScope()
        self._reader: SnapshotReader | None = None

    # ---- life

    async def run(self) -> None:
        reason = "ended"
        try:
            await self._greet()
            async with trio.open_nursery() as nursery:
                for task in (self._receive, partial(self._produce, nursery), self._send, self._watch):
                    nursery.start_soon(task)
        except* SessionEnd as group:
            end = _first_end(group)
            reason = str(end)
            if end.farewell is not None:
                frame = self._connection.send(end.farewell)
                await say_last(self._stream, frame, self._limits.farewell_seconds)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            reason = "the connection broke"
        finally:
            log.info("%s: %s", self._peer, reason)
            await trio.aclose_forcefully(self._stream)

    def stop(self, reason: str) -> None:
        """Say goodbye: open requests are still answered, then the session ends. Before the greeting: at once."""
        if self._leaving:
            return
        self._leaving = True
        self._greeting.cancel()
        if self._reader is not None:
            self._output.put(self._connection.send(Goodbye(reason)), Lane.CONTROL)

    # ---- greeting

    async def _greet(self) -> None:
        self._greeting.deadline = trio.current_time() + self._limits.handshake_seconds
        with self._greeting:
            hello = await self._next_message()
            assert isinstance(hello, Hello), "the state table lets nothing else through first"
            welcome = self._welcome(hello)
            await self._stream.send_all(self._connection.send(welcome))
            self._reader = self._catalog[welcome.name]
        if self._greeting.cancelled_caught:
            raise SessionEnd("the server is ending" if self._leaving else "no whole HELLO in time")

    async def _next_message(self) -> Message:
        while (event := self._event()) is None:
            await self._read_more()
        return event

    def _welcome(self, hello: Hello) -> Welcome:
        version = negotiate(hello)
        if version is None:
            spoken = f"this server speaks wire version {WIRE_VERSION}, the client {hello.version_min}"
            raise SessionEnd(
                "wrong version", Error(0, ErrorCode.UNSUPPORTED_VERSION, f"{spoken}: update the older one")
            )
        found = self._catalog.find(hello.name)
        if found is None:
            text = f"there is no snapshot {hello.name!r} here" if hello.name else "several snapshots here: name one"
            raise SessionEnd(text, Error(0, ErrorCode.NO_SUCH_SNAPSHOT, text))
        name, reader = found
        limits = self._limits
        log.info("%s: takes %s", self._peer, name)
        return Welcome(
            version=version,
            capabilities=self._connection.capabilities(hello.capabilities),
            limits=Limits(limits.max_request_pages, limits.max_request_ranges, limits.max_requests),
            name=name,
            identity=reader.identity,
            ram_bytes=reader.ram_bytes,
            hashed=reader.hashed,
            manifest=reader.manifest_bytes,
            vmstate_bytes=reader.vmstate.size_bytes,
            working_set_bytes=reader.working_set.size_bytes,
        )

    # ---- in

    async def _receive(self) -> None:
        while True:
            await self._output.wait_below(self._limits.max_unsent_bytes)
            message = self._event()
            if message is None:
                await self._read_more()
            elif self._handle(message):
                await trio.lowlevel.checkpoint()  # a step was taken: the other sessions' turn

    async def _read_more(self) -> None:
        self._connection.receive_data(bytes(await self._stream.receive_some(RECEIVE_BYTES)))
        self._heard_at = trio.current_time()
        self._heard.set()

    def _event(self) -> Message | None:
        try:
            event = self._connection.next_event()
        except RemoteProtocolError as error:
            raise SessionEnd(f"dropped: {error}", Error(0, ErrorCode.BAD_REQUEST, str(error))) from error
        if event is CONNECTION_CLOSED:
            raise SessionEnd("the client left")
        return None if event is NEED_DATA else event

    def _handle(self, message: Message) -> bool:
        """Act on a message; whether that took one step of a job."""
        if isinstance(message, _REQUESTS):
            return self._take_request(message)
        if isinstance(message, Cancel):
            self._cancel(message.id)
        elif isinstance(message, Ping):
            self._output.put(self._connection.send(Pong(message.id)), Lane.CONTROL)
        elif isinstance(message, Goodbye):
            self._leaving = True
            self._output.wake()
        return False

    def _take_request(self, request: Fetch | FetchDigests | ReadFile) -> bool:
        self._counters.requests += 1
        assert self._reader is not None
        assert self._connection.welcome is not None
        if self._leaving:
            self._say([Error(request.id, ErrorCode.SHUTTING_DOWN, "the server is ending")], Lane.DEMAND)
            return False
        job = make_job(request, self._reader, self._connection.welcome.capabilities, self._limits)
        if isinstance(job, Error):
            self._say([job], Lane.DEMAND)
            return False
        if not job.background and not self._queue and not self._output.unsent_bytes:
            # Nothing is before it: a demand that the host has in memory needs no other task to be answered.
            answers = _guarded(job, job.step_nowait)
            if answers is not None:
                self._give(job, answers)
                return True
        self._queue.put(job)
        self._output.wake()
        return False

    def _cancel(self, request_id: int) -> None:
        job = self._queue.maybe_remove(request_id)
        if job is not None:
            self._say([Cancelled(request_id)], _lane(job))
        elif request_id in self._cold:
            self._cancelled.add(request_id)
        # else: the last answer crossed the CANCEL, and is the last word

    # ---- out

    async def _produce(self, nursery: trio.Nursery) -> None:
        """One step at a time; each ends in a checkpoint, at which the other sessions have their turn."""
        while True:
            job = self._maybe_next_job()
            if job is None:
                await self._output.wait_changed()
                continue
            answers = _guarded(job, job.step_nowait)
            if answers is None:
                self._cold[job.id] = job
                nursery.start_soon(self._cold_step, job)
            else:
                self._give(job, answers)
            await trio.lowlevel.checkpoint()

    def _maybe_next_job(self) -> Job | None:
        unsent = self._output.unsent_bytes
        room = unsent < self._limits.max_unsent_bytes and len(self._cold) < self._limits.max_cold_reads
        background = unsent < self._limits.max_background_unsent_bytes and not any(
            job.background for job in self._cold.values()
        )
        return self._queue.maybe_next(demand=room, background=room and background)

    async def _cold_step(self, job: Job) -> None:
        answers = await trio.to_thread.run_sync(_guarded, job, job.step, limiter=self._threads)
        del self._cold[job.id]
        if job.id in self._cancelled:
            self._cancelled.discard(job.id)
            self._say([Cancelled(job.id)], _lane(job))
        else:
            assert answers is not None
            self._give(job, answers)
        self._output.wake()

    def _give(self, job: Job, answers: Sequence[Answer]) -> None:
        self._say(answers, _lane(job))
        if not job.done:
            self._queue.put(job)
            self._output.wake()

    def _say(self, answers: Sequence[Answer | Cancelled], lane: Lane) -> None:
        """Send answers of one request: at once if nothing is before them and the socket takes them, else by lanes."""
        frames = []
        for answer in answers:
            frames.append(self._connection.send(answer))
            if isinstance(answer, Error):
                self._note_error(answer)
        self._counters.answered += not self._connection.is_open(answers[-1].id)
        if self._output.unsent_bytes:
            for frame in frames:
                self._output.put(frame, lane)
            return
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        sent = self._send_nowait(data)
        self._counters.bytes_sent += sent
        if self._leaving:
            self._output.wake()  # the send task ends the session after the last answer, also if it did not send it
        if sent < len(data):
            # A frame that was begun goes before everything else; that it takes its followers along costs little.
            self._output.put(data[sent:], Lane.CONTROL if sent else lane)

    def _note_error(self, error: Error) -> None:
        self._counters.refused_pages += error.code == ErrorCode.PAGE_CHANGED
        level = logging.WARNING if error.code >= ErrorCode.IO_ERROR else logging.INFO
        log.log(level, "%s: %s", self._peer, error.text)

    async def _send(self) -> None:
        while True:
            if self._leaving and not self._output.unsent_bytes and not self._connection.open_requests:
                raise SessionEnd("goodbye")
            if not self._output.unsent_bytes:
                await self._output.wait_changed()
                continue
            data = self._output.take_nowait(self._limits.send_bytes)
            with trio.move_on_after(self._limits.send_seconds) as scope:
                await self._stream.send_all(data)
            if scope.cancelled_caught:
                raise SessionEnd("dropped: it takes its answers too slowly")
            self._counters.bytes_sent += len(data)
            self._output.sent()

    async def _watch(self) -> None:
        """A client that we do not read from (too much is unsent) is the send timeout's business, not ours."""
        limits = self._limits
        while True:
            await trio.sleep_until(self._heard_at + limits.idle_seconds)
            if trio.current_time() - self._heard_at < limits.idle_seconds:
                continue
            if self._output.unsent_bytes >= limits.max_unsent_bytes:
                self._heard_at = trio.current_time()
                continue
            self._output.put(self._connection.send(Ping(1)), Lane.CONTROL)
            self._heard = trio.Event()
            with trio.move_on_after(limits.pong_seconds):
                await self._heard.wait()
            if not self._heard.is_set() and self._output.unsent_bytes < limits.max_unsent_bytes:
                raise SessionEnd("dropped: silent, and no answer to a PING")


async def say_last(stream: trio.abc.HalfCloseableStream, frame: bytes, seconds: float) -> None:
    """Send a last frame to a client that is dropped, if it takes it within so many seconds.

    Reads what the client still sends for as long: closing a socket with unread data is a reset, which would overtake
    the frame. Behind an answer that was cut the frame is noise, but such a client was too slow to listen anyway.
    """
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(seconds):
        await stream.send_all(frame)
        await stream.send_eof()
        while await stream.receive_some(RECEIVE_BYTES):
            pass


def _guarded(job: Job, step: Callable[[], list[Answer] | None]) -> list[Answer] | None:
    """A step whose failure is the last answer."""
    try:
        return step()
    except (VerificationError, OSError) as error:
        return [failure(job, error)]


def _lane(job: Job) -> Lane:
    return Lane.BACKGROUND if job.background else Lane.DEMAND


def _first_end(group: BaseExceptionGroup[SessionEnd]) -> SessionEnd:
    """The end that explains most: one with a farewell, else any."""
    ends: list[SessionEnd] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        elif isinstance(error, SessionEnd):
            ends.append(error)
    return next((end for end in ends if end.farewell is not None), ends[0])
