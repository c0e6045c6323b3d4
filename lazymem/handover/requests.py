"""What the user asks of a hand-over by hand, from another process: a file in its journal's folder, and the answer.

Whoever may write there may decide where the guest runs; the journal refuses a folder that others can write to.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio
from msgspec import Struct

from lazymem.errors import BusyError, StoreError
from lazymem.handover.journal import is_held

log = logging.getLogger(__name__)

_REQUEST = "request"
_ANSWER = "answer"
_POLL_SECONDS = 0.05
_MAX_BYTES = 8192

_STALE_SECONDS = 60.0
"""Nobody waits longer; what is older was left by an asker that was killed, and must not decide anything later."""

LOOK_SECONDS = 0.2
"""Between two looks of the process that is asked."""


class Answer(Struct, frozen=True):
    done: bool
    text: str


def ask(folder: Path, word: str, seconds: float) -> Answer:
    """Have the process that holds the journal do it.

    Raises:
        BusyError: it does not answer, or has ended.
        StoreError: it cannot be asked: the disk refuses.
    """
    try:
        (folder / _ANSWER).unlink(missing_ok=True)
        _put(folder / _REQUEST, word.encode())
    except OSError as error:
        raise StoreError(f"cannot ask in {folder}: {error.strerror}") from error
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            is_alone = not is_held(folder)  # before the look: its last act may be to answer
            with suppress(OSError, ValueError, KeyError):
                answer = json.loads((folder / _ANSWER).read_bytes()[:_MAX_BYTES])
                return Answer(bool(answer["done"]), str(answer["text"]))
            if is_alone:
                raise BusyError(f"the process that was at this hand-over ({folder}) has ended meanwhile: ask again")
            time.sleep(_POLL_SECONDS)
    finally:
        (folder / _REQUEST).unlink(missing_ok=True)
        (folder / _ANSWER).unlink(missing_ok=True)
    raise BusyError(f"the process that is at this hand-over ({folder}) does not answer")


class Asked:
    """Answers those who ask for `word` through `folder`. `act`: does it; whether it was done, and a word."""

    def __init__(self, folder: Path, word: str, act: Callable[[], Awaitable[tuple[bool, str]]]) -> None:
        self._folder = folder
        self._word = word
        self._act = act
        self._answering = trio.Lock()

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            async with self._answering:
                if maybe_asked(self._folder) == self._word:
                    done, text = await self._act()
                    try:
                        answer(self._folder, done=done, text=text)
                    except OSError as error:  # no room: no reason to end a guest's hand-over
                        log.warning("whoever asked for %s is not told (%s): %s", self._word, error.strerror, text)

    async def answered(self) -> None:
        """Until whoever has asked is told: what he asked for may be this process's end."""
        async with self._answering:
            pass


def maybe_asked(folder: Path) -> str | None:
    """The word that somebody waits for; taken."""
    try:
        is_stale = time.time() - (folder / _REQUEST).stat().st_mtime > _STALE_SECONDS
        word = (folder / _REQUEST).read_bytes()[:_MAX_BYTES].decode(errors="replace")
        (folder / _REQUEST).unlink()
    except OSError:
        return None
    return None if is_stale else word


def answer(folder: Path, *, done: bool, text: str) -> None:
    _put(folder / _ANSWER, json.dumps({"done": done, "text": text}).encode())


def _put(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    os.rename(draft, path)
