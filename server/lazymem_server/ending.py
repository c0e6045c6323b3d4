"""How a session ends."""

from __future__ import annotations

from lazymem.wire.messages import Error


class SessionEnd(Exception):  # noqa: N818  # it is how a session ends, not always an error
    """Ends the session; the text says why. `farewell`: the last frame, if the client should hear one."""

    def __init__(self, reason: str, farewell: Error | None = None) -> None:
        super().__init__(reason)
        self.farewell = farewell
