"""`lazymem send` or `receive` as a process that kills itself, or something near it, when it comes to a given step.

Started as ``python -m tests.support.dyingcommand FILE STEPS send|receive ARGUMENTS``. Steps are written to FILE, one a
line, as they are reached: ``EVENT NAME`` before an event is taken, ``AT STATE`` when all is done that it led to,
``RECORD STATE`` and ``RECORDED STATE`` around a write to the journal, and an effect's name before it is carried out.
Before anything moves it, a source has ``OFFER`` and ``OFFERED``, around that write, and a destination ``CHECKED``,
``MOUNTED`` and ``STARTED``; in another thread a source has ``SET`` when its emulator's settings are changed, and
``STOPPED`` when the guest stands. With --warm a source has ``WENT`` when some pages went ahead of the guest, a
destination ``MADE`` when it has a place for them, and ``CAME`` when some are in it.

STEPS are some of them with commas between; empty: nobody dies. At each, once, it is written down with a "!" before it,
and then the process dies, or what stands in front of STEPS with a ``:``. A source's process is two, and both die: its
guardian and the one that does the work; ``guardian:`` and ``worker:`` are the one and the other. Of its mount (a
source's is the one that its RAM lies on) ``daemon:``, ``supervisor:`` and ``filler:`` are killed; of its emulator
``emulator:``; a destination's is a lazymem-vm, and ``qemu:`` the QEMU below it, a source's is what has the guest, and
``vm:`` the lazymem-vm above it. At ``EVENT RECEIVED`` a source's emulator dies once it has told that all is sent: one
that had not would take its guest with it, as one that dies before that. ``cut:`` is the connection to the other side;
``hold:`` nobody dies, it goes on once FILE has a sibling with the ending .go, which is gone then. Several of these may
stand with a ``;`` between. ``half``: of the guesses only the first 2 MiB are served until then. ``late;`` before all:
the destination takes its emulator for not yet loaded until it has the source's word. ``early;``: it does not say that
it has received all before its emulator is loaded, and does not hear before that that the guest is given. ``patient;``:
the source waits for that word, and does not go by what has arrived. ``soon;``: it says that it has received all once it
has the source's word, which the source says by what it was told to have arrived. ``torn;``: of the state the end is
missing, which is noticed then. ``ahead;``: its emulator gets none of the state before it has asked for what its load
will read.

Where something else than the command is killed, a line ``=KIND`` says so: there may be none of the kind at that step.

FILE's sibling with the ending .pid has the id of the process that writes all this, the latest one's.
FILE's sibling with the ending .read says of each step how many bytes the process has read of files until then.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from lazymem.cli import guardian, receive, receivehost, send
from lazymem.cli.receivehost import ReceiveHost
from lazymem.cli.status import read_status
from lazymem.handover import messages, relay, sending, source_link, warming
from lazymem.handover.receiving import Receiver
from lazymem.handover.sending import Sender
from lazymem.handover.statepieces import Unpacker
from lazymem.handover.states import Destination, Effect, Event, Source
from lazymem.handover.warming import Warming
from lazymem.pages import PageRange
from lazymem.snapshot.liveram import LiveRam
from lazymem.store.candidatewriter import CandidateWriter
from tests.support.processtree import command_of, descendants_of, fillers_of, is_gone, maybe_process
from tests.support.ramreads import read_bytes

_HALF_PAGES = 512

_NOT_GIVEN = (Destination.ASKED, Destination.LOADED)
_ALL = messages.Arrived(1 << 62)
"""Of a state, however long it is."""


class _Steps:
    def __init__(self, path: Path, fatal: str) -> None:
        self._path = path
        self._guardian = self._process = os.getpid()
        path.with_suffix(".pid").write_text(f"{self._process}")
        self._seen = len(_lines(path))
        self._fatal: dict[str, str] = {}
        for part in fatal.split(";"):
            kind, _, words = part.rpartition(":")
            self._fatal |= dict.fromkeys(filter(None, words.split(",")), kind or "command")

    def note(self, word: str) -> str | None:
        """What dies there."""
        if self._process != os.getpid():  # forked, and maybe not the first: what one before it died of is done
            self._process = os.getpid()
            self._path.with_suffix(".pid").write_text(f"{self._process}")
            for line in _lines(self._path)[self._seen :]:
                self._fatal.pop(line.removeprefix("!") if line.startswith("!") else "", None)
        kind = self._fatal.get(word)
        if kind == "guardian" and not self._has_guardian:
            kind = None  # that one is for another process
        if kind is not None:
            del self._fatal[word]
        with self._path.open("a") as file:
            file.write(f"{word}\n" + (f"!{word}\n" if kind is not None else ""))
        with self._path.with_suffix(".read").open("a") as file:
            file.write(f"{read_bytes(os.getpid())} {word}\n")
        return kind

    def reached_alone(self, word: str) -> None:
        """Of a destination, in no task, and before there is anything but this process."""
        if self.note(word):
            os.kill(os.getpid(), signal.SIGKILL)

    async def reached(self, word: str, side: Any) -> None:
        kind = self.note(word)
        if kind == "hold":
            go = self._path.with_suffix(".go")
            while not go.exists():  # noqa: ASYNC110 (a file)
                await trio.sleep(0.02)
            go.unlink()  # the next hold waits for its own
        elif kind == "cut":
            await (side.receivers if isinstance(side, Sender) else side._link).drop()
        elif kind is not None:
            if (kind, word) == ("emulator", f"EVENT {Event.RECEIVED.name}"):
                await side._device_state.wait_over()
            await trio.to_thread.run_sync(self.kill, kind, side)

    def kill(self, kind: str, side: Any) -> None:
        """Returns once they are dead: what comes next is not a race with that."""
        for pid in self._mortal(kind, side):
            with self._path.open("a") as file:
                file.write(f"={kind}\n")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            while not is_gone(pid):
                time.sleep(0.001)

    @property
    def _has_guardian(self) -> bool:
        """One that is gone, by an earlier step, has left us to a process that is none of ours."""
        return os.getppid() == self._guardian

    def _mortal(self, kind: str, side: Any) -> list[int]:
        if kind not in ("command", "guardian", "worker"):
            return _near(kind, side)
        guardian = [self._guardian] if self._has_guardian and kind != "worker" else []
        return guardian if kind == "guardian" else [*guardian, os.getpid()]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _mount(side: Any) -> str:
    return str(Path(side._leaving.ram_path).parent if isinstance(side, Sender) else side._arriving.mountpoint)


def _near(kind: str, side: Any) -> list[int]:
    """The processes that are that; there may be none."""
    emulator = _emulator(side)
    if kind in ("emulator", "qemu", "vm") and not emulator:
        return []
    if kind == "emulator":
        return [emulator]
    if kind == "qemu":
        return [pid for pid in descendants_of(emulator) if "qemu-system" in command_of(pid)[0]]
    if kind == "vm":
        found = maybe_process(emulator)
        return [found.parent] if found is not None and "lazymem.cli.vm" in command_of(found.parent) else []
    status = read_status(_mount(side))
    if kind == "filler":
        return fillers_of(status["pid"])
    return [status["pid"] if kind == "daemon" else status["survival"]["supervisor_pid"]]


def _emulator(side: Any) -> int:
    return int((side._leaving if isinstance(side, Sender) else side._arriving).emulator_pid or 0)


def _watch(side: Any, steps: _Steps) -> None:
    act, speak, record, take = side._act, side._speak, side._record, side._take

    async def watched_act(self: Any, effect: Effect) -> Any:
        if effect is not Effect.RECORD:
            await steps.reached(effect.name, self)
        return await act(self, effect)

    async def watched_speak(self: Any, effect: Effect, *rest: Any) -> None:
        await steps.reached(effect.name, self)
        await speak(self, effect, *rest)

    async def watched_record(self: Any, state: Any) -> None:
        is_offer = state is Source.OURS and not self._acting
        await steps.reached("OFFER" if is_offer else f"RECORD {state.value}", self)
        await record(self, state)
        await steps.reached("OFFERED" if is_offer else f"RECORDED {state.value}", self)

    async def watched_take(self: Any, event: Any, *rest: Any) -> Any:
        await steps.reached(f"EVENT {event.name}", self)
        before = self.state
        taken = await take(self, event, *rest)
        if self.state is not before:
            await steps.reached(f"AT {self.state.value}", self)
        return taken

    side._act, side._speak, side._record, side._take = watched_act, watched_speak, watched_record, watched_take


def _watch_host(steps: _Steps) -> None:
    patched: Any = ReceiveHost
    check, mount, wait = patched.check, patched.mount, patched._wait_waiting

    def watched_check(*arguments: Any) -> None:
        check(*arguments)
        steps.reached_alone("CHECKED")

    def watched_mount(*arguments: Any) -> None:
        mount(*arguments)
        steps.reached_alone("MOUNTED")

    def watched_wait(*arguments: Any) -> Any:
        steps.reached_alone("STARTED")
        return wait(*arguments)

    patched.check, patched.mount, patched._wait_waiting = watched_check, watched_mount, watched_wait


def _watch_stop(steps: _Steps) -> None:
    """In the thread that is at the emulator's monitor."""
    patched: Any = Sender
    send_state = patched._send_state

    async def watched_send(self: Any) -> Any:
        freeze, prepare = self._ram.freeze, self._here.guest._prepare

        def watched_prepare(before: Any) -> None:
            prepare(before)
            kind = steps.note("SET")
            if kind is not None:
                steps.kill(kind, self)

        def watched_freeze() -> Any:
            signature = freeze()
            kind = steps.note("STOPPED")
            if kind is not None:
                steps.kill(kind, self)
            return signature

        self._ram.freeze, self._here.guest._prepare = watched_freeze, watched_prepare
        return await send_state(self)

    patched._send_state = watched_send


