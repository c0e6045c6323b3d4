"""Reads of guest RAM as the mount's channel makes them: the short way, and the long one where that is told."""

from __future__ import annotations

from collections.abc import Callable

import trio

from lazymem.errors import LazymemError
from lazymem.store.guestram import GuestRam


async def read_as_channel(
    ram: GuestRam, offset: int, length: int, at_answer: Callable[[], None] = lambda: None
) -> bytes:
    """As `GuestRam.read`. `at_answer` is called in the moment in which the kernel would get the answer: no task has run
    between the last look at the bytes and it."""
    answers: list[bytes | memoryview | LazymemError | None] = []
    arrived = trio.Event()

    def done(answer: bytes | memoryview | LazymemError | None) -> None:
        assert not answers, "one answer a read"
        answers.append(answer)
        at_answer()
        arrived.set()

    length = min(length, ram.size_bytes - offset)
    found = ram.read_soon(offset, length, done) if length > 0 else b""
    if isinstance(found, bytes):
        assert not answers
        at_answer()
        return found
    if found:
        await arrived.wait()
        if isinstance(answers[0], LazymemError):
            raise answers[0]
        if answers[0] is not None:
            return bytes(answers[0])
    data = await ram.read(offset, length)
    at_answer()
    return data
