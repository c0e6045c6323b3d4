"""`lazymem send`: hands a running guest over to another host, and serves its RAM until all of it is there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from lazymem_server.listeners import Listeners, parse_listen

from lazymem.cli import handoverend
from lazymem.cli.groups import cause_of
from lazymem.cli.guardian import Guard, guarded
from lazymem.cli.handoverreport import as_text
from lazymem.cli.handoverserver import HandoverServer
from lazymem.errors import BusyError, IdentityError, LazymemError, MonitorError, RamFileError, UsageError
from lazymem.handover import planes, requests
from lazymem.handover.arriving import boot_id
from lazymem.handover.departure import Leaving, Outcome
from lazymem.handover.journal import Journal, default_folder, read
from lazymem.handover.leaving import LeavingGuest
from lazymem.handover.messages import MAX_WARM_SECONDS
from lazymem.handover.sending import Sender
from lazymem.handover.states import Source
from lazymem.residency import may_ask
from lazymem.timeslice import ask_for_short_slices
from lazymem.tls.options import add_tls_options, maybe_tls

PROGRAM = "lazymem send"
DEFAULT_LISTEN = "127.0.0.1:7412"

_ASK_SECONDS = 60.0
"""For a running lazymem send to do what is asked of it."""

_BACK_SECONDS = 5.0
"""For a destination that lives to come back to a new lazymem send: it tries each two seconds."""

_INTERRUPTED = "interrupted"

_ALL_THERE = "nothing is left to do: the destination has all of the guest, and the emulator here was ended"

_EPILOG = """examples:
  lazymem send --qmp /run/vm/qmp.sock --listen 10.0.0.1:7412 --allow host-b \
      --tls-cert host-a.crt --tls-key host-a.key --tls-ca ca.crt                (lazymem pki --help: the files)
      then there: lazymem receive 10.0.0.1:7412 /mnt/ram --tls-cert host-b.crt --tls-key host-b.key --tls-ca ca.crt
  lazymem send --qmp /run/vm/qmp.sock --warm 60                 most of its pages go first, while it runs here
  lazymem send --qmp /run/vm/qmp.sock                           again, after it was killed: it goes on where it was
  lazymem send --qmp /run/vm/qmp.sock --reclaim                 the other host is dead, and took its decision along
