"""How long a guest waits whose mount's daemon is killed soon after the mount's start, and again soon after that.

    python -m bench.freshstalls ADDRESS FOLDER [--after SECONDS ...] [--times 5]

Beside `bench.stalls`, whose mount has settled. Here each kill has a new mount, of ADDRESS on a folder in FOLDER, over a
cache that holds everything. The guest is this process, as there: it reads pages at random, each asked for anew. The
daemon is killed so long after the command that mounts has returned; the next one is killed as soon as it serves.
Printed are the longest reads from the one kill on, and from the other, in ms.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.stalls import LOOK_SECONDS, PAGE
from lazymem.cli.status import read_status

MOUNT = [sys.executable, "-P", "-m", "lazymem.cli.mount"]

SETTLE_SECONDS = 1.0
"""Of reading, behind the last kill."""


class Killer(threading.Thread):
    """Kills two daemons; `kills`: when, by perf_counter. `reads`: begin and end of each, by the same clock."""

    def __init__(self, mountpoint: str, after_seconds: float, reads: list[tuple[float, float]]) -> None:
        super().__init__()
        self._mountpoint = mountpoint
        self._after_seconds = after_seconds
        self._reads = reads
        self.kills: list[float] = []
        self.start()

    def run(self) -> None:
        first = read_status(self._mountpoint)["pid"]
        time.sleep(self._after_seconds)
        self._kill(first)
        while (second := read_status(self._mountpoint)["pid"]) == first or self._reads[-1][0] < self.kills[0]:
            time.sleep(LOOK_SECONDS)
        self._kill(second)
        while read_status(self._mountpoint)["pid"] == second:
            time.sleep(LOOK_SECONDS)
        time.sleep(SETTLE_SECONDS)

    def _kill(self, pid: int) -> None:
        self.kills.append(time.perf_counter())
        os.kill(pid, signal.SIGKILL)


def stalls(mountpoint: str, after_seconds: float) -> tuple[float, float]:
    """The longest read behind the first kill, and behind the second, in seconds; of a mount that is ready."""
    ram = os.open(os.path.join(mountpoint, "pc.ram"), os.O_RDONLY)
    os.posix_fadvise(ram, 0, 0, os.POSIX_FADV_RANDOM)
    pages = os.fstat(ram).st_size // PAGE
    reads: list[tuple[float, float]] = []
    killer = Killer(mountpoint, after_seconds, reads)
    while killer.is_alive():
        offset = random.randrange(pages) * PAGE
        os.posix_fadvise(ram, offset, PAGE, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        os.pread(ram, 1, offset)
        reads.append((begun, time.perf_counter()))
    os.close(ram)
    first, second = killer.kills
    return (
        max(end - begun for begun, end in reads if end > first and begun < second),
        max(end - begun for begun, end in reads if end > second),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.freshstalls", description="Stalls of a guest, in ms.")
    parser.add_argument("address", help="a server's")
    parser.add_argument("folder", type=Path, help="for mount point and cache")
    parser.add_argument("--after", type=float, nargs="+", default=[0.0, 0.2, 1.0, 3.0], metavar="SECONDS")
    parser.add_argument("--times", type=int, default=5)
    found = parser.parse_args()
    mountpoint, cache = found.folder / "mnt", found.folder / "cache"
    mountpoint.mkdir(parents=True, exist_ok=True)
    command = [*MOUNT, "--cache", str(cache), found.address, str(mountpoint)]

    def mount() -> None:
        subprocess.run(command, check=True)

    def unmount() -> None:
        subprocess.run(["umount", mountpoint], check=True)

    mount()
    while (status := read_status(str(mountpoint)))["pages_held"] < status["pages_total"]:
        time.sleep(LOOK_SECONDS)
    unmount()
    for after in found.after:
        pairs = []
        for _ in range(found.times):
            mount()
            pairs.append(stalls(str(mountpoint), after))
            unmount()
        for name, each in zip(("killed", "killed again"), zip(*pairs, strict=True), strict=True):
            told = " ".join(f"{1000 * stall:.0f}" for stall in sorted(each))
            print(f"after {after:g} s, {name}: median {1000 * statistics.median(each):.0f} ms of {told}", flush=True)


if __name__ == "__main__":
    main()
