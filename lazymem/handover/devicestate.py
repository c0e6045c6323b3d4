"""The device state on its way out: the emulator sends it through us, and both sides count what it was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from lazymem.errors import MonitorError
from lazymem.handover import messages
from lazymem.handover.channel import Stream
from lazymem.handover.leaving import LeavingGuest
from lazymem.handover.relay import Outgoing, as_plain_socket
from lazymem.vm.migrationsettings import MigrationSettings

_STATE_SECONDS = 600.0
"""For a state to be handed on once its emulator has told that it is sent."""


class StateSending:
    """At most one at a time. `sent_bytes`, `received_bytes`: None until that side has counted."""

    def __init__(self) -> None:
        self._outgoing: Outgoing | None = None
        self._connecting = trio.CancelScope()
        self._is_cut = False
        self._over = trio.Event()
        self._over.set()
        self.sent_bytes: int | None = None
        self.received_bytes: int | None = None

    def begin(self) -> None:
        """It is not over until `end`, whatever becomes of it. From now on it can be cut."""
        self._over = trio.Event()
        self._connecting = trio.CancelScope()
        self._is_cut = False

    def end(self) -> None:
        self._over.set()

    async def wait_over(self) -> None:
        """Until nobody is at the guest's monitor for it."""
        await self._over.wait()

    async def send(
        self,
        guest: LeavingGuest,
        connect: Callable[[], Awaitable[Stream]],
        remember: Callable[[], Awaitable[MigrationSettings]],
        on_stopped: Callable[[float], None],
    ) -> int:
        """How many bytes it was. `connect`: brings the connection for it. `remember`: brings the emulator's settings,
        once they are on the disk. `on_stopped`: as of `LeavingGuest.send`, and in a thread.

        Raises:
            MonitorError: it was not sent; the guest may stand.
            LazymemError: as `connect` and `remember`.
        """
        with self._connecting:
            stream = await connect()
            before = await remember()
        if self._is_cut:  # the guest goes on, and must not be stopped by a migration that begins behind that
            raise MonitorError("the device state was not sent: it was broken off before")
        self._outgoing = outgoing = Outgoing(as_plain_socket(stream))
        await trio.to_thread.run_sync(_sent, guest, outgoing, before, on_stopped)
        return await trio.to_thread.run_sync(outgoing.wait, _STATE_SECONDS)

    def arrived(self, stream_bytes: int) -> None:
        """The destination has so much of the connection."""
        if self._outgoing is not None:
            self._outgoing.pace.arrived(stream_bytes)

    def is_all_but_there(self, seconds: float) -> bool:
        """Whether the emulator has sent all of it, and what is not told to have arrived is what the link delivers in a
        round trip and so many `seconds`. Where nothing is told it never is."""
        return self.sent_bytes is not None and self._outgoing is not None and self._outgoing.is_all_but_there(seconds)

    def cut(self) -> None:
        """End it: whoever writes or waits gets an error; what was not begun yet never is."""
        self._is_cut = True
        self._connecting.cancel()
        if self._outgoing is not None:
            self._outgoing.cut()

    def close(self) -> None:
        if self._outgoing is not None:
            self._outgoing.close()

    def count(self, payload: object) -> bool:
        """What a side has counted; whether both have by now."""
        if isinstance(payload, messages.Received):
            self.received_bytes = payload.state_bytes
        else:
            assert isinstance(payload, int)
            self.sent_bytes = payload
        return self.received_bytes is not None and self.sent_bytes is not None

    @property
    def maybe_difference(self) -> str | None:
        """What speaks against its having arrived, once both have counted."""
        if self.received_bytes == self.sent_bytes:
            return None
        return f"of {self.sent_bytes} bytes of device state {self.received_bytes} arrived"


def _sent(
    guest: LeavingGuest, outgoing: Outgoing, before: MigrationSettings, on_stopped: Callable[[float], None]
) -> None:
    """Its state, into a connection of ours, or into one that an emulator makes which takes none."""
    maybe_uri = guest.maybe_take(outgoing.make_pair())
    uri = maybe_uri if maybe_uri is not None else outgoing.listen(guest.monitor, guest.peer_uid)
    outgoing.start()
    try:
        guest.send(uri, before, on_stopped, outgoing.hurry, outgoing.ahead if maybe_uri is not None else None)
    finally:
        outgoing.hurry()
        outgoing.ahead.close()
