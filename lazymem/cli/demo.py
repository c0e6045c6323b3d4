"""`lazymem demo`: the main job on this machine, with figures. Leaves nothing behind, also when interrupted."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lazymem.cli.interrupts import interrupted_once
from lazymem.cli.progress import PlainReporter, Reporter, reporting
from lazymem.demo.processes import tail
from lazymem.demo.qemu import find_qemu
from lazymem.demo.runs import Figures, Place, run_linux, run_pages
from lazymem.errors import LazymemError, StoreError, UsageError

_COPIES = 4
"""RAM files at the worst moment: the source's and its copy, the mount's cache and its written pages."""

_EXIT_WRONG = 1

_EPILOG = """Each guest is booted, saved, served, mounted and resumed from the mount, all on this machine, with files in
a temporary folder (TMPDIR chooses where) and ports of this host only.

examples:
  lazymem demo
  lazymem demo --guest pages --memory 1024 --prefetch none    every page comes when it is touched
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0 only when every page of every guest was right."""
    found = _parser().parse_args(arguments)
    try:
        with interrupted_once():
            results = _run(found.memory << 20, found.guest, found.prefetch)
    except LazymemError as error:
        print(f"lazymem demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lazymem demo: interrupted; guests, mount, server and files are gone again", file=sys.stderr)
        return 130
    _show(results)
    return 0 if all(result.good for result in results) else _EXIT_WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lazymem demo",
        description="Resume guests whose RAM is elsewhere, and show what that took.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", metavar="MIB", type=_mib, default=256, help="the guests' RAM (default 256)")
    parser.add_argument("--guest", choices=("pages", "linux", "all"), default="all", help="which to run (default all)")
    parser.add_argument(
        "--prefetch",
        choices=("all", "none"),
        default="all",
        help="whether the mount also brings what the guest has not touched yet (default all)",
    )
    return parser


def _mib(text: str) -> int:
    if not text.isdecimal() or not 8 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError("a number of MiB from 8 to 65536")
    return int(text)


def _run(ram_bytes: int, wanted: str, prefetch: str) -> list[Figures]:
    with reporting(otherwise=PlainReporter) as reporter:
        jobs: list[tuple[str, Callable[[Place, Reporter], Figures]]] = []
        if wanted in ("pages", "all"):
            jobs.append(("the pages guest in lazymem-vm", run_pages))
        if wanted == "linux" or (wanted == "all" and _can_run_linux(reporter)):
            jobs.append(("a Linux guest in QEMU", run_linux))
        results = []
        for title, job in jobs:
            reporter.note(f"{title}, {ram_bytes >> 20} MiB: boot, save, serve, mount, resume, check")
            results.append(_in_a_folder(ram_bytes, prefetch, job, reporter))
        return results


def _can_run_linux(reporter: Reporter) -> bool:
    if find_qemu() is None:
        reporter.note("no QEMU here (`make setup` installs one): without the Linux guest")
        return False
    return True


def _in_a_folder(
    ram_bytes: int, prefetch: str, job: Callable[[Place, Reporter], Figures], reporter: Reporter
) -> Figures:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < _COPIES * ram_bytes:
        needed = _COPIES * ram_bytes >> 20
        raise StoreError(
            f"{tempfile.gettempdir()} has {free >> 20} MiB free and the demo may need {needed}: "
            "choose another with TMPDIR"
        )
    with tempfile.TemporaryDirectory(prefix="lazymem-demo-") as folder:
        if len(folder) > 80:
            raise UsageError(f"TMPDIR is too long for sockets: {folder}")
        try:
            return job(Place(Path(folder), ram_bytes, prefetch), reporter)
        except LazymemError:
            _say_logs(Path(folder), reporter)
            raise


def _say_logs(folder: Path, reporter: Reporter) -> None:
    """What the programs said last: the files are gone in a moment."""
    for log in sorted(folder.glob("*.log")):
        for line in tail(log, 600).splitlines()[-4:]:
            reporter.note(f"  {log.stem}: {line}")


def _show(results: list[Figures]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Resumed from a mount; RAM came when it was touched", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.guest, justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *(cell(result) for result in results))
    Console().print(table)


_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("RAM", lambda f: f"{f.ram_bytes >> 20} MiB"),
    ("of that in the stream", lambda f: f"{f.ram_in_stream_bytes} bytes"),
    ("size of the stream", lambda f: f"{f.vmstate_bytes / 1024:.0f} KiB"),
    ("mount ready in", lambda f: f"{f.mount_seconds * 1000:.0f} ms"),
    ("emulator runs guest in", lambda f: f"{f.start_seconds * 1000:.0f} ms"),
    ("pages on demand", lambda f: f"{f.demanded_pages} of {f.total_pages}"),
    ("pages ahead of that", lambda f: f"{f.ahead_pages}"),
    ("checked by the guest", lambda f: f.check),
    ("wrong pages", lambda f: "-" if f.wrong_pages is None else str(f.wrong_pages)),
)


if __name__ == "__main__":
    sys.exit(main())