def _watch_warm(steps: _Steps) -> None:
    patched_writer: Any = CandidateWriter
    patched_warming: Any = Warming
    make, write, send_ahead = patched_writer.__init__, patched_writer.write, patched_warming.send

    def watched_make(*arguments: Any) -> None:
        make(*arguments)
        steps.reached_alone("MADE")

    def watched_write(*arguments: Any) -> Any:
        done = write(*arguments)
        steps.reached_alone("CAME")
        return done

    class Watched:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def send_all(self, data: bytes) -> None:
            await self._stream.send_all(data)
            await steps.reached("WENT", None)

    async def watched_send(self: Any, ram: Path, stream: Any, handover: str) -> None:
        await send_ahead(self, ram, Watched(stream), handover)

    patched_writer.__init__, patched_writer.write, patched_warming.send = watched_make, watched_write, watched_send


def _load_late() -> None:
    patched: Any = Receiver
    wait_loaded = patched._wait_loaded

    async def late(self: Any) -> None:
        while self.state is Destination.ASKED:  # noqa: ASYNC110
            await trio.sleep(0.005)
        await wait_loaded(self)

    patched._wait_loaded = late


def _load_early() -> None:
    patched: Any = Receiver
    run = patched.run

    async def early(self: Any, incoming: Any) -> Any:
        say = self._link.say

        async def said(message: messages.Message) -> None:
            while isinstance(message, messages.Received) and self.state is Destination.ASKED:  # noqa: ASYNC110
                await trio.sleep(0.005)
            await say(message)

        self._link.say = self._incoming._say = said
        return await run(self, incoming)

    from_source = patched._from_source

    async def heard(self: Any, event: Any, message: object) -> None:
        while event is Event.GIVEN and self.state is Destination.ASKED:  # noqa: ASYNC110
            await trio.sleep(0.005)
        await from_source(self, event, message)

    patched.run, patched._from_source = early, heard


