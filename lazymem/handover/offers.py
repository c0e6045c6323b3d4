"""Which hand-overs a source has offered, and which of them are void: what whoever comes is told. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from lazymem.handover import messages

_MAX_OFFERS = 200
"""Receivers that came and left before anything was begun; each costs two descriptors until this process ends."""


_MAX_VOID = 64
"""Ids that are remembered, 36 bytes each in a journal's slot. A hand-over that came to nothing adds one, so whoever
held the oldest has been away for 64 of them; he is told that nothing is known of his, and takes nothing for that."""


class Offers:
    """One process's. `handover`: the id of the latest; empty before there is one. `are_open`: another may be begun."""

    def __init__(self, void: Iterable[str] = ()) -> None:
        """`void`: as of `void`, in earlier processes."""
        self.handover = ""
        self.are_open = False
        self.is_untold = False
        """A hand-over is void, and its receiver has not heard so from this process."""
        self._void = dict.fromkeys(void)
        self._replaced = set[str]()
        """Of receivers that left before anything was begun: nothing of a guest can be there. Not in the journal."""
        self._count = 0

    @property
    def void(self) -> list[str]:
        """For the journal, the latest last. Whoever has the state of one of these must not run it, whatever becomes of
        the processes here: the guest went on at its source."""
        return list(self._void)[-_MAX_VOID:]

    def set_void(self, handover: str) -> None:
        """It will never be taken up again; whoever comes back for it is told so."""
        if handover:
            self._void.pop(handover, None)
            self._void[handover] = None
            self.is_untold = True

    def maybe_refusal(self, hello: messages.Hello, *, is_free: bool) -> messages.Message | None:
        """None: it may come in, for the hand-over that it names, or for a new one. `is_free`: the guest is here, and
        nobody else is in."""
        oldest = messages.COMES_BACK_VERSION if hello.handover else messages.VERSION
        if not oldest <= hello.version <= messages.VERSION:
            return messages.No(f"this sender speaks version {messages.VERSION}, the receiver {hello.version}")
        if hello.handover in self._void or hello.handover in self._replaced:
            self.is_untold = False
            return messages.Void("the guest goes on at the source")
        if hello.handover:
            known = hello.handover == self.handover
            return None if known else messages.No("this sender knows nothing of that hand-over", unknown=True)
        if not is_free:
            return messages.No("another receiver is taking this guest")
        if not self.are_open:
            return messages.No("what was begun before is being undone: try again in a moment")
        if self._count >= _MAX_OFFERS:
            return messages.No("too many receivers came and left: start lazymem send again")
        return None

    def begin(self) -> None:
        """A new one."""
        self._count += 1
        if self.handover:
            self._replaced.add(self.handover)
        self.handover = secrets.token_hex(messages.ID_BYTES)
