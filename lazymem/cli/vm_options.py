"""lazymem-vm's command line: options as in QEMU, with one dash or two, turned into a checked record. Opens nothing."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from msgspec import Struct

import lazymem
from lazymem.errors import MonitorError, UsageError
from lazymem.vm.ram import MemFile, parse_mem_file, pc_ram_file
from lazymem.vm.uri import Uri, parse_uri

_DESCRIPTION = """\
A small x86-64 PC whose RAM can be a file. A guest saved here resumes there, its RAM never in the save stream.
"""

_EXAMPLES = """\
examples:
  A guest whose RAM is a file, with a monitor:
    truncate -s 64M ram
    lazymem-vm -m 64 --pcram-file ram -kernel heartbeat -serial stdio -qmp unix:qmp

  Save it into a snapshot folder, and serve that:
    lazymem snapshot qmp snapshot
    lazymem-serve snapshot

  Resume it elsewhere, its RAM coming in as it is touched:
    lazymem-mount HOST:7411 /mnt
    lazymem-vm -m 64 --pcram-file /mnt/pc.ram -incoming file:/mnt/vmstate -serial stdio

  Many guests from one image, none of which changes it:
    lazymem-vm -m 64 --pcram-file snapshot/pc.ram,share=off -incoming file:snapshot/vmstate -serial stdio

  The same with a stock QEMU, machine and CPU as the snapshot says; its own options follow the --:
    lazymem-vm --engine qemu -m 4G --pcram-file /mnt/pc.ram -incoming file:/mnt/vmstate -qmp unix:qmp -- \\
        -netdev user,id=n0 -device virtio-net-pci,netdev=n0

exit status: 0 after quit; a guest's own on its debug-exit port; 130 and 143 after SIGINT and SIGTERM; 2 for a wrong
command line; 4 a file that cannot back RAM; 6 a state that is not this RAM's; 7 a broken save stream; 14 a RAM file in
use; 16 a guest that crashed. The man page lists all.
"""

_SHORT = {"-m", "-S", "-h"}

VALUED = {
    "-m",
    "--append",
    "--engine",
    "--exit-code-file",
    "--incoming",
    "--kernel",
    "--made-by",
    "--mem-file",
    "--pcram-file",
    "--qemu",
    "--qmp",
    "--serial",
}
"""Options that take a value."""

_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Incoming(Struct, frozen=True):
    """Where the guest's state comes from; `uri` None: to be named over the monitor (defer)."""

    uri: Uri | None


class VmOptions(Struct, frozen=True):
    """The whole command line. `qmp`: the monitor's socket; `start_paused`: -S.

    `engine`: unicorn, our own machine, or qemu; the fields behind it are qemu's. `more`: what followed the ``--``.
    """

    ram_bytes: int
    mem_files: tuple[MemFile, ...]
    kernel: Path | None
    append: str
    serial: str
    qmp: Path | None
    incoming: Incoming | None
    start_paused: bool
    icount: bool
    engine: str = "unicorn"
    qemu: str | None = None
    print_command: bool = False
    made_by: Path | None = None
    exit_code_file: Path | None = None
    more: tuple[str, ...] = ()


