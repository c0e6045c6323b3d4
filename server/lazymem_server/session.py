"""One client's connection, in a thread of its own: greets, reads requests, answers them, and ends.

The thread alone touches the connection, the job queue and the output. A turn of its loop waits for the socket, reads
what came, takes one step of one job (demands first), and hands the socket what it takes. Nothing in it waits for a
disk: steps that would go to the server's pool, a few at a time. A demand of a few pages that nothing is before is
answered between two system calls, by `_answer_lone`.

A thread each because a fault waits for it: a scheduler of tasks costs more than all the rest of an answer, and the
kernel is as fair between clients as we could be. `stop` and `cut` are for other threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager

from lazymem.digests import LEAF_PAGES
from lazymem.errors import RemoteProtocolError, VerificationError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.reader import SmallFile, SnapshotReader
from lazymem.wire.codec import encode, raw_head, zero_frame
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ServerConnection
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Digests,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileStored,
    Goodbye,
    Hello,
    Level,
    Message,
    Ping,
    Pong,
    ReadFile,
    StoreFile,
)
from lazymem_server.catalog import Published
from lazymem_server.counters import Counters
from lazymem_server.ending import SessionEnd
from lazymem_server.gate import TLS_BEGINS
from lazymem_server.greeting import find_published, welcome_to
from lazymem_server.jobs import Answer, Job, JobQueue, failure, make_job
from lazymem_server.learning import Learning, Upload
from lazymem_server.limits import ServerLimits
from lazymem_server.linger import Linger
from lazymem_server.outlet import Outlet
from lazymem_server.output import Lane, Piece
from lazymem_server.pace import Pace

log = logging.getLogger("lazymem.server")

_REQUESTS = (Fetch, FetchDigests, ReadFile, StoreFile)
_WANT_DIGESTS = int(FetchFlag.WANT_DIGESTS)
_BACKGROUND = int(FetchFlag.BACKGROUND)

RECEIVE_BYTES = 16 * 1024
"""Read from the socket at a time: the largest frame of a client, hundreds of ordinary ones."""

BULK_BYTES = 64 * 1024
"""Unsent answers of this size are sent in turn with the other sessions' ones."""

LONE_PATIENCE_MS = 1000
"""So long a session that answers faults only may not look at its clock."""

REMEMBERED_DEMANDS = 1024
"""Whoever demands again what it had so few demands ago did not like what it got."""

NO_TLS = "this server speaks no TLS"


