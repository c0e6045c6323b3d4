"""A run of lazymem-vm with a stock QEMU: checks as for our own machine, then QEMU as a child that ends with us.

No event loop: until QEMU runs this does one thing after the other, and afterwards it only waits for QEMU's end. QEMU
has the terminal, the serial line and the user's monitor; what it says on stderr is the user's to read.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from pathlib import Path

from msgspec.structs import replace

from lazymem.cli.servicemanager import tell_ready
from lazymem.cli.vm_options import VmOptions
from lazymem.errors import MonitorError, RamFileError, SnapshotError, UsageError
from lazymem.snapshot.manifest import MAX_MANIFEST_BYTES, RAM_BLOCK, Emulator, parse_made_by
from lazymem.vm import qemukvm, qemurecorded
from lazymem.vm.identity import check_may_share, check_state_belongs, check_unwritten, maybe_manifest, maybe_mount_run
from lazymem.vm.qemucommand import Wanted, check_more, command, named_machine, pinning, with_control
from lazymem.vm.qemucontrol import Control, Feed, check_magic
from lazymem.vm.qemufind import UNWRITABLE_PRIVATE, Qemu, Search, refuse_newer_machine, text, versioned_machine
from lazymem.vm.qemuprocess import Child
from lazymem.vm.ram import MemFile, check_host, files_by_block, open_file, this_host
from lazymem.vm.uri import FileUri, Uri

_MAX_STATE_BYTES = 1 << 30
"""Devices, firmware and framebuffers: up to some hundred MiB. More is a state that holds all of RAM, too."""


def say(line: str) -> None:
    print(f"lazymem-vm: {line}", file=sys.stderr, flush=True)


def run(options: VmOptions) -> int:
    """Returns QEMU's exit status, 128 + signal when one ended it.

    Raises:
        LazymemError: refused; no guest ran.
    """
    check_more(options.more)
    ram = _ram(options)
    with contextlib.ExitStack() as undo:
        search = Search(options.qemu)
        undo.callback(search.close)
        locked = open_file(ram, options.ram_bytes)
        undo.callback(os.close, locked)
        made_by = _maybe_made_by(options, ram) if options.incoming is not None else None
        qemu = search.result()
        wanted = _wanted(options, ram, made_by, qemu)
        if options.print_command:
            print(shlex.join(command(wanted)))
            return 0
        for word in pinning(options.more):
            say(f"{word} makes QEMU touch or pin all of RAM: all of it is fetched before the guest runs")
        return _run(options, wanted, _maybe_state(options, ram), locked)


def _ram(options: VmOptions) -> MemFile:
    files = files_by_block(options.mem_files, [RAM_BLOCK])
    if not files:
        raise UsageError("--engine qemu is for a guest whose RAM is a file: name it with --pcram-file")
    check_host(this_host())
    ram = files[RAM_BLOCK]
    if ram.share:
        check_may_share(ram.path, RAM_BLOCK)
    return ram


def _maybe_made_by(options: VmOptions, ram: MemFile) -> Emulator | None:
    """
    Raises:
        SnapshotError: whoever says it does so in a broken file.
    """
    if options.made_by is not None:
        return _read_made_by(options.made_by)
    manifest = maybe_manifest(ram.path.resolve(), RAM_BLOCK)
    return None if manifest is None else manifest.emulator


def _read_made_by(path: Path) -> Emulator:
    try:
        with path.open("rb") as file:
            return parse_made_by(file.read(MAX_MANIFEST_BYTES))
    except (OSError, SnapshotError) as error:
        raise SnapshotError(f"--made-by {path}: {getattr(error, 'strerror', None) or error}") from error


def _wanted(options: VmOptions, ram: MemFile, made_by: Emulator | None, qemu: Qemu) -> Wanted:
    recorded = None if made_by is None else qemurecorded.read(made_by)
    accelerator, why = _accelerator(options, recorded)
    machine = _machine(options, recorded, qemu)
    if recorded is not None and (missing := qemurecorded.missing(recorded, options.more)):
        say(f"the snapshot's guest was started with {shlex.join(missing)}, too: a state loads only when that is there")
    if not options.print_command:
        say(f"{qemu} ({qemu.program}), machine {machine}, {accelerator or 'accelerator'} {why}")
    words = recorded.words if recorded is not None else ("-nodefaults",)
    wanted = replace(
        _asked_for(options, ram, qemu, machine),
        accelerator=accelerator,
        words=tuple(qemurecorded.without(words, options.more)),
    )
    if recorded is None:
        return wanted
    cpu = None if qemurecorded.has(options.more, "-cpu") else recorded.cpu
    return replace(wanted, switches=recorded.switches, cpu=cpu)


def _asked_for(options: VmOptions, ram: MemFile, qemu: Qemu, machine: str) -> Wanted:
    """What the command line alone says. A guest whose state comes in needs no kernel."""
    boots = options.incoming is None
    return Wanted(
        program=qemu.program,
        ram=ram,
        ram_bytes=options.ram_bytes,
        machine=machine,
        kernel=options.kernel if boots else None,
        append=options.append if boots else "",
        serial=options.serial,
        qmp=options.qmp,
        incoming=not boots,
        start_paused=options.start_paused,
        icount=options.icount,
        unwritable=_only_read(qemu, ram),
        more=options.more,
    )


def _machine(options: VmOptions, recorded: qemurecorded.Recorded | None, qemu: Qemu) -> str:
    """A versioned type: the snapshot's, else what the user's (or pc) stands for in this QEMU."""
    named = named_machine(options.more)
    name = None if named is None else qemurecorded.machine_type(named)
    resolved = versioned_machine(qemu, name or "pc") if name is not None or recorded is None else None
    if recorded is None:
        assert resolved is not None
        return resolved
    qemurecorded.check_agrees(recorded, resolved, options.more)
    refuse_newer_machine(qemu, recorded.machine)
    return recorded.machine


def _accelerator(options: VmOptions, recorded: qemurecorded.Recorded | None) -> tuple[str | None, str]:
    """What runs the guest, and why, for the line that says so."""
    named = named_machine(options.more) or ""
    if qemurecorded.has(options.more, "-accel", "-enable-kvm") or "accel=" in named:
        return None, "as said after the --"
    if options.icount:
        return "tcg", "for --icount"
    if recorded is not None and recorded.accelerator == "tcg":
        return "tcg", "as the snapshot was made"
    reason = qemukvm.why_not()
    if reason is None:
        return "kvm", "(a probe guest ran)"
    if recorded is not None and recorded.accelerator == "kvm":
        reason += "; the snapshot was made with kvm, whose state may not load"
    return "tcg", f"({reason})"


def _only_read(qemu: Qemu, ram: MemFile) -> bool:
    """Whether a private map's file is opened for reading only, as it should be.

    Raises:
        RamFileError: it has to be, and this QEMU cannot.
    """
    if ram.share:
        return False
    if qemu.version >= UNWRITABLE_PRIVATE:
        return True
    if not os.access(ram.path, os.W_OK):
        raise RamFileError(
            f"{qemu} opens a RAM file for writing even with share=off, and {ram.path} may not be written: "
            f"{text(UNWRITABLE_PRIVATE)} and newer only read it"
        )
    return False


def _maybe_state(options: VmOptions, ram: MemFile) -> bytes | None:
    """The state to take over, bound to its RAM (rule 6); None where none comes, or over the user's monitor."""
    if options.incoming is None:
        return None
    uri = options.incoming.uri
    if uri is None:
        check_unwritten(ram.path.resolve())
        return None
    state = _read(uri)
    check_magic(state, uri)
    check_state_belongs(ram.path, RAM_BLOCK, state, say)
    return state


