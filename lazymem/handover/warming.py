"""Pre-copy at the source: pages of the guest, which still runs, go to the receiver as candidates before it is ready.

What goes wrong here is no failure of the hand-over: the receiver says READY when this ends, however it ends.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from lazymem.handover.channel import Stream

NICENESS = 19
"""Of who reads the guest's RAM: beside a guest that wants the same processor it gets a 70th of it. (SCHED_IDLE would be
a 340th, and on a busy host nothing would ever go ahead.)"""

_CHUNK_BYTES = 64 * 1024
"""A pipe's worth."""

_SILENCE_SECONDS = 60.0
"""For a receiver to take something; one with a slow disk takes little at a time."""


@asynccontextmanager
async def _reader(ram: Path, seconds: float) -> AsyncIterator[trio.Process]:
    """The process that reads it (`runningram`); killed in the end, which harms nothing."""
    command = [sys.executable, "-m", "lazymem.handover.runningram", str(ram), f"{seconds:g}", str(NICENESS)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()


class Warming:
    """`seconds` 0: none is offered. One connection at a time, and one a hand-over."""

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self.seconds = seconds
        self._say = say
        self._scope: trio.CancelScope | None = None
        self._for = ""

    async def send(self, ram: Path, stream: Stream, handover: str) -> None:
        """What there is of `ram`, to the end of the time; `stream` is then at its end."""
        if not self.seconds or self._scope is not None or self._for == handover:
            return
        self._for = handover
        self._say(f"the guest runs on, for {self.seconds:g} s at most, while its pages go ahead of it")
        sent = 0
        try:
            with trio.move_on_after(self.seconds) as self._scope:
                async with _reader(ram, self.seconds) as process:
                    assert process.stdout is not None
                    while data := await process.stdout.receive_some(_CHUNK_BYTES):
                        with trio.fail_after(_SILENCE_SECONDS):
                            await stream.send_all(data)
                        sent += len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as error:
            self._say(f"no more pages go ahead of the guest: {error or type(error).__name__}")
        finally:
            self._scope = None
        self._say(f"{sent / (1 << 20):.1f} MiB went ahead of the guest")

    def cut(self) -> None:
        """The receiver is ready, and the link the device state's."""
        if self._scope is not None:
            self._scope.cancel()
