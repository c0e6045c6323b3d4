"""Host memory once all is held: of all the mount's processes, and the page cache of the mount and of its cache."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.context import Context, Measure, Target, pairs
from bench.held import wait_held
from bench.mountprocesses import bytes_of_each, private_bytes, wait_settled
from bench.record import Sample
from bench.touching import chosen, toucher
from lazymem.pages import PAGE_SIZE


def page_cache_bytes(path: Path) -> int:
    """What of a file is in the kernel's page cache (fincore(1))."""
    command = ["fincore", "-b", "-n", "-o", "RES", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) if done.stdout.split() else 0


def _run(context: Context) -> Sample:
    """All held, and every page with data touched once, as by a guest that has run for a while."""
    numbers = chosen(context.image, context.image.facts.pages, context.round, nonzero=True)
    with (
        context.folder() as folder,
        context.served(context.image, folder) as (_, seen),
        toucher(folder, numbers) as hand,
        context.way.mount(seen, context.image, folder) as mount,
    ):
        wait_held(mount)
        hand.go(mount.ram)
        hand.result(context.image, numbers)
        wait_settled(mount)
        figures: dict[str, float] = {
            f"{name}_anonymous_bytes": count for name, count in bytes_of_each(mount, private_bytes).items()
        }
        figures["mount_cache_bytes"] = page_cache_bytes(mount.ram)
        cached = (page_cache_bytes(path) for path in (folder / "cache").rglob("*") if path.is_file())
        figures["own_files_cache_bytes"] = sum(cached)
    figures["held_bytes"] = sum(figures.values())
    figures["beyond_nonzero_bytes"] = figures["held_bytes"] - context.image.facts.nonzero_pages * PAGE_SIZE
    figures["allowed_bytes"] = 64e6 + 0.02 * context.image.facts.nonzero_pages * PAGE_SIZE
    figures["beyond_over_allowed"] = figures["beyond_nonzero_bytes"] / figures["allowed_bytes"]
    return context.sample(figures)


MEASURE = Measure(
    "memory",
    "host memory beyond the guest's non-zero RAM once all is held",
    pairs(("loopback",), ("lazymem",)),
    _run,
    (
        Target(
            "host memory beyond non-zero RAM, over 64 MB + 2 %", "loopback", "lazymem", "beyond_over_allowed", must=1.0
        ),
    ),
)
