"""`lazymem receive`: takes a guest over from `lazymem send`: mounts its RAM, starts its emulator, runs it here."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec import to_builtins

from lazymem.cli import handoverend
from lazymem.cli.groups import cause_of
from lazymem.cli.handoverreport import as_text
from lazymem.cli.receivehost import ReceiveHost, Wanted
from lazymem.cli.receivewarm import Ahead, clear_away
from lazymem.errors import BusyError, GuestCrashError, IdentityError, ServerRefusedError
from lazymem.fs import checks, mountinfo
from lazymem.handover import planes, requests
from lazymem.handover.arrival import Arriving, Outcome, after_restart
from lazymem.handover.arriving import ArrivingGuest, boot_id
from lazymem.handover.channel import Stream
from lazymem.handover.journal import Journal, default_folder
from lazymem.handover.messages import Offer
from lazymem.handover.receiving import Receiver
from lazymem.handover.source_link import SourceLink
from lazymem.handover.states import DECIDED, Destination
from lazymem.settings import parse_endpoint
from lazymem.timeslice import ask_for_short_slices
from lazymem.tls.options import add_tls_options, maybe_tls

PROGRAM = "lazymem receive"
_ASK_SECONDS = 60.0
_SHOW_SECONDS = 0.1

_EPILOG = """examples:
  lazymem receive source.example:7412 /mnt/ram -serial file:console          lazymem-vm's options follow the folder
  lazymem receive source.example:7412 /mnt/ram -qmp unix:qmp -- -netdev user,id=n0 -device virtio-net-pci,netdev=n0
                                                                             behind the --, QEMU's
  lazymem receive source.example:7412 /mnt/ram --tls-cert host-b.crt --tls-key host-b.key --tls-ca ca.crt
  lazymem receive --take /mnt/ram     the source is dead, and its decision was never heard