def _wait_patiently() -> None:
    patched: Any = Sender
    patched._look_sent = lambda _: None


def _given_soon() -> None:
    patched: Any = Receiver
    run = patched.run

    async def soon(self: Any, incoming: Any) -> Any:
        say = self._link.say

        async def said(message: messages.Message) -> None:
            if isinstance(message, messages.Received):
                await say(_ALL)
            while isinstance(message, messages.Received) and self.state in _NOT_GIVEN:  # noqa: ASYNC110
                await trio.sleep(0.005)
            await say(message)

        self._link.say = self._incoming._say = said
        return await run(self, incoming)

    patched.run = soon


def _read_ahead_first() -> None:
    patched: Any = Receiver
    patched_relay: Any = relay
    read_ahead, feed = patched._read_ahead, patched_relay._feed
    asked = trio.Event()

    async def read(self: Any, load_reads: list[int]) -> None:
        await read_ahead(self, load_reads)
        asked.set()

    async def late(*arguments: Any) -> None:
        await asked.wait()
        await feed(*arguments)

    patched._read_ahead, patched_relay._feed = read, late


def _torn() -> None:
    patched: Any = Receiver
    bring = patched._bring_in
    unpacker: Any = Unpacker
    unpacker.ended = property(lambda _: False, lambda *_: None)  # the mark is overlooked, and then there is no more

    async def torn(self: Any, *incoming: Any) -> None:
        put = self._events.put

        async def put_late(event: tuple[Any, object]) -> None:
            if event[0] is Event.FAILED:
                await self._link.say(_ALL)
            while event[0] is Event.FAILED and self.state in _NOT_GIVEN:  # noqa: ASYNC110
                await trio.sleep(0.005)
            await put(event)

        self._events.put = put_late
        await bring(self, *incoming)

    patched._bring_in = torn


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


def _hurry() -> None:
    """Nobody here is far away, and no guest is in anybody's way."""
    warming.NICENESS = 0
    source_link._RETRY_SECONDS = (0.02, 0.1)
    sending._LINGER_SECONDS = 0.3
    guardian._PAUSE_SECONDS = (0.02, 0.1)
    patched: Any = receivehost
    patched._END_SECONDS = 0.1


def run(words: Sequence[str]) -> int:
    path, fatal, command, *arguments = words
    _hurry()
    if fatal == "half":
        fatal = ""
        _serve_half(Path(path).with_suffix(".go"))
    if fatal.startswith("late;"):
        _load_late()
    if fatal.startswith("early;"):
        _load_early()
    if fatal.startswith("patient;"):
        _wait_patiently()
    if fatal.startswith("ahead;"):
        _read_ahead_first()
    if fatal.startswith("soon;"):
        _given_soon()
    if fatal.startswith("torn;"):
        _torn()
    for mode in ("late;", "early;", "patient;", "soon;", "torn;", "ahead;"):
        fatal = fatal.removeprefix(mode)
    steps = _Steps(Path(path), fatal)
    _watch_host(steps)
    _watch_warm(steps)
    _watch_stop(steps)
    _watch(Sender if command == "send" else Receiver, steps)
    return send.main(arguments) if command == "send" else receive.main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
