"""How much of a guest's RAM a process has looked at: by read(2) and its kin, and through its map of the file."""

from __future__ import annotations

from pathlib import Path

_ALL = "1"
"""To /proc/PID/clear_refs: of every page of the process."""


def read_bytes(pid: int) -> int:
    """Of files, since it began. What came over sockets is not among them."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def forget_touched(pid: int) -> None:
    """From here on `touched_bytes` counts anew: the processor notes in a map's entry that it was used."""
    Path(f"/proc/{pid}/clear_refs").write_text(_ALL)


def touched_bytes(pid: int, path: Path) -> int:
    """Of the file, through the process's maps of it, and of those pages what anybody has read since.

    Raises:
        AssertionError: it does not map the file.
    """
    touched, is_ours, found = 0, False, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            is_ours = len(words) == 6 and words[5] == str(path)
            found |= is_ours
        elif is_ours and words[0] == "Referenced:":
            touched += int(words[1]) * 1024
    assert found, f"process {pid} does not map {path}"
    return touched
