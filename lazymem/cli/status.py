"""`lazymem status MOUNTPOINT`: asks a mount's daemon what it holds, fetches and waits for.

The question is an extended attribute of the mount's root: no second open of the RAM file, nothing for the guest to
notice, and whoever may see the mount may ask.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from lazymem.errors import LazymemError, MountError
from lazymem.fs import mountinfo
from lazymem.pages import PAGE_SIZE

PROGRAM = "lazymem status"
ATTRIBUTE = "user.lazymem.status"
MAP_ATTRIBUTE = "user.lazymem.map"

_EPILOG = """examples:
  lazymem status /mnt/ram
  lazymem status /mnt/ram --json | jq .pages_held
  lazymem status /mnt/ram --watch       live, until ctrl-C or the mount's end
  lazymem status /mnt/ram --watch --json | jq --unbuffered .seconds_to_go
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Show what a lazymem mount holds, fetches and waits for.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument("--json", action="store_true", help="print one JSON object; with --watch, one a line and look")
    parser.add_argument("--watch", action="store_true", help="a live view: map of the RAM, rates, waiting times")
    found = parser.parse_args(arguments)
    try:
        if found.watch:
            from lazymem.cli.watch import watch, watch_json

            return (watch_json if found.json else watch)(lambda: read_status(found.mountpoint, with_map=True))
        status = read_status(found.mountpoint, with_map=found.json)
    except LazymemError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(status, indent=2) if found.json else as_table(describe(status)))
    return 0


def read_status(mountpoint: str, *, with_map: bool = False) -> dict[str, Any]:
    """The daemon's record; its "map" (see `lazymem.store.coarsemap`) costs the mount a millisecond or two.

    Raises:
        MountError: no lazymem mount there, or its daemon does not answer.
    """
    path = mountinfo.real_path(mountpoint)
    mounted = mountinfo.maybe_mount_at(path)
    if mounted is None or not mounted.is_ours:
        raise MountError(f"{path} is not a lazymem mount; 'findmnt -t fuse.lazymem' lists them")
    try:
        status = json.loads(os.getxattr(path, ATTRIBUTE))
        if with_map:
            status["map"] = json.loads(os.getxattr(path, MAP_ATTRIBUTE))
    except OSError as error:
        raise MountError(f"the mount on {path} does not answer: {error.strerror}") from error
    assert isinstance(status, dict)
    return status


def as_table(rows: list[tuple[str, str]]) -> str:
    """A line a row, the values below each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def describe(status: dict[str, Any]) -> list[tuple[str, str]]:
    """The record for people: name and value a row."""
    total = status["pages_total"]
    return [
        ("mount", f"{status['mountpoint']} (pid {status['pid']})"),
        ("snapshot", f"{status['snapshot']} {status['identity'][:16]} from {status['server']}"),
        *([("restarts", _survival(status["survival"]))] if status.get("survival") else []),
        ("connection", status["connection"]),
        ("held", _pages(status["pages_held"], total)),
        ("written", _pages(status["pages_written"], total) if not status.get("template") else "never: a template"),
        *([("WAITING", _waiting_for_disk(status))] if status.get("store", {}).get("waiting_writes") else []),
        ("in flight", _pages(status["pages_in_flight"], total)),
        ("demand faults", f"{status['demand_faults']}, waited {_waits(status)}"),
        *([("working set", _working_set(status["working_set"]))] if status.get("working_set") else []),
        ("wire", f"{_mib(status['wire_received_bytes'])} in, {_mib(status['wire_sent_bytes'])} out"),
    ]


def _survival(found: dict[str, Any]) -> str:
    if found["kept_by"] is None:
        return f"none possible: {found['hindered_by'] or 'started without a supervisor'}"
    who = f"{found['kept_by']} (pid {found['supervisor_pid']})" if found["supervisor_pid"] else found["kept_by"]
    return f"{found['restarts']}, by {who}{', the next daemon is loaded' if found['next_is_loaded'] else ''}"


def _pages(count: int, total: int) -> str:
    return f"{count} of {total} pages, {_mib(count * PAGE_SIZE)}"


def _working_set(found: dict[str, int]) -> str:
    touched, pages = found["set_touched"], found["set_pages"]
    return f"{touched} of {pages} pages asked for so far, {found['set_ready']} of these were here before that"


def _waiting_for_disk(status: dict[str, Any]) -> str:
    where = status["state"] or status["cache"]
    return f"{status['store']['waiting_writes']} writes of the guest's wait for the disk of {where}: the log says why"


def _waits(status: dict[str, Any]) -> str:
    middle, high = status["demand_wait_p50_seconds"], status["demand_wait_p99_seconds"]
    return "-" if middle is None else f"p50 {middle * 1000:.2f} ms, p99 {high * 1000:.2f} ms"


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
