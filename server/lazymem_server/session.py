"""One client's connection, in a thread of its own: greets, reads requests, answers them, and ends.

The thread alone touches the connection, the job queue and the output. A turn of its loop waits for the socket, reads
what came, takes one step of one job (demands first), and hands the socket what it takes. Nothing in it waits for a
disk: steps that would go to the server's pool, a few at a time. A demand of a few pages that nothing is before is
answered between two system calls (`shortway`).

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
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager

from lazymem.errors import RemoteProtocolError
from lazymem.snapshot.reader import SmallFile, SnapshotReader
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ServerConnection
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileStored,
    Goodbye,
    Hello,
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
from lazymem_server.jobs import Answer, make_job
from lazymem_server.learning import Learning, Upload
from lazymem_server.limits import ServerLimits
from lazymem_server.linger import Linger
from lazymem_server.outlet import Outlet
from lazymem_server.output import Lane, Piece
from lazymem_server.pace import MOST_UNSENT_BYTES, Pace
from lazymem_server.shortway import RecentDemands, ShortWay
from lazymem_server.steps import Steps

log = logging.getLogger("lazymem.server")

_REQUESTS = (Fetch, FetchDigests, ReadFile, StoreFile)

RECEIVE_BYTES = 16 * 1024
"""Read from the socket at a time: the largest frame of a client, hundreds of ordinary ones."""

BULK_BYTES = 64 * 1024
"""Unsent answers of this size are sent in turn with the other sessions' ones."""

LONE_PATIENCE_MS = 1000
"""So long a session that answers faults only may not look at its clock."""

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
        allow_unsent: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Args:
        fd: a connected stream socket, not blocking; whoever made it closes it.
        disks: takes the steps that wait for a disk.
        bulk_turns: held while a step of guessed pages is made and sent: all sessions share it.
        writev, read: as those of `os`; other ones for TLS, and for tests.
        maybe_learning: where working sets that clients send go.
        begun: what was read before.
        maybe_linger_turn: as `Linger` takes it; all sessions share it.
        allow_unsent: tells the kernel how many bytes it may have that the link has no room for.
        """
        self.counters = Counters()
        self._fd = fd
        self._catalog = catalog
        self._limits = limits
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
        self._steps = Steps(limits, disks, pace, bulk_turns, self._say, self._wake)
        self._demands = RecentDemands()
        self._short_way = ShortWay(
            self._connection, self._outlet, self.counters, pace, self._demands, limits.demand_frame_pages
        )
        self._allow_unsent = allow_unsent
        self._unsent_allowed = MOST_UNSENT_BYTES
        self._reader: SnapshotReader | None = None
        self._linger = Linger(maybe_linger_turn or threading.Lock())
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
            self._steps.wait()
        return farewell

    def _is_quiet(self) -> bool:
        """Nothing is open, unsent or said by other threads."""
        if self._woken or self._unhandled or self._leaving or self._outlet.stuck_at is not None:
            return False
        return self._steps.is_idle and not self._outlet.unsent_bytes and self._interest == select.POLLIN

    def _may_go_short(self) -> bool:
        """Nothing is before a demand that comes now."""
        return not (self._outlet.unsent_bytes or self._leaving or self._steps.has_waiting)

    def _answer_faults(self) -> None:
        """A guest's faults come one after the other: as long as there is nothing else, wait, read, answer, no more.

        Returns when a request takes the common way (it is then in the connection's buffer, or handled), when something
        else is to be looked at, and when nothing comes for as long as the clock may go unseen.
        """
        poll, read, fd, answer = self._poll.poll, self._read_socket, self._fd, self._short_way.answer
        linger, reader = self._linger, self._reader
        assert reader is not None, "there is no request before the greeting"
        asked = [(fd, select.POLLIN)]
        while linger.poll(poll, LONE_PATIENCE_MS) == asked:
            try:
                data = read(fd, RECEIVE_BYTES)
            except BlockingIOError:
                return
            self._heard = True
            if not answer(data, reader):
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
        untried = output.unsent_bytes and output.stuck_at is None  # the kernel takes more than what it says it would
        busy = self._woken or untried or (readable and self._unhandled)
        busy = busy or (self._steps.has_waiting and any(self._may_step()))
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
        if self._steps.has_waiting:
            assert self._reader is not None, "there is no request before the greeting"
            self._steps.step(self._reader, output.unsent_bytes)
        if output.unsent_bytes >= BULK_BYTES:
            with self._bulk_turns:
                self._flush()
        elif output.unsent_bytes:
            self._flush()
        if self._leaving and not output.unsent_bytes and not self._connection.open_requests:
            raise SessionEnd("goodbye")
        if not found or self._reader is None:
            self._look_at_clock()

    def _may_step(self) -> tuple[bool, bool, bool]:
        assert self._reader is not None, "there is no request before the greeting"
        return self._steps.may_step(self._reader, self._outlet.unsent_bytes)

    def _take_word(self) -> None:
        """What other threads said."""
        self._woken = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        if self._is_cut:
            raise SessionEnd("the server ended at once")
        self._steps.take_warmed()
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
            if self._may_go_short() and self._short_way.answer(data, self._reader):
                return
        elif data.startswith(TLS_BEGINS):
            raise SessionEnd(
                "dropped: it speaks TLS, and this server has none", Error(0, ErrorCode.BAD_REQUEST, NO_TLS)
            )
        self._connection.receive_data(data)
        self._handle_all()

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
            self._steps.cancel(message.id)
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
        capabilities = self._connection.capabilities(
            hello.capabilities, learns=learns, vouches=reader.vouches, sums=bool(reader.sums.size_bytes)
        )
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
            self._steps.put(job)

    def _is_repeated(self, request: Fetch | FetchDigests | ReadFile) -> bool:
        """Whether it demands what was demanded a moment ago. Notes what it demands."""
        if not isinstance(request, Fetch) or request.flags & FetchFlag.BACKGROUND:
            return False
        repeated = False
        for pages in request.ranges:
            repeated |= pages.start in self._demands
            self._demands.note(pages.start)
        return repeated

    # ---- out

    def _flush(self) -> None:
        """As much as the link takes soon: what the kernel has, nothing more urgent overtakes."""
        most = self._pace.unsent_bytes
        if most != self._unsent_allowed:
            self._unsent_allowed = most
            self._allow_unsent(min(most, self._limits.socket_unsent_bytes))
        self._outlet.flush(most)

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
