"""What the kernel says of a process and its threads."""

from __future__ import annotations

from pathlib import Path

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def status_of(pid: int, thread: int | None = None) -> dict[str, str]:
    """/proc/PID/status, or that of one thread."""
    lines = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def threads_of(pid: int) -> list[dict[str, str]]:
    """The status of each."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found.append(status_of(pid, int(task.name)))
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue
    return found


def capabilities_of(status: dict[str, str]) -> int:
    """All that it has, or may get, as bits."""
    bits = 0
    for name in CAPABILITY_SETS:
        bits |= int(status[name], 16)
    return bits