"""


say = partial(handoverend.say, PROGRAM)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    found = parser.parse_args(arguments)
    if not 0 <= found.warm <= MAX_WARM_SECONDS:
        parser.error(f"--warm {found.warm:g}: from 0 to {MAX_WARM_SECONDS:.0f} seconds")
    found.qmp = Path(os.path.abspath(str(found.qmp).removeprefix("unix:")))
    # By its real name: under each of two, the decision of the other would not be found.
    folder = found.journal or default_folder("send", os.path.realpath(found.qmp))
    return guarded(
        lambda guard: handoverend.ended(PROGRAM, lambda: _run(found, folder.absolute(), guard), str(folder)), say
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Hand a running guest (QEMU >= 7.2 or lazymem-vm) whose RAM is a file over to a lazymem receive.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--qmp", metavar="SOCKET", required=True, type=Path, help="the emulator's monitor")
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=DEFAULT_LISTEN,
        help="for the receiver, or unix:PATH; whoever can connect can take the guest (default: %(default)s)",
    )
    add_tls_options(parser, name=False)
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="IDENTITY[,IDENTITY...]",
        help="with TLS: who may take the guest (names in client certificates; '*': whoever has one); may be repeated",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen where others can reach it, without TLS: they can take the guest"
    )
    parser.add_argument(
        "--disks-handled", action="store_true", help="the guest's writable disks are at the destination, too"
    )
    parser.add_argument(
        "--warm",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="let the guest run on for so long at most while its pages go ahead of it (default: its RAM follows it)",
    )
    parser.add_argument(
        "--reclaim",
        action="store_true",
        help="take back a guest that was given to a destination which does not answer any more and never will",
    )
    parser.add_argument(
        "--journal", metavar="DIR", type=Path, help="where the decision is kept (default: one for each monitor)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _run(found: argparse.Namespace, folder: Path, guard: Guard) -> int:
    try:
        journal = Journal(folder, "source")
    except BusyError:
        if not found.reclaim:
            raise
        answer = requests.ask(folder, "reclaim", _ASK_SECONDS)
        say(answer.text)
        return 0 if answer.done else BusyError.exit_code
    with journal:
        return _with_journal(found, journal, guard)


def _with_journal(found: argparse.Namespace, journal: Journal, guard: Guard) -> int:
    maybe_over = _maybe_untold_end(journal)
    if maybe_over is not None and guard.is_again:  # the one before was killed while it said its last word
        say(_ALL_THERE)
        outcome = Outcome(Source.RELEASED, _ALL_THERE)
        return _told(outcome, maybe_over.state_bytes, as_json=found.json, reclaimed=found.reclaim)
    if maybe_over is not None and journal.found is not None:
        maybe_over.told = True  # else a process after this one would take it for the end of what this one begins
        journal.write(journal.found.handover, journal.found.state, msgspec.to_builtins(maybe_over))
    before = _maybe_before(journal)
    if found.reclaim and not _may_be_reclaimed(journal, before, guard):
        raise IdentityError(f"nothing was given away that could be taken back ({journal.folder})")
    with ExitStack() as undo:
        is_here = before is None or journal.found is None or journal.found.state == Source.OURS.value
        guest = _maybe_guest(found.qmp, None if is_here else before)
        if guest is not None:
            undo.callback(guest.close)
            if is_here and before is not None and before.emulator_pid not in (None, guest.pid):
                before = None  # that guest has ended, and nothing of it was given away
            undo.enter_context(_going_on_if_this_fails(guest, journal))
        tls = maybe_tls(found)
        if tls is None and found.allow:
            raise UsageError("--allow needs --tls-cert, --tls-key and --tls-ca: without TLS nobody has a name")
        if tls is not None and not found.allow:
            raise UsageError("nobody may take the guest: say --allow with the name of the destination's certificate")
        listeners = undo.enter_context(Listeners(private=tls is None and not found.insecure))
        listeners.open([parse_listen(before.address if before is not None else found.listen)])
        ask_for_short_slices()  # a guest stands while this process waits for a processor
        planes.use_one_thread()
        try:
            outcome, state_bytes = trio.run(_send, found, journal, before, guest, listeners, guard)
        except BaseExceptionGroup as group:
            raise cause_of(group) from group
    return _told(outcome, state_bytes, as_json=found.json, reclaimed=found.reclaim)


@contextmanager
def _going_on_if_this_fails(guest: LeavingGuest, journal: Journal) -> Iterator[None]:
    """Where this process cannot begin (no port, no certificate), or ends by an error, no other may follow it. A guest
    that is not given away, and may stand since a process that was killed, goes on all the same."""
    try:
        yield
    except BaseException:
        with suppress(LazymemError):
            _let_go_on(guest, journal)
        raise


def _let_go_on(guest: LeavingGuest, journal: Journal) -> None:
    """As the next process would, by RESTARTED, and by the same word: what is on the disk now. What was there when this
    process began may be long past."""
    maybe_now = read(journal.folder)
    if maybe_now is None or maybe_now.state != Source.OURS.value:
        return
    leaving = msgspec.convert(maybe_now.details, Leaving)
    if leaving.boot_id != boot_id() or leaving.emulator_pid not in (None, guest.pid):
        return  # of another guest
    maybe_refusal = guest.go_on(run=leaving.was_running, before=leaving.settings_before)
    if leaving.settings_before is not None and maybe_refusal is None:
        leaving.settings_before = None
        journal.write(maybe_now.handover, maybe_now.state, msgspec.to_builtins(leaving))


def _maybe_untold_end(journal: Journal) -> Leaving | None:
    """What an earlier process has brought to its end, if no command has begun since."""
    if journal.found is None or journal.found.state != Source.RELEASED.value:
        return None
    found = msgspec.convert(journal.found.details, Leaving)
    return found if found.over and not found.told else None


def _may_be_reclaimed(journal: Journal, before: Leaving | None, guard: Guard) -> bool:
    """What a process before this one had begun to take back when it was killed is to go on, too."""
    if before is None or journal.found is None:
        return False
    is_on_its_way = guard.is_again and journal.found.state == Source.OURS.value and before.reclaimed
    return journal.found.state == Source.GIVEN.value or is_on_its_way


def _maybe_before(journal: Journal) -> Leaving | None:
    """What an earlier process left to be done."""
    if journal.found is None:
        return None
    before = msgspec.convert(journal.found.details, Leaving)
    if before.over:
        return None
    state = Source(journal.found.state)
    if before.boot_id != boot_id():
        if state is Source.GIVEN:
            say("this host was started anew since the guest was given away: its RAM here is gone")
        return None
    return before


def _maybe_guest(monitor: Path, before: Leaving | None) -> LeavingGuest | None:
    """
    Raises:
        MonitorError: nobody is there, and nothing can be done without the guest.
    """
    try:
        guest = LeavingGuest(monitor)
    except MonitorError:
        if before is None:
            raise
        say("the guest's emulator is gone; what is left of it is its RAM")
        return None
    if before is not None and before.emulator_pid not in (None, guest.pid):
        guest.close()
        raise IdentityError(
            f"the emulator at {monitor} is another one than the one whose guest was handed over; if that is right, "
            "name another --journal"
        )
    return guest


async def _send(
    found: argparse.Namespace,
    journal: Journal,
    before: Leaving | None,
    guest: LeavingGuest | None,
    listeners: Listeners,
    guard: Guard,
) -> tuple[Outcome, int]:
    server = HandoverServer(listeners, maybe_tls(found), found.allow)
    maybe_look = None
    if before is None:
        before = await trio.to_thread.run_sync(_look, found, guest, server.address)
    else:
        maybe_look = partial(_look, found, guest, server.address, came_back=True)
    sender = Sender(
        journal, guest, before, server, say, maybe_look=maybe_look, warm_seconds=found.warm, offers=not found.reclaim
    )
    server.receivers = sender.receivers
    maybe_outcome = None
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        nursery.start_soon(_watch, guard, sender, nursery.cancel_scope)
        if found.reclaim and sender.state is Source.GIVEN:
            nursery.start_soon(_reclaim, sender)
        nursery.start_soon(_announce, server.address, sender, found.json)
        try:
            maybe_outcome = await sender.run()
        finally:
            sender.close()
            nursery.cancel_scope.cancel()
    if maybe_outcome is None:
        maybe_outcome = Outcome(sender.state, _INTERRUPTED, stands="the guest was given away: the same command goes on")
    return maybe_outcome, sender.state_bytes


def _look(found: argparse.Namespace, guest: LeavingGuest | None, address: str, *, came_back: bool = False) -> Leaving:
    """Blocking.

    Raises:
        LazymemError: what speaks against handing that guest over.
    """
    assert guest is not None, "nobody comes this far without one that is here"
    look = guest.look(disks_handled=found.disks_handled, came_back=came_back)
    ram = look.ram
    if found.warm and not may_ask(ram.path):
        raise RamFileError(
            f"--warm: which pages of {ram.path} are in memory is told to those only who may write to it; without "
            "--warm the guest can go all the same"
        )
    return Leaving(
        address, str(found.qmp), str(ram.path), ram.size_bytes, look.emulator, look.was_running, boot_id(), guest.pid
    )


async def _announce(address: str, sender: Sender, as_json: bool) -> None:
    """Once it is true: what a process before this one had begun is undone first. And make ready for who comes."""
    await sender.wait_open()
    if as_json:
        print(json.dumps({"listening": address}), flush=True)
    elif sender.state is Source.OURS:
        print(f"waiting on {address} for lazymem receive", flush=True)
    if sender.state is Source.OURS:  # of a guest that was given, no state will be sent
        planes.start_loading()


async def _watch(guard: Guard, sender: Sender, scope: trio.CancelScope) -> None:
    told = False
    is_enough = trio.Event()

    def interrupted() -> None:
        nonlocal told
        if sender.interrupt():
            return
        if told:
            is_enough.set()
            return
        told = True
        say(
            "the guest was given away and its RAM is still served: once more ends this all the same, and the same "
            "command goes on later"
        )

    def alone() -> None:
        if not sender.interrupt():
            say("the process that watched over this one was killed; the guest was given away, and its RAM is served on")

    async def end() -> None:
        await is_enough.wait()
        await sender.wait_moved()  # over a connection that ends with everything else here
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await guard.watch(interrupted, alone)


async def _reclaim(sender: Sender) -> None:
    done, text = await sender.reclaiming.reclaim(_BACK_SECONDS)
    say(text)
    if not done:
        raise BusyError("the guest is not taken back")


def _told(outcome: Outcome, state_bytes: int, *, as_json: bool, reclaimed: bool) -> int:
    # The report is the other side's: it says nothing of what is so here.
    result: dict[str, Any] = {"state_bytes": state_bytes, **outcome.report}
    result |= {"state": outcome.state.value, "reason": outcome.text}
    if as_json:
        print(json.dumps(result), flush=True)
    elif outcome.report:
        print(as_text(outcome.report), flush=True)
    if outcome.state is Source.RELEASED:
        return 0
    say(f"{outcome.text or 'broken off'}; {outcome.stands or 'the guest goes on here'}")
    if outcome.text == _INTERRUPTED and outcome.state is not Source.OURS:
        return 130
    if outcome.stands is not None:
        return MonitorError.exit_code
    if reclaimed:
        return 0
    return 130 if outcome.text == _INTERRUPTED else MonitorError.exit_code


if __name__ == "__main__":
    sys.exit(main())
