"""`lazymem send` or `receive` as a process that kills itself, or its emulator, when it comes to a given step.

Started as ``python -m tests.support.dyingcommand FILE STEP send|receive ARGUMENTS``. Steps are written to FILE, one a
line, as they are reached: ``EVENT NAME`` before an event is taken, ``RECORD STATE`` and ``RECORDED STATE`` around a
write to the journal, and an effect's name before it is carried out. STEP is one of them; empty: nobody dies. In front
of it may stand ``emulator:`` (that is killed), ``cut:`` (the connection to the other side is), or ``hold:`` (nobody
dies; it goes on once FILE has a sibling with the ending .go). ``half``: of the guesses only the first 2 MiB are served
until then.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from lazymem.cli import receive, send
from lazymem.handover.receiving import Receiver
from lazymem.handover.sending import Sender
from lazymem.handover.states import Effect
from lazymem.pages import PageRange
from lazymem.snapshot.liveram import LiveRam

_HALF_PAGES = 512


class _Steps:
    def __init__(self, path: Path, fatal: str) -> None:
        self._path = path
        kind, _, word = fatal.rpartition(":")
        self._kind, self._fatal = kind, word

    async def reached(self, word: str, side: Any) -> None:
        with self._path.open("a") as file:
            file.write(f"{word}\n")
        if word != self._fatal:
            return
        self._fatal = ""
        if self._kind == "hold":
            while not self._path.with_suffix(".go").exists():  # noqa: ASYNC110 (a file)
                await trio.sleep(0.02)
        elif self._kind == "cut":
            await (side.receivers if isinstance(side, Sender) else side._link).drop()
        else:
            os.kill(_emulator(side) if self._kind == "emulator" else os.getpid(), signal.SIGKILL)


def _emulator(side: Any) -> int:
    return int((side._leaving if isinstance(side, Sender) else side._arriving).emulator_pid or 0)


def _watch(side: Any, steps: _Steps) -> None:
    act, record, take = side._act, side._record, side._take

    async def watched_act(self: Any, effect: Effect) -> Any:
        if effect is not Effect.RECORD:
            await steps.reached(effect.name, self)
        return await act(self, effect)

    async def watched_record(self: Any, state: Any) -> None:
        await steps.reached(f"RECORD {state.value}", self)
        await record(self, state)
        await steps.reached(f"RECORDED {state.value}", self)

    async def watched_take(self: Any, event: Any, *rest: Any) -> Any:
        await steps.reached(f"EVENT {event.name}", self)
        return await take(self, event, *rest)

    side._act, side._record, side._take = watched_act, watched_record, watched_take


def _serve_half(go: Path) -> None:
    serves, read_some, read_nowait = LiveRam.serves, LiveRam.read_some, LiveRam.read_nowait
    seen = [0]

    def half(self: Any, *, background: bool) -> bool:
        return serves(self, background=background) and (not background or seen[0] < _HALF_PAGES or go.exists())

    def noted_some(self: Any, pages: PageRange, most: int) -> Any:
        seen[0] = max(seen[0], pages.start)
        return read_some(self, pages, most)

    def noted_nowait(self: Any, pages: PageRange, **more: Any) -> Any:
        seen[0] = max(seen[0], pages.start)
        return read_nowait(self, pages, **more)

    patched: Any = LiveRam
    patched.serves, patched.read_some, patched.read_nowait = half, noted_some, noted_nowait


def main() -> int:
    path, fatal, command, *arguments = sys.argv[1:]
    if fatal == "half":
        _serve_half(Path(path).with_suffix(".go"))
    _watch(Sender if command == "send" else Receiver, _Steps(Path(path), fatal))
    return send.main(arguments) if command == "send" else receive.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
