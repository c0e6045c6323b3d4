"""What the kernel and the FUSE library agreed on (INIT), kept so that a killed daemon's successor can agree on it too.

Both say it once only: the kernel at the mount's first request, the library when it gets that. So the first daemon of a
mount notes the request before it hands it over, and the answer before the kernel has it; each later one gives the noted
request to its own library, which must answer the same. Wherever a daemon dies in between, either the kernel's request
was not answered and comes again, or the noted answer is given to it. See record 0014.
"""

from __future__ import annotations

from typing import Protocol

import trio

from lazymem.errors import EnvironmentRefusedError
from lazymem.fs import fuseabi


class InitRecord(Protocol):
    """Outlives this process. Empty: nothing yet."""

    @property
    def init(self) -> bytes:
        """The kernel's request."""
        ...

    @property
    def init_answer(self) -> bytes:
        """The library's answer."""
        ...

    def note_init(self, request: bytes) -> None: ...

    def note_init_answer(self, answer: bytes) -> None: ...


class Agreement:
    """For one daemon's life. `begun`: an earlier daemon may have read requests of this mount, so they must be sent
    again."""

    def __init__(self, record: InitRecord, *, continues: bool = False) -> None:
        """`continues`: there was an earlier daemon, which need not have lived to note the INIT that it had read."""
        self._record = record
        self._asked = 0  # unique of the request that the library has and did not answer
        self._agreed = trio.Event()
        self.begun = continues or bool(record.init)

    def maybe_repeat(self) -> bytes | None:
        """The request for a successor's library, before it gets any other; None: the kernel's own is still to come."""
        if not self._record.init_answer:
            return None
        self._asked = fuseabi.request_unique(self._record.init)
        return self._record.init

    async def wait_agreed(self) -> None:
        """Until the library has answered `maybe_repeat`."""
        await self._agreed.wait()

    def maybe_answer(self, request: bytes) -> bytes | None:
        """Take the kernel's INIT: the answer, if an earlier daemon died before it gave it; None: ask the library."""
        unique = fuseabi.request_unique(request)
        if self._record.init_answer:
            return fuseabi.answered_as(self._record.init_answer, unique)
        self._asked = unique
        self._record.note_init(request)
        return None

    def takes(self, answer: memoryview) -> bool:
        """Look at an answer of the library's; True: it is not for the kernel, which has had it.

        Raises:
            EnvironmentRefusedError: this library agrees on something else.
        """
        if not self._asked or fuseabi.answered_unique(answer) != self._asked:
            return False
        self._asked = 0
        if not self._record.init_answer:
            self._record.note_init_answer(bytes(answer))
            return False
        if not fuseabi.agree(bytes(answer), self._record.init_answer):
            raise EnvironmentRefusedError(
                "this host's libfuse agrees with the kernel on something else than the one did that the mount began "
                "with: install that one again"
            )
        self._agreed.set()
        return True
