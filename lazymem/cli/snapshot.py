"""`lazymem snapshot`: makes a snapshot folder from a running guest, whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from msgspec.structs import asdict

from lazymem.cli.interrupts import interrupted_once
from lazymem.cli.progress import reporting
from lazymem.cli.standby import Standby
from lazymem.errors import LazymemError, MonitorError, StoreError
from lazymem.vm.taking import Options, Result, take_snapshot
from lazymem.vm.undoing import Change, undo, ways_by_hand

_EPILOG = """examples:
  lazymem snapshot /run/vm/qmp.sock /srv/snapshots/web            save the guest; the emulator ends
  lazymem snapshot /run/vm/qmp.sock /srv/snapshots/web --resume   save it and let it run on
  lazymem snapshot /run/vm/qmp.sock /srv/snapshots/web-2 --resume --delta
                                      it runs from a mount of .../web: keep what it wrote, to be served with that
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options, as_json = _parse(arguments)
    try:
        with _standby(options) as standby, interrupted_once(), reporting(quiet=as_json) as reporter:
            result = take_snapshot(options, reporter, standby.note)
    except LazymemError as error:
        return _failed(error)
    except OSError as error:
        # What is left of OSErrors here is the local disk: full, read-only, broken.
        return _failed(StoreError(f"cannot write the snapshot: {error}"))
    except KeyboardInterrupt:
        print(f"lazymem snapshot: interrupted; {_made(options)}, the guest goes on", file=sys.stderr)
        return 130
    print(json.dumps(asdict(result)) if as_json else describe(result))
    return 0


def _standby(options: Options) -> Standby[Change]:
    """For when this process is killed: the guest must not stand for that."""

    def say(text: str) -> None:
        print(f"lazymem snapshot: {text}", file=sys.stderr)

    def take_back(change: Change) -> None:
        try:
            undo(options.monitor, change)
        except MonitorError as error:
            raise MonitorError(ways_by_hand(options.monitor, error)) from error
        say(f"it was killed; {_made(options)}, the guest goes on")

    return Standby(Change, take_back, say)


def _made(options: Options) -> str:
    return "the snapshot was complete already" if os.path.lexists(options.target) else "no snapshot was made"


def _failed(error: LazymemError) -> int:
    print(f"lazymem snapshot: {error}", file=sys.stderr)
    return error.exit_code


def _parse(arguments: list[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        prog="lazymem snapshot",
        description="Save a running guest (QEMU >= 7.2 or lazymem-vm) whose RAM is a file into the new folder DIR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("monitor", metavar="QMP_SOCKET", type=Path, help="the emulator's monitor, a unix socket")
    parser.add_argument("target", metavar="DIR", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--resume", action="store_true", help="let the guest run on (without it, the emulator ends)")
    parser.add_argument(
        "--disks-handled",
        action="store_true",
        help="the guest's writable disks are saved by you, at the same moment; each resume will say so",
    )
    parser.add_argument(
        "--delta",
        action="store_true",
        help="of a guest on a mount: keep only what it wrote; lazymem-serve then needs the mounted snapshot, too",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    found = parser.parse_args(arguments)
    return Options(found.monitor, found.target, found.resume, found.disks_handled, found.delta), found.json


def describe(result: Result) -> str:
    """The result for people, one fact a line."""
    lines = [
        f"snapshot    {result.directory}",
        f"RAM         {_mib(result.ram_bytes)}, {_mib(result.ram_stored_bytes)} stored ({result.ram_way})",
        f"vmstate     {_mib(result.vmstate_bytes)}",
    ]
    if result.parent is not None:
        lines.append(f"parent      {result.parent[:16]}..., whose folder lazymem-serve needs, too")
    if result.pause_seconds is not None:
        lines.append(f"guest stood {result.pause_seconds * 1000:.0f} ms and runs on")
    elif result.resumed:
        lines.append("guest       as it was before: paused")
    else:
        lines.append("guest       ended")
    if result.uncovered_disks:
        lines.append(f"NOTE        disks not in the snapshot, as you said: {', '.join(result.uncovered_disks)}")
    return "\n".join(lines)


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