"""


_STARTED_ANEW = "this host was started anew since a guest came here, and its emulator and its mount are gone"
_AT_ITS_SOURCE = (
    ". Its source has it as it was at the hand-over, if it has not let go: there, lazymem send --reclaim, or the "
    "monitor's cont, goes on from that"
)
_DIED_HERE = f"; the guest ran here{_AT_ITS_SOURCE}"
_MAY_HAVE_RUN = f"; the guest was given to this one, and may have run here{_AT_ITS_SOURCE}"

say = partial(handoverend.say, PROGRAM)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: the emulator's, once the guest ran here."""
    words = sys.argv[1:] if arguments is None else arguments
    ours, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = _parser()
    found, vm_words = parser.parse_known_args(ours)
    if found.take and found.mountpoint is None:
        found.source, found.mountpoint = None, found.source
    if found.mountpoint is None:
        parser.error("the folder for the guest's RAM is missing")
    return handoverend.ended(PROGRAM, lambda: _receive_with(found, vm_words, more), "this host")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="lazymem receive HOST:PORT MOUNTPOINT [options] [lazymem-vm's options] [-- QEMU's options]",
        description="Take a running guest over from a lazymem send. It runs here at once; its RAM follows.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="HOST:PORT", help="where lazymem send listens, or unix:PATH")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="an existing folder for the guest's RAM")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="pages that arrive, as for lazymem-mount")
    parser.add_argument(
        "--mount-option", dest="options", metavar="OPT", action="append", default=[], help="lazymem-mount's -o OPT"
    )
    add_tls_options(parser, name=True)
    parser.add_argument("--force", action="store_true", help="although this host has little memory or disk for it")
    parser.add_argument(
        "--take",
        action="store_true",
        help="let a guest run here whose state has arrived and whose source does not answer any more and never will",
    )
    parser.add_argument(
        "--journal", metavar="DIR", type=Path, help="where the decision is kept (default: one for each mount point)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    return parser


def _receive_with(found: argparse.Namespace, vm_words: list[str], more: list[str]) -> int:
    mountpoint = Path(mountinfo.real_path(found.mountpoint))
    options = tuple(found.options)
    cache = None if found.cache is None else found.cache.absolute()
    wanted = Wanted(mountpoint, cache, options, tuple(vm_words), tuple(more), found.force, maybe_tls(found))
    folder = found.journal or default_folder("receive", str(mountpoint))
    return _run(found, wanted, folder.absolute())


def _run(found: argparse.Namespace, wanted: Wanted, folder: Path) -> int:
    try:
        journal = Journal(folder, "destination")
    except BusyError:
        if not found.take:
            raise
        answer = requests.ask(folder, "take", _ASK_SECONDS)
        say(answer.text)
        return 0 if answer.done else BusyError.exit_code
    with journal:
        before = _maybe_before(journal)
        if before is None and found.take:
            raise IdentityError(f"no guest waits here to be taken ({journal.folder})")
        host = ReceiveHost(wanted.mountpoint, journal.folder)
        planes.use_one_thread()
        try:
            outcome = trio.run(_receive, found, wanted, journal, before, host)
        except BaseExceptionGroup as group:
            raise cause_of(group) from group
    return _told(outcome, host)


def _maybe_before(journal: Journal) -> tuple[Arriving, Destination] | None:
    """What an earlier process left to be done, and where it was."""
    if journal.found is None:
        return None
    before, state = msgspec.convert(journal.found.details, Arriving), Destination(journal.found.state)
    if before.over or before.boot_id in ("", boot_id()):
        return None if before.over else (before, state)
    say(_STARTED_ANEW + (_DIED_HERE if state in DECIDED else _MAY_HAVE_RUN if state is Destination.PROMISED else ""))
    return after_restart(before, state)


async def _receive(
    found: argparse.Namespace,
    wanted: Wanted,
    journal: Journal,
    before: tuple[Arriving, Destination] | None,
    host: ReceiveHost,
) -> Outcome:
    maybe_outcome = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            coming = _Coming(found, wanted, journal, host)
            nursery.start_soon(_watch_signals, signals, coming, nursery.cancel_scope)
            nursery.start_soon(_show, host)
            maybe_outcome = await (coming.anew() if before is None else coming.again(*before))
            nursery.cancel_scope.cancel()
    host.show()
    if maybe_outcome is None:
        raise KeyboardInterrupt  # twice, and all is left as it is
    return maybe_outcome


class _Coming:
    """One guest on its way here."""

    def __init__(self, found: argparse.Namespace, wanted: Wanted, journal: Journal, host: ReceiveHost) -> None:
        self._found = found
        self._wanted = wanted
        self._journal = journal
        self.host = host
        self.receiver: Receiver | None = None
        self._prepared: Arriving | None = None

    async def anew(self) -> Outcome:
        began = time.monotonic()
        link = SourceLink(parse_endpoint(self._found.source), say, tls=self._wanted.tls)
        try:
            receiver, incoming = await self._prepare(link, began)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._undo, link.handover)
            raise
        return await self._to_the_end(receiver, incoming)

    async def _prepare(self, link: SourceLink, began: float) -> tuple[Receiver, tuple[Stream, Path]]:
        """Everything that can fail before the source is told to begin."""
        checks.check_mount_point(str(self._wanted.mountpoint))
        offer = await link.first()
        host, wanted = self.host, self._wanted
        host.check(offer, wanted)
        ahead = Ahead(offer, wanted.cache, say)
        with closing(ahead):
            return await self._prepare_for(link, offer, ahead, began)

    async def _prepare_for(
        self, link: SourceLink, offer: Offer, ahead: Ahead, began: float
    ) -> tuple[Receiver, tuple[Stream, Path]]:
        host, wanted = self.host, self._wanted
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.keep_alive)
            planes.start_loading()  # while mount and emulator start
            arriving = Arriving(
                source=str(link.endpoint),
                mountpoint=str(wanted.mountpoint),
                monitor="",
                sockets=str(host.make_sockets()),
                emulator_pid=0,
                emulator_began="",
                ram_bytes=offer.ram_bytes,
                runs=offer.running,
                began=began,
                boot_id=boot_id(),
                candidates=ahead.folder,
            )
            # Before there is a mount or an emulator: the next process clears away what is left of a killed one.
            await trio.to_thread.run_sync(self._note, link.handover, arriving)
            await trio.to_thread.run_sync(ahead.make)
            await trio.to_thread.run_sync(host.mount, link.endpoint, offer, wanted, ahead.maybe_writer)
            guest = await trio.to_thread.run_sync(host.start, offer, wanted)
            arriving.monitor, arriving.emulator_pid, arriving.emulator_began = str(host.monitor), host.pid, host.began
            socket = host.sockets / "state"
            await trio.to_thread.run_sync(guest.listen, socket)
            await trio.to_thread.run_sync(planes.load)  # or say that it cannot be: it is here by now
            await ahead.take(link, arriving)
            state = await link.open_state()
            nursery.cancel_scope.cancel()
        return self._receiver(link, guest, arriving, Destination.ASKED), (state, socket)

    def _note(self, handover: str, arriving: Arriving) -> None:
        self._prepared = arriving
        self._journal.write(handover, Destination.ASKED.value, to_builtins(arriving))

    def _undo(self, handover: str) -> None:
        self.host.clean_up()
        if self._prepared is not None:
            self._prepared.over = True
            self._journal.write(handover, Destination.REFUSED.value, to_builtins(self._prepared))

    async def again(self, before: Arriving, state: Destination) -> Outcome:
        found = self._journal.found
        assert found is not None
        clear_away(before)
        emulator = before.emulator_pid, before.emulator_began, Path(before.monitor), Path(before.sockets)
        self.host.adopt(found.handover, *emulator)
        link = SourceLink(parse_endpoint(before.source), say, found.handover, self._wanted.tls)
        receiver = self._receiver(link, None, before, state)
        return await self._to_the_end(receiver, None)

    def _receiver(
        self, link: SourceLink, guest: ArrivingGuest | None, arriving: Arriving, state: Destination
    ) -> Receiver:
        return Receiver(self._journal, link, guest, arriving, self.host, say, self._print_report, state=state)

    def _print_report(self, report: dict[str, Any]) -> None:
        print(json.dumps(report) if self._found.json else as_text(report), flush=True)

    async def _to_the_end(self, receiver: Receiver, incoming: tuple[Stream, Path] | None) -> Outcome:
        self.receiver = receiver
        ask_for_short_slices()  # as in lazymem send; not before the emulator is started, which would inherit it
        async with trio.open_nursery() as nursery:
            if self._found.take:
                nursery.start_soon(_take, receiver)
            outcome = await receiver.run(incoming)
            nursery.cancel_scope.cancel()
        whole = outcome.state in (Destination.WHOLE, Destination.DONE)
        if outcome.state is not Destination.YIELDED:
            await trio.to_thread.run_sync(lambda: self.host.clean_up(whole=whole))
        return outcome


