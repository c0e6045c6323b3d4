"""The destination's emulator, which this process or one before it has started: reached, let run, and stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from lazymem.errors import LazymemError, MonitorError
from lazymem.handover.arrival import Arriving, Host
from lazymem.handover.arriving import ArrivingGuest, NeverToldError, has_state, maybe_arrived
from lazymem.vm.qmpclient import CommandError

_LOOK_SECONDS = 0.2
"""Between two looks at an emulator that does not answer."""


class NotRunError(MonitorError):
    """The guest was not let run, and it is sure that it was not."""


class EmulatorHere:
    """One hand-over's. One task at a time."""

    def __init__(self, guest: ArrivingGuest | None, arriving: Arriving, host: Host, say: Callable[[str], None]) -> None:
        """`guest` None: an earlier process started it, and `arriving` has where its monitor is."""
        self._guest = guest
        self._arriving = arriving
        self._host = host
        self._say = say

    async def wait_loaded(self) -> None:
        """Until it has its state.

        Raises:
            LazymemError: it could not load it; with what it said.
        """
        guest = self._guest
        assert guest is not None
        try:
            await trio.to_thread.run_sync(guest.wait_loaded, abandon_on_cancel=True)
        except LazymemError as error:
            said = await trio.to_thread.run_sync(self._host.complaint)
            raise MonitorError(f"{error}{': ' if said else ''}{said}") from error

    async def has_state(self) -> bool:
        """Whether it got all of its state under the process before. Waits for a load that is under way."""
        guest = await self._maybe_reach()
        if guest is not None:
            with suppress(MonitorError):
                return await trio.to_thread.run_sync(has_state, guest, abandon_on_cancel=True)
        return False

    async def run(self, *, ask: bool) -> float | None:
        """Let the guest run; when it began, by the emulator's clock. None: it is left standing, as it did at its
        source, or nobody knows whether it began. `ask` whether the emulator is there: one that has just told that it
        has its state is not asked.

        Raises:
            NotRunError: the emulator is gone, or says no.
        """
        guest = await self._maybe_reach() if ask or self._guest is None else self._guest
        if guest is None:
            raise NotRunError("its emulator is gone")
        if not self._arriving.runs:
            return None
        try:
            return await trio.to_thread.run_sync(self._run, guest, abandon_on_cancel=True)
        except NeverToldError as error:
            raise NotRunError("its emulator is gone") from error
        except CommandError as error:
            raise NotRunError(str(error)) from error
        except MonitorError as error:
            self._say(f"the guest was told to run, and its emulator went away: {error}")
            return None

    def _run(self, guest: ArrivingGuest) -> float:
        """A QEMU whose lazymem-vm was killed still answers for a moment, and would take the guest along."""
        if self._host.maybe_exit_code() is not None:
            raise NeverToldError("the emulator has ended")
        return guest.run()

    async def stop(self) -> None:
        """Whatever it says to that."""
        guest = await self._maybe_reach()
        with suppress(MonitorError):
            if guest is not None:
                await trio.to_thread.run_sync(guest.stop, abandon_on_cancel=True)

    async def _maybe_reach(self) -> ArrivingGuest | None:
        """Its monitor, once it answers. None: it is gone, or was never begun; one that is silent is not gone."""
        told = not self._arriving.monitor
        while self._arriving.monitor and await trio.to_thread.run_sync(self._host.maybe_exit_code) is None:
            if self._guest is None:
                self._guest = await trio.to_thread.run_sync(maybe_arrived, Path(self._arriving.monitor))
            if self._guest is not None:
                try:
                    await trio.to_thread.run_sync(self._guest.status, abandon_on_cancel=True)
                except MonitorError:
                    self._guest.close()
                    self._guest = None
                else:
                    return self._guest
            if not told:
                told = True
                self._say("the emulator lives and does not answer: it is waited for")
            await trio.sleep(_LOOK_SECONDS)
        return None
