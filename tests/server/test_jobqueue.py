"""Whose step is next: demands before guesses, short ones before long ones, and nobody for ever behind others."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from lazymem_server.jobs import MOST_SHORT_IN_A_ROW, Answer, Job, JobQueue
from lazymem_server.limits import ServerLimits
from lazymem_server.pace import Pace
from lazymem_server.steps import SENDS_AHEAD
from lazymem_server.steps import Steps as OpenRequests

from lazymem.snapshot.reader import SnapshotReader


class Steps:
    """A job of so many frames."""

    data_bytes = wire_bytes = 0

    def __init__(self, job_id: int, frames: int, *, background: bool = False) -> None:
        self.id = job_id
        self.left = frames
        self.background = background

    @property
    def done(self) -> bool:
        return self.left == 0

    @done.setter
    def done(self, yes: bool) -> None:
        raise AssertionError("it ends by its steps")

    @property
    def is_short(self) -> bool:
        return self.left == 1

    def step_nowait(self) -> list[Answer] | None:
        self.left -= 1
        return []

    def step(self) -> list[Answer]:
        raise AssertionError("nothing waits for a disk")


def taken(queue: JobQueue, steps: int) -> list[int]:
    """The ids of the jobs that get the next steps."""
    found = []
    for _ in range(steps):
        job = queue.maybe_next(short=True, long=True, background=True)
        if job is None:
            break
        job.step_nowait()
        found.append(job.id)
        if not job.done:
            queue.put_back(job)
    return found


def queue_of(jobs: Sequence[Job]) -> JobQueue:
    queue = JobQueue()
    for job in jobs:
        queue.put(job)
    return queue


def test_long_demands_are_answered_one_after_the_other() -> None:
    """Turn by turn the last frame of each would come at the end of all."""
    queue = queue_of([Steps(1, 3), Steps(2, 3), Steps(3, 2)])
    assert taken(queue, 99) == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_fault_waits_for_one_frame_of_a_long_demand() -> None:
    queue = queue_of([Steps(1, 5)])
    assert taken(queue, 2) == [1, 1]
    queue.put(Steps(2, 1))
    queue.put(Steps(3, 1))
    assert taken(queue, 3) == [2, 3, 1]


def test_a_long_demand_comes_to_its_end_whatever_faults() -> None:
    queue = queue_of([Steps(0, 3)])
    waited = []
    for turn in range(1, 100):
        queue.put(Steps(turn, 1))
        waited += taken(queue, 1)
    assert waited[: MOST_SHORT_IN_A_ROW + 1] == [*range(1, MOST_SHORT_IN_A_ROW + 1), 0]
    assert waited.count(0) == 3
    assert len(queue) == 3, "each of its frames put one of the others off"


def test_guesses_get_a_step_each_in_turn_behind_every_demand() -> None:
    queue = queue_of([Steps(1, 2, background=True), Steps(2, 2, background=True), Steps(3, 2), Steps(4, 1)])
    assert taken(queue, 99) == [4, 3, 3, 1, 2, 1, 2]


def test_kinds_that_are_not_allowed_wait() -> None:
    queue = queue_of([Steps(1, 1), Steps(2, 2), Steps(3, 1, background=True)])
    assert (queue.has_short, queue.has_long, queue.has_background) == (True, True, True)
    for short, long, background, wanted in ((False, False, True, 3), (False, True, True, 2), (True, False, False, 1)):
        job = queue.maybe_next(short=short, long=long, background=background)
        assert job is not None
        assert job.id == wanted
        assert queue.maybe_next(short=short, long=long, background=background) is None
    assert not queue


def test_each_kind_can_be_taken_back() -> None:
    queue = queue_of([Steps(1, 1), Steps(2, 2), Steps(3, 1, background=True)])
    for job_id in (1, 2, 3):
        assert queue.maybe_remove(job_id) is not None
        assert queue.maybe_remove(job_id) is None
    assert not queue


class Serves:
    def serves(self, *, background: bool) -> bool:
        return True


def test_no_more_is_made_of_long_demands_than_the_link_takes_next() -> None:
    """Made frames of a lane leave in their order: a short one would wait for them."""
    limits, pace, reader = ServerLimits(), Pace(unsent_bytes=8192), cast(SnapshotReader, Serves())
    with ThreadPoolExecutor(1) as disks:
        requests = OpenRequests(limits, disks, pace, contextlib.nullcontext(), lambda *_: None, lambda: None)
        requests.put(Steps(1, 5))
        assert requests.may_step(reader, SENDS_AHEAD * 8192 - 1) == (False, True, False)
        assert requests.may_step(reader, SENDS_AHEAD * 8192) == (False, False, False)
        requests.put(Steps(2, 1))
        assert requests.may_step(reader, SENDS_AHEAD * 8192) == (True, False, False)
        assert requests.may_step(reader, limits.max_unsent_bytes) == (False, False, False)