async def _take(receiver: Receiver) -> None:
    done, text = await receiver.taking.take_when_alone()
    say(text)
    if not done:
        raise BusyError("the guest is not taken")


async def _show(host: ReceiveHost) -> None:
    while True:
        host.show()
        await trio.sleep(_SHOW_SECONDS)


async def _watch_signals(signals: AsyncIterator[int], coming: _Coming, scope: trio.CancelScope) -> None:
    """The first ends what can be ended in order; the next leaves it as it stands in the journal."""
    count = 0
    async for number in signals:
        count += 1
        receiver = coming.receiver
        if receiver is None:  # nothing was begun: whatever is there is cleared away on the way out
            raise KeyboardInterrupt
        if receiver.interrupt():
            continue
        coming.host.signal(number)
        if count > 1:
            scope.cancel()


def _told(outcome: Outcome, host: ReceiveHost) -> int:
    if outcome.state is Destination.REFUSED:
        raise ServerRefusedError(f"{outcome.text or 'refused'}; the guest does not run here")
    if outcome.state is Destination.YIELDED:
        raise IdentityError(f"{outcome.text}; its emulator and its mount are left as they are")
    if outcome.state is Destination.MINE:
        how = "was killed" if host.is_end_unknown else f"ended with status {outcome.exit_code}"
        raise GuestCrashError(f"the emulator {how} before all of its guest's RAM was here")
    if host.is_end_unknown:
        say("the emulator was killed while no lazymem receive watched it, so what it ended with is not known")
    return outcome.exit_code or 0


if __name__ == "__main__":
    sys.exit(main())
