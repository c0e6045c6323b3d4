"""Blocking work in a thread, on a host that may have none for us (a limit on tasks, no memory for a stack)."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""Who waits tries again this often: soon for a person who raises a limit."""

A = TypeVarTuple("A")
R = TypeVar("R")


class NoThreadError(OSError):
    """EAGAIN. The work was not begun."""


async def in_thread(limiter: trio.CapacityLimiter, work: Callable[[*A], R], *arguments: *A) -> R:
    """What `work` returns. Runs to its end if cancelled.

    Raises:
        NoThreadError: the host has none for us.
    """
    began = False

    def begin() -> R:
        nonlocal began
        began = True
        return work(*arguments)

    try:
        return await trio.to_thread.run_sync(begin, limiter=limiter)
    except RuntimeError as error:  # threading's word for it
        if began:
            raise
        raise NoThreadError(errno.EAGAIN, str(error)) from error


async def in_thread_at_last(limiter: trio.CapacityLimiter, work: Callable[[*A], R], *arguments: *A) -> R:
    """As `in_thread`, for a sync: waits for a thread, and for memory, as what the guest writes does. The kernel would
    tell whoever asked for the sync of a failure, and he has no reason to believe that it passes. `work` may be begun
    more than once.
    """
    waits = False
    while True:
        try:
            found = await in_thread(limiter, work, *arguments)
        except (NoThreadError, MemoryError) as error:
            if not waits:
                waits = True
                log.error("a sync waits (%s): raise the limit on tasks or memory; it goes on by itself then", error)
            await trio.sleep(RETRY_SECONDS)
            continue
        if waits:
            log.warning("the sync that waited for a thread goes on")
        return found
