"""How a session ends, and how its client hears why."""

from __future__ import annotations

import contextlib

import trio

from lazymem.wire.messages import Error

_RECEIVE_BYTES = 16 * 1024


class SessionEnd(Exception):  # noqa: N818  # it is how a session ends, not always an error
    """Ends the session; the text says why. `farewell`: the last frame, if the client should hear one."""

    def __init__(self, reason: str, farewell: Error | None = None) -> None:
        super().__init__(reason)
        self.farewell = farewell


async def say_last(stream: trio.SocketStream, frame: bytes, seconds: float) -> None:
    """Send a last frame to a client that is dropped, if it takes it within so many seconds.

    Reads what the client still sends for as long: closing a socket with unread data is a reset, which would overtake
    the frame. Behind an answer that was cut the frame is noise, but such a client was too slow to listen anyway.
    """
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(seconds):
        await stream.send_all(frame)
        await stream.send_eof()
        while await stream.receive_some(_RECEIVE_BYTES):
            pass
