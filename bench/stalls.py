"""How long a guest waits when a mount's daemon, its supervisor, or both are killed, or the daemon is upgraded.

    python -m bench.stalls MOUNTPOINT WAY [--times 10]      WAY: daemon, supervisor, both, upgrade,
                                                            nothing (what the machine does by itself)

The guest is this process: it reads pages of the RAM at random, each asked for anew (the kernel's copy is
dropped before), while another process does WAY. Printed is the longest read of each time, in ms; before the next time a
next daemon is loaded again. "both" is the mount's end where no systemd has it (docs/failures.md).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time

from lazymem.cli.status import read_status

PAGE = 4096

SETTLE_SECONDS = 0.5
"""Of reading, before and after: the stall lies between."""

LOOK_SECONDS = 0.02


def do(way: str, mountpoint: str) -> None:
    """Do it, and return when there is a loaded next daemon again."""
    time.sleep(SETTLE_SECONDS)
    before = read_status(mountpoint)
    daemon, supervisor = before["pid"], before["survival"]["supervisor_pid"]
    for pid in {"daemon": [daemon], "supervisor": [supervisor], "both": [supervisor, daemon]}.get(way, []):
        os.kill(pid, signal.SIGKILL)
    if way == "upgrade":
        upgrade = [sys.executable, "-m", "lazymem.cli.main", "mount", "--upgrade", mountpoint]
        subprocess.run(upgrade, check=True, stdout=subprocess.DEVNULL)
    while True:
        now = read_status(mountpoint)
        another = now["pid"] != daemon if way not in ("supervisor", "nothing") else True
        if way == "supervisor":
            another = now["survival"]["supervisor_pid"] != supervisor
        if another and now["survival"]["next_is_loaded"]:
            break
        time.sleep(LOOK_SECONDS)
    time.sleep(SETTLE_SECONDS)


def longest_read(way: str, mountpoint: str, ram: int) -> float:
    """In seconds, while `way` is done once."""
    child = os.fork()
    if child == 0:
        do(way, mountpoint)
        os._exit(0)
    longest, pages = 0.0, os.fstat(ram).st_size // PAGE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        offset = random.randrange(pages) * PAGE
        os.posix_fadvise(ram, offset, PAGE, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        os.pread(ram, 1, offset)
        longest = max(longest, time.perf_counter() - begun)
    assert ended[1] == 0, f"{way} came to nothing"
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stalls", description="Stalls of a guest, in ms.")
    parser.add_argument("mountpoint")
    parser.add_argument("way", choices=["daemon", "supervisor", "both", "upgrade", "nothing"])
    parser.add_argument("--times", type=int, default=10)
    found = parser.parse_args()
    ram = os.open(os.path.join(found.mountpoint, "pc.ram"), os.O_RDONLY)
    os.posix_fadvise(ram, 0, 0, os.POSIX_FADV_RANDOM)
    size = os.fstat(ram).st_size
    while read_status(found.mountpoint)["pages_held"] * PAGE < size:
        os.pread(ram, 1, random.randrange(size))
        time.sleep(LOOK_SECONDS)
    while not read_status(found.mountpoint)["survival"]["next_is_loaded"]:
        time.sleep(LOOK_SECONDS)
    stalls = [1000 * longest_read(found.way, found.mountpoint, ram) for _ in range(found.times)]
    told = " ".join(f"{stall:.0f}" for stall in sorted(stalls))
    print(
        f"{found.way}: median {statistics.median(stalls):.0f} ms, worst {max(stalls):.0f} ms of {len(stalls)}: {told}"
    )


if __name__ == "__main__":
    main()