def parse_command_line(arguments: Sequence[str]) -> VmOptions:
    """Check and read the command line; --help and --version print and end the process.

    Raises:
        UsageError: it makes no sense.
        RamFileError: a --pcram-file or --mem-file does not.
    """
    ours, more = _split(list(arguments))
    found = make_parser().parse_args(_with_two_dashes(ours))
    _check_engine(found, more)
    files = [pc_ram_file(text) for text in found.pcram_file] + [parse_mem_file(text) for text in found.mem_file]
    if found.kernel is None and found.incoming is None and not more:
        raise UsageError("nothing to run: name a kernel (-kernel) or an incoming state (-incoming)")
    incoming = None
    if found.incoming is not None:
        incoming = Incoming(None if found.incoming == "defer" else _incoming_uri(found.incoming))
    if incoming is not None and incoming.uri is None and found.qmp is None:
        raise UsageError("-incoming defer waits for a monitor's migrate-incoming: name one with -qmp")
    return VmOptions(
        ram_bytes=ram_bytes(found.m),
        mem_files=tuple(files),
        kernel=found.kernel,
        append=found.append,
        serial=found.serial,
        qmp=None if found.qmp is None else monitor_path(found.qmp),
        incoming=incoming,
        start_paused=found.S,
        icount=found.icount,
        engine=found.engine,
        qemu=found.qemu,
        print_command=found.print,
        made_by=found.made_by,
        exit_code_file=found.exit_code_file,
        more=tuple(more or ()),
    )


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Ours, and those after the first ``--``; None where there is no such."""
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _check_engine(found: argparse.Namespace, more: list[str] | None) -> None:
    if found.engine != "qemu" and (found.print or found.qemu or found.made_by or more is not None):
        raise UsageError("--print, --qemu, --made-by and options after -- are QEMU's: say --engine qemu")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (lazymem-vm --help lists the options)")


def make_parser() -> argparse.ArgumentParser:
    """Every option in its two-dash spelling; `_with_two_dashes` maps the others to it."""
    parser = _Parser(
        prog="lazymem-vm",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="lazymem-vm [-m SIZE] [--pcram-file FILE] {-kernel FILE | -incoming URI} [options] [-- QEMU OPTIONS]",
    )
    add = parser.add_argument
    add("-m", metavar="SIZE", default="128", help="RAM: a number in MiB, or with K, M, G or T (default 128)")
    add(
        "--pcram-file",
        metavar="FILE[,share=on|off]",
        action="append",
        default=[],
        help="back the guest's RAM (block pc.ram) with FILE, which has exactly its size. share=on: FILE is the RAM; "
        "share=off: mapped privately, the guest's writes reach no file",
    )
    add(
        "--mem-file",
        metavar="BLOCK=FILE[,share=on|off]",
        action="append",
        default=[],
        help="the same for any block: pc.ram, pc.bios, vga.vram",
    )
    add("--kernel", metavar="FILE", type=Path, help="an ELF64 kernel, or an image with the Linux boot protocol")
    add("--append", metavar="TEXT", default="", help="the kernel's command line")
    add("--serial", metavar="WHERE", default="none", help="COM1: stdio, file:PATH, unix:PATH or none (default)")
    add("--qmp", metavar="unix:PATH", help="listen there for the monitor (QMP)")
    add(
        "--incoming",
        metavar="URI",
        help="take over a saved guest from file:PATH, tcp:HOST:PORT or unix:PATH, or as the monitor says (defer)",
    )
    add("-S", action="store_true", help="do not start the guest; the monitor's cont does")
    add("--icount", action="store_true", help="take time from executed instructions: every run is the same")
    add(
        "--engine",
        choices=("unicorn", "qemu"),
        default="unicorn",
        help="what runs the guest: the small PC of this command (unicorn, the default), or a stock QEMU, to which all "
        "after -- goes as it is",
    )
    add("--qemu", metavar="PROGRAM", help="that QEMU (default: the qemu-system-x86_64 on the PATH)")
    add(
        "--made-by",
        metavar="FILE",
        type=Path,
        help="which QEMU the state comes from: a snapshot's manifest.json, where none lies beside the RAM",
    )
    add(
        "--exit-code-file", metavar="FILE", type=Path, help="where to write the exit status, for others than the parent"
    )
    add("--print", action="store_true", help="print QEMU's command line, checked but not run")
    add("--version", action="version", version=f"lazymem-vm {lazymem.__version__}")
    return parser


def _with_two_dashes(arguments: Sequence[str]) -> list[str]:
    """QEMU's single-dash spelling too, and values that begin with a dash (``-append -x``)."""
    result: list[str] = []
    left = iter(arguments)
    for word in left:
        option = f"-{word}" if re.match(r"-[A-Za-z]", word) and word not in _SHORT else word
        if option not in VALUED:
            result.append(option)
            continue
        value = next(left, None)
        if value is None:
            raise UsageError(f"{word} needs a value")
        result.append(f"{option}={value}" if option.startswith("--") else f"{option}{value}")
    return result


def ram_bytes(text: str) -> int:
    """A size as QEMU's -m takes it, in bytes: a plain number is MiB.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"(?:size=)?([0-9]{1,15}(?:\.[0-9]{1,9})?)([bBkKmMgGtT]?)", text)
    if match is None:
        raise UsageError(f"-m {text}: not a size; use 512, 512M or 2G")
    size = Fraction(match[1]) * _UNITS[match[2].lower() or "m"]
    if size.denominator != 1:
        raise UsageError(f"-m {text}: not a whole number of bytes")
    return int(size)


def monitor_path(text: str) -> Path:
    """``unix:PATH``, also with QEMU's ``,server=on,wait=off``.

    Raises:
        UsageError: another kind of socket, or an option that is not offered.
    """
    kind, _, rest = text.partition(":")
    path, *options = rest.split(",")
    if kind != "unix" or not path:
        raise UsageError(f"-qmp takes unix:PATH, not {text!r}")
    for option in options:
        if option not in ("server", "server=on", "nowait", "wait=off"):
            raise UsageError(f"-qmp {text}: {option!r} is not offered; the monitor is a server and waits for nobody")
    return Path(path)


def _incoming_uri(text: str) -> Uri:
    try:
        return parse_uri(text)
    except MonitorError as error:
        raise UsageError(f"-incoming: {error}") from error
