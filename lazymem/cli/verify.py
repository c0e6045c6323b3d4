"""`lazymem verify DIR|MOUNTPOINT`: holds every page that is there against its digest, and names the wrong ones."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazymem.cli.interrupts import interrupted_once
from lazymem.cli.progress import Reporter, reporting
from lazymem.digests import Checked
from lazymem.errors import LazymemError, SnapshotError, StoreError, VerificationError
from lazymem.fs import mountinfo
from lazymem.pages import PAGE_SIZE, PageRange, runs

PROGRAM = "lazymem verify"

MAX_NAMED = 1000
"""Runs of pages of a kind in the JSON record; their number is there in any case."""

_LINES = 10
"""Runs of a kind that people see."""

_STATE_RECORD = "state.json"

_EPILOG = """examples:
  lazymem verify /srv/snapshots/web                 a snapshot: pages, digest tree, device state
  lazymem verify /srv/snapshots/web-2 --parent /srv/snapshots/web
                                                    a delta, as a whole with its parent
  lazymem verify ~/.cache/lazymem                   all that mounts keep here of snapshots elsewhere
  lazymem verify /mnt/ram --json | jq .ok           what a mount holds; nothing is fetched, no guest notices
"""


class Found:
    """What one folder's check found. `named`: kind (wrong, unreadable, unknown) to its pages."""

    def __init__(self, kind: str, path: Path, identity: bytes, total_pages: int) -> None:
        self.kind = kind
        self.path = path
        self.identity = identity
        self.total_pages = total_pages
        self.checked_pages = 0
        self.problems: list[str] = []
        self.complete = False
        self._named: dict[str, list[int]] = {"wrong": [], "unreadable": [], "unknown": []}

    def add(self, checked: Checked) -> None:
        self.checked_pages += checked.pages.count
        for kind, pages in self._named.items():
            pages.extend(getattr(checked, kind))

    def runs(self, kind: str) -> list[PageRange]:
        return runs(self._named[kind])

    def count(self, kind: str) -> int:
        return len(self._named[kind])

    @property
    def has_wrong_bytes(self) -> bool:
        """A held page without a digest that could be believed counts: its digest was there, and was changed."""
        return bool(self.count("wrong") or self.count("unknown") or self.problems)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": str(self.path),
            "identity": self.identity.hex(),
            "pages_total": self.total_pages,
            "pages_checked": self.checked_pages,
            "complete": self.complete,
            "problems": self.problems,
            **{f"pages_{kind}": self.count(kind) for kind in self._named},
            **{kind: [[run.start, run.count] for run in self.runs(kind)[:MAX_NAMED]] for kind in self._named},
        }


_WHOLE = ("snapshot", "delta")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    found = _parser().parse_args(arguments)
    results: list[Found] = []
    try:
        with interrupted_once(), reporting(quiet=found.json) as reporter:
            for result in _verify(found.folder, found.parent, reporter, results):
                result.complete = True
    except LazymemError as error:
        return _failed(error, results, as_json=found.json)
    except OSError as error:
        return _failed(StoreError(f"cannot read {found.folder}: {error.strerror}"), results, as_json=found.json)
    except KeyboardInterrupt:
        _print(results, as_json=found.json)
        print(f"{PROGRAM}: interrupted; the rest was not looked at", file=sys.stderr)
        return 130
    _print(results, as_json=found.json)
    return exit_code(results)


def exit_code(results: list[Found]) -> int:
    """0 where all that was looked at is right; wrong bytes count before bytes that could not be read."""
    if any(result.has_wrong_bytes for result in results):
        return VerificationError.exit_code
    return StoreError.exit_code if any(result.count("unreadable") for result in results) else 0


def _failed(error: LazymemError, results: list[Found], *, as_json: bool) -> int:
    _print(results, as_json=as_json, maybe_error=str(error))
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Hold every page that is there against its digest: of a snapshot, a cache, or what a mount holds. "
        "Reads only.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR|MOUNTPOINT", type=Path, help="a snapshot, a cache folder, or a mount")
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="DIR",
        type=Path,
        help="the snapshot that a delta was made over, where it is not beside the delta; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _verify(folder: Path, parents: list[Path], reporter: Reporter, results: list[Found]) -> Iterator[Found]:
    """Each result stands in `results` from its beginning on, and is yielded at its end."""
    mounted = mountinfo.maybe_mount_at(mountinfo.real_path(str(folder)))
    if mounted is not None and mounted.is_ours:
        yield from _verify_mount(folder, reporter, results)
    elif not os.path.isdir(folder):
        raise SnapshotError(f"{folder} is no folder" if os.path.lexists(folder) else f"{folder} does not exist")
    elif os.path.lexists(folder / _STATE_RECORD):
        raise SnapshotError(f"{folder} is a state folder: what a guest wrote has no digests to be held against")
    elif os.path.lexists(folder / "manifest.json") or os.path.lexists(folder / "pc.ram"):
        yield from _verify_snapshot(folder, parents, reporter, results)
    else:
        yield from _verify_caches(folder, reporter, results)


