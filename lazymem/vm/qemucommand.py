"""lazymem-vm's options as the command line of a stock QEMU. Pure.

QEMU's habits that hurt RAM whose pages come from elsewhere are set here as far as options reach: nothing is allocated
ahead (prealloc=off, whatever -mem-prealloc says), no search for equal pages (mem-merge=off), no RAM in a core dump of
the process (dump-guest-core=off). The rest is `qemuchild`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from lazymem.errors import UsageError
from lazymem.snapshot.manifest import RAM_BLOCK
from lazymem.vm.qemurecorded import given, has
from lazymem.vm.ram import MemFile

_CONTROL = "lazymem-control"
_SERIAL = "lazymem-serial"

_NOT_AFTER_DASHES = {
    "-incoming": "say -incoming before the --, so that the state is checked against its RAM",
    "-daemonize": "QEMU stays this command's child; put an & behind the command, or use a unit",
}

_PINNING = ("-mem-prealloc", "-mlock")
_DISPLAYS = ("-display", "-nographic", "-curses", "-vnc", "-spice", "-sdl")


class Wanted(Struct, frozen=True):
    """One QEMU. `machine`: a versioned type; `words`: what the manifest adds; `more`: the user's, as they are.

    `unwritable`: the RAM file is only opened for reading (QEMU >= 8.2). `accelerator` None: `more` names it.
    """

    program: Path
    ram: MemFile
    ram_bytes: int
    machine: str
    switches: tuple[str, ...] = ()
    cpu: str | None = None
    accelerator: str | None = None
    words: tuple[str, ...] = ()
    kernel: Path | None = None
    append: str = ""
    serial: str = "none"
    qmp: Path | None = None
    incoming: bool = False
    start_paused: bool = False
    icount: bool = False
    unwritable: bool = False
    more: tuple[str, ...] = ()


def command(wanted: Wanted) -> list[str]:
    """The whole command line; with `incoming` QEMU waits for its state."""
    parts = [str(wanted.program), "-no-user-config", *wanted.words]
    if not has(wanted.more, *_DISPLAYS):
        parts += ["-display", "none"]
    if wanted.accelerator is not None:
        parts += ["-accel", wanted.accelerator]
    if wanted.icount:
        parts += ["-icount", "shift=0,sleep=off"]
    parts += ["-machine", _machine(wanted), "-m", _size(wanted.ram_bytes), "-object", _memory(wanted)]
    if wanted.cpu is not None:
        parts += ["-cpu", wanted.cpu]
    if wanted.kernel is not None:
        parts += ["-kernel", str(wanted.kernel)]
    if wanted.append:
        parts += ["-append", wanted.append]
    if not has(wanted.more, "-serial"):
        parts += _serial(wanted.serial)
    if wanted.qmp is not None:
        parts += ["-qmp", f"unix:{escaped(wanted.qmp)},server=on,wait=off"]
    if wanted.incoming:
        parts += ["-incoming", "defer"]
    if wanted.start_paused:
        parts.append("-S")
    return [*parts, *wanted.more]


def with_control(words: Sequence[str], descriptor: int) -> list[str]:
    """The same with a monitor of our own on an inherited socket: it has no name that would have to be removed."""
    control = ["-chardev", f"socket,id={_CONTROL},fd={descriptor}", "-mon", f"chardev={_CONTROL},mode=control"]
    return [words[0], *control, *words[1:]]


def check_more(more: Sequence[str]) -> None:
    """Raises UsageError for what may not stand after the --."""
    for option, reason in _NOT_AFTER_DASHES.items():
        if has(more, option):
            raise UsageError(f"{option} after the --: {reason}")


def pinning(more: Sequence[str]) -> list[str]:
    """Those of the user's options that make QEMU touch or pin all of RAM, so that all of it is fetched first."""
    found = [option for option in _PINNING if has(more, option)]
    found += [word for word in more if word.startswith(("vfio-", "driver=vfio-")) or "mem-lock=on" in word]
    return found


def escaped(path: Path | str) -> str:
    """In QEMU's lists of options a comma in a value is written twice."""
    return str(path).replace(",", ",,")


def _machine(wanted: Wanted) -> str:
    ours = (f"memory-backend={RAM_BLOCK}", "mem-merge=off", "dump-guest-core=off")
    return ",".join((wanted.machine, *wanted.switches, *ours))


def _size(ram_bytes: int) -> str:
    return f"{ram_bytes >> 20}M" if ram_bytes % (1 << 20) == 0 else f"{ram_bytes >> 10}K"


def _memory(wanted: Wanted) -> str:
    share = "on" if wanted.ram.share else "off"
    text = f"memory-backend-file,id={RAM_BLOCK},size={wanted.ram_bytes},mem-path={escaped(wanted.ram.path)}"
    text += f",share={share},prealloc=off"
    return f"{text},readonly=on,rom=off" if wanted.unwritable else text


def _serial(where: str) -> list[str]:
    """As `vm/serial` reads it. A port that leads nowhere is there for the guest all the same."""
    kind, _, path = where.partition(":")
    if where == "none":
        return ["-serial", "null"]
    if where == "stdio":
        return ["-serial", "stdio"]
    if kind == "file" and path:
        return ["-chardev", f"file,id={_SERIAL},path={escaped(path)}", "-serial", f"chardev:{_SERIAL}"]
    if kind == "unix" and path:
        return ["-serial", f"unix:{escaped(path)},server=on,wait=off"]
    raise UsageError(f"-serial takes stdio, file:PATH, unix:PATH or none, not {where!r}")


def named_machine(more: Sequence[str]) -> str | None:
    """What the user's -machine says."""
    return given(more, "-machine", "-M")
