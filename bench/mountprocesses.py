"""The processes that keep a lazymem mount, and their memory: daemon, filling process, supervisor, next daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.way import Mount, wait_until

_PROC = Path("/proc")


def resident_bytes(pid: int, field: str = "Rss") -> int:
    """From /proc/PID/smaps_rollup."""
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} for process {pid}")


def private_bytes(pid: int) -> int:
    """Anonymous memory, a page that several processes have since a fork divided among them: the sum over all of a
    mount's processes counts it once.
    """
    return resident_bytes(pid, "Pss_Anon")


def wait_settled(mount: Mount) -> None:
    """Until a supervisor, where there is one, has the next daemon loaded: it is there for the mount's whole life."""

    def settled() -> bool:
        survival = mount.status()["survival"]
        return survival["kept_by"] is None or survival["next_is_loaded"]

    wait_until(settled, "the next daemon")


def processes_of(mount: Mount) -> dict[str, int]:
    """Name to process id: `daemon`; `fill` while that process lives; `supervisor` and `next` where there are these.

    Raises:
        ValueError: the mount has a process that none of these is, and that a figure would leave out.
    """
    status = mount.status()
    daemon, survival = int(status["pid"]), status["survival"]
    parents = dict(_parents())
    found = {"daemon": daemon}
    for name in ("supervisor", "next"):  # the latter is nobody's child
        if survival[f"{name}_pid"]:
            found[name] = int(survival[f"{name}_pid"])
    for pid in _below({daemon, *found.values()}, parents) - set(found.values()):
        name = "fill" if parents[pid] == daemon else ""
        if not name or name in found:
            raise ValueError(f"process {pid}, a child of {parents[pid]}, is not known to be one of the mount's")
        found[name] = pid
    return found


def bytes_of_each(mount: Mount, read: Callable[[int], int]) -> dict[str, int]:
    """What `read` tells of each of `processes_of`. The filling process may end between the look for it and that."""
    found = {}
    for name, pid in processes_of(mount).items():
        try:
            found[name] = read(pid)
        except (FileNotFoundError, ProcessLookupError):
            if name != "fill":
                raise
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all there are."""
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it ended meanwhile
            continue
        yield int(path.parent.name), int(text.rpartition(")")[2].split()[1])


def _below(roots: set[int], parents: dict[int, int]) -> set[int]:
    """The roots and all that descends from them."""
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
