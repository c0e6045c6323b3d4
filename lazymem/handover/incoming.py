"""The device state on its way in: brought to the emulator, told of, and counted.

The source may give its guest while the end of the state is still on its way. So whoever has its word waits for the
rest, and not for ever: a connection that fell silent may never break.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from lazymem.handover.channel import SILENCE_SECONDS, Stream
from lazymem.handover.messages import Message
from lazymem.handover.relay import bring_in
from lazymem.handover.telling import Telling


class Incoming:
    """One hand-over's. `say`: to the source; `fail`: what speaks against this state, said once or more often."""

    def __init__(self, say: Callable[[Message], Awaitable[None]], fail: Callable[[str], None]) -> None:
        self._say = say
        self._fail = fail
        self._stream_bytes = 0
        self._whole = trio.Event()
        self._is_awaited = False
        self._sent = 0
        self._count: int | None = None

    async def bring(self, stream: Stream, emulator: Path, on_whole: Callable[[int], None]) -> None:
        """All of it, into the emulator that listens on the unix socket. `on_whole` gets its bytes when the last one is
        here, in the nursery's own task.

        Raises:
            ExceptionGroup: of what `relay.bring_in` raises.
        """

        async with stream, trio.open_nursery() as nursery:
            telling = Telling(self._say)

            def arrived(total: int) -> None:
                self._stream_bytes = total
                telling.arrived(total)

            def received(count: int) -> None:
                self._count = count
                on_whole(count)
                maybe_difference = self._maybe_difference()
                if maybe_difference is None:
                    self._whole.set()
                else:
                    self._fail(maybe_difference)

            nursery.start_soon(telling.run)
            await bring_in(stream, emulator, received, arrived)
            nursery.cancel_scope.cancel()

    async def wait_whole(self) -> None:
        """Until all of it is here, as far as is known as much as was sent."""
        await self._whole.wait()

    def expect(self, count: int) -> str | None:
        """The source says that it has sent so many bytes; 0: it does not say, or not once more. What speaks against
        that, as far as all is here."""
        self._sent = count or self._sent
        return self._maybe_difference()

    def _maybe_difference(self) -> str | None:
        if self._sent == 0 or self._count is None or self._count == self._sent:
            return None
        return f"of {self._sent} bytes of device state {self._count} arrived"

    async def await_rest(self) -> None:
        """It is all on its way: `fail` hears of it when nothing comes any more. Returns when that is settled."""
        if self._is_awaited:
            return
        self._is_awaited = True
        before = -math.inf
        while not self._whole.is_set():
            if before == self._stream_bytes:
                self._fail(f"the rest of the device state does not come: nothing for {SILENCE_SECONDS:.0f} s")
                return
            before = self._stream_bytes
            with trio.move_on_after(SILENCE_SECONDS):
                await self._whole.wait()
