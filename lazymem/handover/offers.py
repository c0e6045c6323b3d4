"""Which hand-overs a source has offered, and which of them are void: what whoever comes is told. Pure."""

from __future__ import annotations

import secrets

from lazymem.handover import messages

_MAX_OFFERS = 200
"""Receivers that came and left before anything was begun; each costs two descriptors until this process ends."""


class Offers:
    """One process's. `handover`: the id of the latest; empty before there is one. `are_open`: another may be begun."""

    def __init__(self) -> None:
        self.handover = ""
        self.are_open = False
        self.was_told = False
        """Somebody came back for one that is void, or heard so."""
        self._void = set[str]()
        self._count = 0

    @property
    def has_void(self) -> bool:
        return bool(self._void)

    def set_void(self, handover: str) -> None:
        """It will never be taken up again; whoever comes back for it is told so."""
        if handover:
            self._void.add(handover)

    def maybe_refusal(self, hello: messages.Hello, *, is_free: bool) -> messages.Message | None:
        """None: it may come in, for the hand-over that it names, or for a new one. `is_free`: the guest is here, and
        nobody else is in."""
        if hello.version != messages.VERSION:
            return messages.No(f"this sender speaks version {messages.VERSION}, the receiver {hello.version}")
        if hello.handover in self._void:
            self.was_told = True
            return messages.Void("the guest goes on at the source")
        if hello.handover:
            known = hello.handover == self.handover
            return None if known else messages.No("this sender knows nothing of that hand-over", unknown=True)
        if not (is_free and self.are_open):
            return messages.No("another receiver is taking this guest")
        if self._count >= _MAX_OFFERS:
            return messages.No("too many receivers came and left: start lazymem send again")
        return None

    def begin(self) -> None:
        """A new one."""
        self._count += 1
        self.handover = secrets.token_hex(messages.ID_BYTES)