class Session:
    """One client. `run` returns when it is over, whatever the reason."""

    def __init__(
        self,
        fd: int,
        catalog: Published,
        limits: ServerLimits,
        disks: Executor,
        peer: str,
        pace: Pace,
        bulk_turns: AbstractContextManager[object],
        writev: Callable[[int, Sequence[Piece]], int] = os.writev,
        maybe_learning: Learning | None = None,
        read: Callable[[int, int], bytes] = os.read,
        begun: bytes = b"",
        maybe_linger_turn: threading.Lock | None = None,
    ) -> None:
        """Args:
        fd: a connected stream socket, not blocking; whoever made it closes it.
        disks: takes the steps that wait for a disk.
        bulk_turns: held while a step of guessed pages is made and sent: all sessions share it.
        writev, read: as those of `os`; other ones for TLS, and for tests.
        maybe_learning: where working sets that clients send go.
        begun: what was read before.
        maybe_linger_turn: as `Linger` takes it; all sessions share it.
        """
        self.counters = Counters()
        self._fd = fd
        self._catalog = catalog
        self._limits = limits
        self._disks = disks
        self._peer = peer
        self._pace = pace
        self._bulk_turns = bulk_turns
        self._maybe_learning = maybe_learning
        self._read_socket = read
        self._begun = begun
        self._maybe_upload: Upload | None = None
        self._working_set: SmallFile | bytes = b""
        self._connection = ServerConnection()
        self._outlet = Outlet(fd, limits, self.counters, writev)
        self._queue = JobQueue()
        self._cold: dict[int, Job] = {}
        self._at_disk: dict[int, Future[None]] = {}
        self._cancelled: set[int] = set()
        self._demanded: dict[int, None] = {}
        self._reader: SnapshotReader | None = None
        self._linger = Linger(maybe_linger_turn or threading.Lock())
        self._lone_pages = limits.demand_frame_pages
        self._buffer = memoryview(bytearray(self._lone_pages * PAGE_SIZE))
        self._one_page = self._buffer[:PAGE_SIZE]
        self._heard = False
        self._unhandled = False  # messages may stand in the connection's buffer
        now = time.monotonic()
        self._ask_at = now + limits.handshake_seconds
        self._asked = False
        self._leaving = False
        # What other threads say; they wake the loop through the descriptor.
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self._stop_reason: str | None = None
        self._is_cut = False
        self._warmed: deque[tuple[Job, list[Answer] | None]] = deque()
        self._poll = select.poll()
        self._poll.register(self._wake_fd, select.POLLIN)
        self._interest = 0

    # ---- for other threads

    def stop(self, reason: str) -> None:
        """Say goodbye: open requests are still answered, then the session ends. Before the greeting: at once."""
        self._stop_reason = reason
        self._wake()

    def look_again(self) -> None:
        """The snapshot's word on whether it serves has changed: requests may have waited for it."""
        self._wake()

    def cut(self) -> None:
        """End at once, whatever is open."""
        self._is_cut = True
        self._wake()

    def close(self) -> None:
        """Let go of what the session itself opened; after `run`, when nobody calls `stop` or `cut` any more."""
        os.close(self._wake_fd)

    def _wake(self) -> None:
        self._woken = True
        os.eventfd_write(self._wake_fd, 1)

    # ---- life

    def run(self) -> bytes:
        """Serve until the end. Returns a last frame that the client should hear, or nothing."""
        reason, farewell = "ended", b""
        try:
            self._poll.register(self._fd, select.POLLIN)
            self._interest = select.POLLIN
            if self._begun:
                self._take(self._begun)
            while True:
                if self._reader is not None and self._is_quiet():
                    self._answer_faults()
                self._turn()
        except SessionEnd as end:
            reason = str(end)
            if end.farewell is not None:
                farewell = self._connection.send(end.farewell)
        except OSError as error:  # of the socket: a job's own end as its answer
            reason = f"the connection broke: {error.strerror}"
        finally:
            log.info("%s: %s", self._peer, reason)
            wait(self._at_disk.values())
        return farewell

    def _is_quiet(self) -> bool:
        """Nothing is open, unsent or said by other threads."""
        if self._woken or self._unhandled or self._leaving or self._cold or self._outlet.stuck_at is not None:
            return False
        return not self._queue and not self._outlet.unsent_bytes and self._interest == select.POLLIN

    def _answer_faults(self) -> None:
        """A guest's faults come one after the other: as long as there is nothing else, wait, read, answer, no more.

        Returns when a request takes the common way (it is then in the connection's buffer, or handled), when something
        else is to be looked at, and when nothing comes for as long as the clock may go unseen.
        """
        linger, poll, read, fd = self._linger, self._poll.poll, self._read_socket, self._fd
        asked = [(fd, select.POLLIN)]
        while linger.poll(poll, LONE_PATIENCE_MS) == asked:
            try:
                data = read(fd, RECEIVE_BYTES)
            except BlockingIOError:
                return
            self._heard = True
            if not self._answer_lone(data):
                self._connection.receive_data(data)
                self._handle_all()
                break
            if self._outlet.unsent_bytes:
                break
        if self._heard:
            self._heard = self._asked = False
            self._ask_at = time.monotonic() + self._limits.idle_seconds

    def _turn(self) -> None:
        """Wait for something to do, and do a bounded part of it."""
        output = self._outlet
        readable = output.unsent_bytes < self._limits.max_unsent_bytes
        interest = (select.POLLIN if readable else 0) | (select.POLLOUT if output.unsent_bytes else 0)
        if interest != self._interest:
            self._poll.modify(self._fd, interest)
            self._interest = interest
        busy = self._woken or (readable and self._unhandled) or (bool(self._queue) and any(self._may_step()))
        found = self._poll.poll(0 if busy else self._patience_ms())
        flags = 0
        for fd, what in found:
            if fd == self._fd:
                flags = what
            else:
                self._woken = True
        if self._woken:
            self._take_word()
        if flags & ~select.POLLOUT:
            if not readable:  # nothing but an error or the end of both directions is told then
                raise SessionEnd("the connection broke")
            self._read()
        elif self._unhandled and readable:
            self._handle_all()
        if self._queue:
            self._step()
        if output.unsent_bytes >= BULK_BYTES:
            with self._bulk_turns:
                output.flush()
        elif output.unsent_bytes:
            output.flush()
        if self._leaving and not output.unsent_bytes and not self._connection.open_requests:
            raise SessionEnd("goodbye")
        if not found or self._reader is None:
            self._look_at_clock()

    def _take_word(self) -> None:
        """What other threads said."""
        self._woken = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        if self._is_cut:
            raise SessionEnd("the server ended at once")
        while self._warmed:
            job, answers = self._warmed.popleft()
            self._cold_done(job, answers)
        if self._stop_reason is not None and not self._leaving:
            if self._reader is None:
                raise SessionEnd("the server is ending")
            self._leaving = True
            self._put(self._connection.send_parts(Goodbye(self._stop_reason)), Lane.CONTROL)

    # ---- time

    def _patience_ms(self) -> int:
        """How long the socket may be silent before the clock has to be looked at."""
        now = time.monotonic()
        until = self._ask_at
        stuck_at = self._outlet.stuck_at
        if stuck_at is not None:
            until = min(until, stuck_at + self._limits.send_seconds)
        return max(0, int((until - now) * 1000) + 1)

    def _look_at_clock(self) -> None:
        now, limits = time.monotonic(), self._limits
        self._outlet.check_pace(now)
        if now < self._ask_at:
            return
        if self._reader is None:
            raise SessionEnd("no whole HELLO in time")
        if self._outlet.unsent_bytes >= limits.max_unsent_bytes:
            self._ask_at = now + limits.idle_seconds  # we do not read from it: the send timeout's business
        elif self._asked:
            raise SessionEnd("dropped: silent, and no answer to a PING")
        else:
            self._asked = True
            self._ask_at = now + limits.pong_seconds
            self._put(self._connection.send_parts(Ping(1)), Lane.CONTROL)

    # ---- in

    def _read(self) -> None:
        try:
            data = self._read_socket(self._fd, RECEIVE_BYTES)
        except BlockingIOError:
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        if self._reader is not None:
            self._asked = False
            self._ask_at = time.monotonic() + self._limits.idle_seconds
            if self._answer_lone(data):
                return
        elif data.startswith(TLS_BEGINS):
            raise SessionEnd(
                "dropped: it speaks TLS, and this server has none", Error(0, ErrorCode.BAD_REQUEST, NO_TLS)
            )
        self._connection.receive_data(data)
        self._handle_all()

    def _answer_lone(self, data: bytes) -> bool:
        """Answer a demand of a few pages that the host has in memory and nothing is before; whether it was one."""
        lone = self._connection.lone_fetch(data)
        if lone is None or self._outlet.unsent_bytes or self._leaving or self._queue:
            return False
        request_id, flags, start, count = lone
        if count > self._lone_pages or start % LEAF_PAGES + count > LEAF_PAGES:
            return False
        if flags & _BACKGROUND or start in self._demanded or self._pace.slow:
            return False
        reader = self._reader
        assert reader is not None
        buffer = self._one_page if count == 1 else self._buffer[: count * PAGE_SIZE]
        held = reader.read_into_nowait(start, count, buffer)
        if held is None:
            return False
        frame = (raw_head(request_id, start, count), buffer) if held else (zero_frame(request_id, start, count),)
        if flags & _WANT_DIGESTS:
            leaf = start // LEAF_PAGES
            frame = (encode(Digests(request_id, Level.LEAF, leaf, reader.leaf(leaf))), *frame)
        self._remember(start)
        counters = self.counters
        counters.requests += 1
        counters.answered += 1
        sent = self._outlet.write(frame)
        if sent < sum(map(len, frame)):
            rest = b"".join(frame)[sent:]  # a copy: the buffer is the next answer's
            self._put((rest,), Lane.CONTROL if sent else Lane.DEMAND)
        return True

    def _remember(self, page: int) -> None:
        demanded = self._demanded
        demanded[page] = None
        if len(demanded) > REMEMBERED_DEMANDS:
            del demanded[next(iter(demanded))]

    def _handle_all(self) -> None:
        """Act on what was received, while the answers that this makes at once are few enough."""
        output, most = self._outlet, self._limits.max_unsent_bytes
        self._unhandled = True
        while output.unsent_bytes < most:
            message = self._event()
            if message is None:
                self._unhandled = False
                return
            self._handle(message)

    def _event(self) -> Message | None:
        try:
            event = self._connection.next_event()
        except RemoteProtocolError as error:
            raise SessionEnd(f"dropped: {error}", Error(0, ErrorCode.BAD_REQUEST, str(error))) from error
        if event is CONNECTION_CLOSED:
            raise SessionEnd("the client left")
        return None if event is NEED_DATA else event

    def _handle(self, message: Message) -> None:
        if isinstance(message, _REQUESTS):
            self._take_request(message)
        elif isinstance(message, Cancel):
            self._cancel(message.id)
        elif isinstance(message, Ping):
            self._put(self._connection.send_parts(Pong(message.id)), Lane.CONTROL)
        elif isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, Goodbye):
            self._leaving = True

    def _greet(self, hello: Hello) -> None:
        name, reader = find_published(hello, self._catalog)
        learns = self._look_at_working_set(reader)
        working_set = self._working_set
        size = len(working_set) if isinstance(working_set, bytes) else working_set.size_bytes
        capabilities = self._connection.capabilities(hello.capabilities, learns=learns, vouches=reader.vouches)
        log.info("%s: takes %s", self._peer, name)
        welcome = welcome_to(name, reader, self._limits, capabilities, size)
        self._put(self._connection.send_parts(welcome), Lane.CONTROL)
        self._reader = reader
        self._ask_at = time.monotonic() + self._limits.idle_seconds

    def _look_at_working_set(self, reader: SnapshotReader) -> bool:
        """The snapshot's own, or else what was learned, stays this client's. Whether one is wanted of it."""
        self._working_set = reader.working_set
        if self._maybe_learning is None or reader.working_set.size_bytes:
            return False
        self._working_set = self._maybe_learning.learned(reader)
        self._maybe_upload = Upload(self._maybe_learning, reader)
        return not self._working_set

    def _take_request(self, request: Fetch | FetchDigests | ReadFile | StoreFile) -> None:
        self.counters.requests += 1
        if self._leaving:
            self._say([Error(request.id, ErrorCode.SHUTTING_DOWN, "the server is ending")], Lane.DEMAND)
            return
        if isinstance(request, StoreFile):
            assert self._maybe_upload is not None, "the connection lets none through that nobody wants"
            self._say([self._maybe_upload.take(request)], Lane.DEMAND)
            return
        reader, welcome = self._reader, self._connection.welcome
        assert reader is not None
        assert welcome is not None
        suspect = self._is_repeated(request)
        job = make_job(
            request, reader, welcome.capabilities, self._limits, self._pace, self._working_set, suspect=suspect
        )
        if isinstance(job, Error):
            self._say([job], Lane.DEMAND)
        else:
            self._queue.put(job)

    def _is_repeated(self, request: Fetch | FetchDigests | ReadFile) -> bool:
        """Whether it demands what was demanded a moment ago. Notes what it demands."""
        if not isinstance(request, Fetch) or request.flags & FetchFlag.BACKGROUND:
            return False
        repeated = False
        for pages in request.ranges:
            repeated |= pages.start in self._demanded
            self._remember(pages.start)
        return repeated

    def _cancel(self, request_id: int) -> None:
        job = self._queue.maybe_remove(request_id)
        if job is not None:
            self._say([Cancelled(request_id)], _lane(job))
        elif request_id in self._cold:
            self._cancelled.add(request_id)
        # else: the last answer crossed the CANCEL, and is the last word

    # ---- jobs

    def _may_step(self) -> tuple[bool, bool]:
        """Whether there is a step of a demand, or of a guess, that the bounds allow now."""
        unsent, cold, limits = self._outlet.unsent_bytes, self._cold, self._limits
        if unsent >= limits.max_unsent_bytes or len(cold) >= limits.max_cold_reads:
            return False, False
        reader = self._reader
        assert reader is not None, "there is no request before the greeting"
        demand = self._queue.has_demand and reader.serves(background=False)
        if unsent >= limits.max_background_unsent_bytes or not reader.serves(background=True):
            return demand, False
        return demand, self._queue.has_background and not any(job.background for job in cold.values())

    def _step(self) -> None:
        """One step of the job whose turn it is."""
        demand, background = self._may_step()
        job = self._queue.maybe_next(demand=demand, background=background)
        if job is None:
            return
        if job.background:
            with self._bulk_turns:
                started = time.monotonic()
                self._take_step(job)
                self._note_pace(job, started)
        else:
            self._take_step(job)

    def _note_pace(self, job: Job, started: float) -> None:
        if job.data_bytes and job.id not in self._cold:
            now = time.monotonic()
            self._pace.note(now, job.data_bytes, job.wire_bytes, now - started)
            job.data_bytes = 0

    def _take_step(self, job: Job) -> None:
        answers = _guarded(job, job.step_nowait)
        if answers is not None:
            self._give(job, answers)
            return
        self._cold[job.id] = job
        self._at_disk[job.id] = self._disks.submit(self._cold_step, job)

    def _cold_step(self, job: Job) -> None:
        """In a thread of the pool."""
        self._warmed.append((job, _guarded(job, job.step)))
        self._wake()

    def _cold_done(self, job: Job, answers: list[Answer] | None) -> None:
        del self._cold[job.id], self._at_disk[job.id]
        if job.background:
            self._note_pace(job, time.monotonic())
        if job.id in self._cancelled:
            self._cancelled.discard(job.id)
            self._say([Cancelled(job.id)], _lane(job))
        else:
            assert answers is not None
            self._give(job, answers)

    def _give(self, job: Job, answers: Sequence[Answer]) -> None:
        self._say(answers, _lane(job))
        if not job.done:
            self._queue.put(job)

    # ---- out

    def _say(self, answers: Sequence[Answer | Cancelled | FileStored], lane: Lane) -> None:
        for answer in answers:
            self._put(self._connection.send_parts(answer), lane)
            if isinstance(answer, Error):
                self._note_error(answer)
        self.counters.answered += not self._connection.is_open(answers[-1].id)

    def _note_error(self, error: Error) -> None:
        self.counters.refused_pages += error.code == ErrorCode.PAGE_CHANGED
        level = logging.WARNING if error.code >= ErrorCode.IO_ERROR else logging.INFO
        log.log(level, "%s: %s", self._peer, error.text)

    def _put(self, frame: Sequence[Piece], lane: Lane) -> None:
        self._outlet.put(frame, lane)


def _guarded(job: Job, step: Callable[[], list[Answer] | None]) -> list[Answer] | None:
    """A step whose failure is the last answer."""
    try:
        return step()
    except (VerificationError, OSError) as error:
        return [failure(job, error)]


def _lane(job: Job) -> Lane:
    return Lane.BACKGROUND if job.background else Lane.DEMAND
