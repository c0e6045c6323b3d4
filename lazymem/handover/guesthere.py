"""The guest at the source, from the source's one loop: its emulator's settings are kept, and it goes on or ends.

Its migration settings are in the journal before they are changed for a hand-over, and leave it when they are set back.
So whoever comes to let the guest go on has what the first one found, and never takes a hand-over's for the user's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from lazymem.errors import MonitorError, StoreError
from lazymem.handover.departure import Leaving
from lazymem.handover.leaving import LeavingGuest
from lazymem.vm.migrationsettings import MigrationSettings


class GuestHere:
    """One source's. `write`: what stands in its journal, on the disk when it returns, the guest being here.

    One task at a time: a monitor serves one thread.
    """

    def __init__(
        self, maybe_guest: LeavingGuest | None, write: Callable[[], Awaitable[None]], say: Callable[[str], None]
    ) -> None:
        """`maybe_guest` None: its emulator is gone."""
        self._maybe_guest = maybe_guest
        self._write = write
        self._say = say

    @property
    def guest(self) -> LeavingGuest:
        assert self._maybe_guest is not None, "nobody hands over a guest that is gone"
        return self._maybe_guest

    async def remember(self, leaving: Leaving) -> MigrationSettings:
        """Its emulator's migration settings, once they are on the disk. What an earlier hand-over could not set back is
        not its user's: then these are still the ones before that.

        Raises:
            LazymemError: the emulator does not say, or they could not be written.
        """
        if leaving.settings_before is None:
            leaving.settings_before = await trio.to_thread.run_sync(self.guest.settings)
            await self._write()
        return leaving.settings_before

    async def go_on(self, leaving: Leaving) -> str | None:
        """With the settings that it had. Returns why it does not, if it does not."""
        guest, before = self._maybe_guest, leaving.settings_before
        if guest is None:
            return "the guest's emulator is gone: nothing goes on here"
        try:
            maybe_refusal = await trio.to_thread.run_sync(lambda: guest.go_on(run=leaving.was_running, before=before))
        except MonitorError as error:
            return f"the guest cannot go on here: {error}"
        if before is not None and self._is_set_back(leaving, maybe_refusal):
            with suppress(StoreError):  # then they are set back once more by whoever comes next
                await self._write()
        return None

    async def settle(self, leaving: Leaving) -> None:
        """The guest runs elsewhere. Should it crash there, its user may let it go on here, by its monitor alone."""
        guest, before = self._maybe_guest, leaving.settings_before
        if guest is None or before is None:
            return
        with suppress(MonitorError):  # gone: so are its settings
            self._is_set_back(leaving, await trio.to_thread.run_sync(guest.set_back, before))

    def _is_set_back(self, leaving: Leaving, maybe_refusal: str | None) -> bool:
        if maybe_refusal is not None:
            self._say(f"its emulator's migration settings are not what they were: {maybe_refusal}")
            return False
        leaving.settings_before = None
        return True

    async def end(self) -> None:
        """Its emulator."""
        if self._maybe_guest is not None:
            await trio.to_thread.run_sync(self._maybe_guest.quit)