def _read(uri: Uri) -> bytes:
    if not isinstance(uri, FileUri):
        # An event loop costs a tenth of a second; who waits for a peer does not mind.
        import trio

        from lazymem.vm.transport import receive

        return trio.run(receive, uri, _MAX_STATE_BYTES, lambda _: None)
    try:
        with uri.path.open("rb") as file:
            state = file.read(_MAX_STATE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MonitorError(f"cannot read the save stream from {uri}: {getattr(error, 'strerror', error)}") from error
    if len(state) > _MAX_STATE_BYTES:
        raise MonitorError(f"{uri} has more than {_MAX_STATE_BYTES} bytes: not a state whose RAM was left out")
    return state


def _run(options: VmOptions, wanted: Wanted, state: bytes | None, locked: int) -> int:
    with contextlib.ExitStack() as undo:
        ours, its = socket.socketpair()
        undo.callback(ours.close)
        undo.callback(its.close)
        feed = None if state is None else undo.enter_context(contextlib.closing(Feed(state)))
        # The lock on the RAM file is the child's, too: it lasts as long as anybody maps the file.
        inherited = [its.fileno(), locked] + ([] if feed is None else [feed.far_end.fileno()])
        mount = maybe_mount_run(wanted.ram.path)
        huge_pages_off = wanted.ram_bytes if mount is not None else None
        maybe_template = wanted.ram.path if mount is not None and mount.template else None
        child = undo.enter_context(
            Child(say).started(with_control(command(wanted), its.fileno()), inherited, huge_pages_off, maybe_template)
        )
        its.close()
        if feed is not None:
            feed.far_end.close()  # a copy of ours would keep the stream from ever ending
        try:
            _bring_up(options, ours, feed)
        except MonitorError as error:
            return child.ended_early(error)
        return child.wait()


def _bring_up(options: VmOptions, connection: socket.socket, feed: Feed | None) -> None:
    """Until the guest runs, or stands as it should, or waits for what only the user's monitor brings."""
    with Control(connection) as control:
        status = None if feed is None else control.load(feed)
    tell_ready()
    if status == "paused" and options.qmp is None:
        say("the guest stands, as it was saved or as -S says, and there is no monitor (-qmp) to let it go on")