def _verify_mount(folder: Path, reporter: Reporter, results: list[Found]) -> Iterator[Found]:
    from lazymem.cli.status import read_status

    status = read_status(str(folder))
    cache = Path(status["cache"]) / status["identity"]
    yield from _verify_cache("mount", cache, folder, reporter, results)


def _verify_caches(folder: Path, reporter: Reporter, results: list[Found]) -> Iterator[Found]:
    from lazymem.store.cachecheck import caches_in

    caches = caches_in(folder)
    if not caches:
        raise SnapshotError(f"{folder} is neither a snapshot nor a cache folder, and no mount is on it")
    for cache in caches:
        yield from _verify_cache("cache", cache, cache, reporter, results)


def _verify_cache(kind: str, cache: Path, path: Path, reporter: Reporter, results: list[Found]) -> Iterator[Found]:
    from lazymem.store.cachecheck import CheckableCache

    opened = CheckableCache(cache)
    try:
        result = Found(kind, path, opened.identity, opened.shape.pages)
        results.append(result)
        _run(result, opened.check(), opened.held_pages(), reporter)
        yield result
    finally:
        opened.close()


def _verify_snapshot(folder: Path, parents: list[Path], reporter: Reporter, results: list[Found]) -> Iterator[Found]:
    from lazymem.snapshot.checking import CheckableSnapshot

    opened = CheckableSnapshot(folder, parents)
    try:
        result = Found(opened.kind, folder, opened.identity, opened.shape.pages)
        results.append(result)
        result.problems = opened.problems()
        _run(result, opened.check(), opened.shape.pages, reporter)
        yield result
    finally:
        opened.close()


def _run(result: Found, parts: Iterator[Checked], pages: int, reporter: Reporter) -> None:
    reporter.phase(f"verifying {result.path}", pages * PAGE_SIZE)
    for checked in parts:
        result.add(checked)
        reporter.advance(checked.pages.length_bytes)


def _print(results: list[Found], *, as_json: bool, maybe_error: str | None = None) -> None:
    if as_json:
        record: dict[str, Any] = {
            "ok": maybe_error is None and exit_code(results) == 0 and all(result.complete for result in results),
            "checked": [result.to_json() for result in results],
        }
        if maybe_error is not None:
            record["error"] = maybe_error
        print(json.dumps(record, indent=2))
        return
    for result in results:
        print("\n".join(describe(result)))


def describe(result: Found) -> list[str]:
    """The result for people."""
    lines = [f"{result.path}: {result.checked_pages} of {result.total_pages} pages {_looked_at(result.kind)}"]
    if not result.complete:
        lines[0] += ", not all of them"
    lines += [f"  {problem}" for problem in result.problems]
    for kind, text in _TEXTS.items():
        named = result.runs(kind)
        if named:
            lines.append(
                f"  {result.count(kind)} {text[result.kind in _WHOLE]}: {', '.join(map(_name, named[:_LINES]))}"
                + (f" and {len(named) - _LINES} more runs" if len(named) > _LINES else "")
            )
    if len(lines) == 1 and result.complete:
        lines[0] += ": all right"
    return lines


_TEXTS = {
    "wrong": ("wrong pages, which a mount fetches again", "wrong pages, which nobody is served"),
    "unreadable": ("pages that the disk does not give, and a mount fetches again", "pages that the disk does not give"),
    "unknown": ("pages whose digests were changed, and a mount fetches again", "pages whose digests were changed"),
}


def _looked_at(kind: str) -> str:
    return "held against their digests" if kind in _WHOLE else "are here, and were held against their digests"


def _name(run: PageRange) -> str:
    return str(run.start) if run.count == 1 else f"{run.start}-{run.end - 1}"


if __name__ == "__main__":
    sys.exit(main())
