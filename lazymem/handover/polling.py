"""Waiting for what tells nobody when it comes: another task's state, which is the table's and no event."""

from __future__ import annotations

from collections.abc import Callable

import trio

_PAUSE_SECONDS = 0.02


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; it is asked between other tasks' turns."""
    while not condition():  # noqa: ASYNC110 (this is where it is done, so that it is done nowhere else)
        await trio.sleep(_PAUSE_SECONDS)
