"""The open requests of one session: whose step is next, and where it is taken, here or where a disk may be waited for.

For the session's thread alone, but for what the pool's threads do in `_cold_step`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager

from lazymem.errors import VerificationError
from lazymem.snapshot.reader import SnapshotReader
from lazymem.wire.messages import Cancelled
from lazymem_server.jobs import Answer, Job, JobQueue, failure
from lazymem_server.limits import ServerLimits
from lazymem_server.output import Lane
from lazymem_server.pace import Pace

SENDS_AHEAD = 2
"""Of long demands, as of guesses, so that the link never runs dry."""

Say = Callable[[Sequence[Answer | Cancelled], Lane], None]


class Steps:
    """Args:
    disks: takes the steps that wait for a disk.
    bulk_turns: held while a step of guessed pages is made: all sessions share it.
    say: takes the answers.
    wake: called by other threads when a step of theirs is done, and `take_warmed` has something to do.
    """

    def __init__(
        self,
        limits: ServerLimits,
        disks: Executor,
        pace: Pace,
        bulk_turns: AbstractContextManager[object],
        say: Say,
        wake: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._disks = disks
        self._pace = pace
        self._bulk_turns = bulk_turns
        self._say = say
        self._wake = wake
        self._queue = JobQueue()
        self._cold: dict[int, Job] = {}
        self._at_disk: dict[int, Future[None]] = {}
        self._cancelled: set[int] = set()
        self._warmed: deque[tuple[Job, list[Answer] | None]] = deque()

    @property
    def has_waiting(self) -> bool:
        """Whether a job waits for its turn here."""
        return bool(self._queue)

    @property
    def is_idle(self) -> bool:
        """Nothing is open, here or at the disks."""
        return not self._queue and not self._cold

    def put(self, job: Job) -> None:
        self._queue.put(job)

    def cancel(self, request_id: int) -> None:
        job = self._queue.maybe_remove(request_id)
        if job is not None:
            self._say([Cancelled(request_id)], _lane(job))
        elif request_id in self._cold:
            self._cancelled.add(request_id)
        # else: the last answer crossed the CANCEL, and is the last word

    def may_step(self, reader: SnapshotReader, unsent_bytes: int) -> tuple[bool, bool, bool]:
        """Whether there is a step of a demand of one frame, of several, or of a guess, that the bounds allow with so
        much unsent. Of long ones no more is made than the socket takes next: a short one could not overtake it."""
        cold, limits = self._cold, self._limits
        if unsent_bytes >= limits.max_unsent_bytes or len(cold) >= limits.max_cold_reads:
            return False, False, False
        serves = reader.serves(background=False)
        short = self._queue.has_short and serves
        long = self._queue.has_long and serves and unsent_bytes < SENDS_AHEAD * self._pace.unsent_bytes
        if unsent_bytes >= limits.max_background_unsent_bytes or not reader.serves(background=True):
            return short, long, False
        return short, long, self._queue.has_background and not any(job.background for job in cold.values())

    def step(self, reader: SnapshotReader, unsent_bytes: int) -> None:
        """One step of the job whose turn it is."""
        short, long, background = self.may_step(reader, unsent_bytes)
        job = self._queue.maybe_next(short=short, long=long, background=background)
        if job is None:
            return
        if job.background:
            with self._bulk_turns:
                started = time.monotonic()
                self._take(job)
                self._note_pace(job, started)
        else:
            self._take(job)
            self._note_demand(job)

    def take_warmed(self) -> None:
        """What the pool's threads have done."""
        while self._warmed:
            job, answers = self._warmed.popleft()
            self._cold_done(job, answers)

    def wait(self) -> None:
        """For the pool's threads to be done with this session's steps."""
        wait(self._at_disk.values())

    def _note_pace(self, job: Job, started: float) -> None:
        if job.data_bytes and job.id not in self._cold:
            now = time.monotonic()
            self._pace.note(now, job.data_bytes, job.wire_bytes, now - started)
            job.data_bytes = 0

    def _note_demand(self, job: Job) -> None:
        if job.data_bytes and job.id not in self._cold:
            self._pace.note_demand(job.wire_bytes)
            job.data_bytes = 0

    def _take(self, job: Job) -> None:
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
        else:
            self._note_demand(job)
        if job.id in self._cancelled:
            self._cancelled.discard(job.id)
            self._say([Cancelled(job.id)], _lane(job))
        else:
            assert answers is not None
            self._give(job, answers)

    def _give(self, job: Job, answers: Sequence[Answer]) -> None:
        self._say(answers, _lane(job))
        if not job.done:
            self._queue.put_back(job)


def _guarded(job: Job, step: Callable[[], list[Answer] | None]) -> list[Answer] | None:
    """A step whose failure is the last answer."""
    try:
        return step()
    except (VerificationError, OSError) as error:
        return [failure(job, error)]


def _lane(job: Job) -> Lane:
    return Lane.BACKGROUND if job.background else Lane.DEMAND
